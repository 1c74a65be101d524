"""Group commit: operations share a transaction, and do not share each other's failures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from tests.contract.cas.blob_making import content
from tests.contract.cas.lmdb_store import MAP_BYTES
from tests.contract.cas.recount import recount
from typing_extensions import override

from lathe_cas.eviction_policy import EvictionPolicy
from lathe_cas.stores import lmdb_batch, lmdb_committer
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_committer import LmdbCommitter, Outcome, to_lathe_error
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_cas.stores.lmdb_operations import (
    NewBlob,
    Nothing,
    Operation,
    PublishUpload,
    PutBlob,
    RenewLeases,
    StageUpload,
)
from lathe_shared.digest import Digest
from lathe_shared.errors import AbortedError, LatheError, ResourceExhaustedError, UnavailableError

AMPLE = EvictionPolicy(1 << 30)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[LmdbEnvironment]:
    environment = LmdbEnvironment(tmp_path, MAP_BYTES)
    yield environment
    recount(environment)
    environment.close()


def committer(environment: LmdbEnvironment, policy: EvictionPolicy = AMPLE) -> LmdbCommitter:
    return LmdbCommitter(environment, policy, Touches(lambda: 1), lambda: 1000.0, 86_400)


def put(seed: int, size_bytes: int = 100) -> PutBlob:
    data = content(size_bytes, seed)
    key = Digest.of(data).key
    return PutBlob(NewBlob(key, size_bytes, cut(data, chunk_seed(key))))


def is_pressed(group: LmdbCommitter) -> bool:
    return group.has_pressing_upkeep


class Fails(Operation[None]):
    """Stores a blob, perhaps, and then fails."""

    def __init__(self, error: Exception, *, changes_first: bool) -> None:
        self.error = error
        self.changes_first = changes_first

    @override
    def apply(self, batch: WriteBatch) -> None:
        if self.changes_first:
            put(99).apply(batch)
        raise self.error


FAILURES = [AbortedError("not now"), ValueError("a bug"), KeyError("another")]


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("changes_first", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_operation_that_fails_fails_alone(
    environment: LmdbEnvironment, error: Exception, changes_first: bool, place: int
) -> None:
    operations: list[Operation[Any]] = [put(1), put(2)]
    operations.insert(place, Fails(error, changes_first=changes_first))
    outcomes = committer(environment).commit(operations)
    assert [outcome.error for outcome in outcomes] == [error if at == place else None for at in range(3)]
    assert environment.read_totals().blobs == 2, "nothing of the failed one is left"


def test_all_may_fail(environment: LmdbEnvironment) -> None:
    outcomes = committer(environment).commit([Fails(error, changes_first=True) for error in FAILURES])
    assert [outcome.error for outcome in outcomes] == FAILURES
    assert environment.read_totals().blobs == 0


def test_what_fails_the_transaction_is_told_from_the_rest(environment: LmdbEnvironment) -> None:
    operations: list[Operation[Any]] = [put(1), put(2), Fails(lmdb.MapFullError("full"), changes_first=True), put(3)]
    group = committer(environment)
    outcomes = group.commit(operations)
    assert [type(outcome.error) for outcome in outcomes] == [
        type(None), type(None), ResourceExhaustedError, type(None)
    ]  # fmt: skip
    assert environment.read_totals().blobs == 3
    assert group.failed_commits > 0


def test_touches_of_a_failed_transaction_are_kept(environment: LmdbEnvironment) -> None:
    group = committer(environment)
    group.commit([put(1)])
    group._touches.blobs.add(Digest.of(content(100, 1)).key)
    group.commit([Fails(lmdb.MapFullError("full"), changes_first=False)])
    assert Digest.of(content(100, 1)).key in group._touches.blobs
    group.commit([Nothing()])
    assert not group._touches


def test_upkeep_that_fails_does_not_fail_operations_nor_spin(
    environment: LmdbEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = committer(environment, EvictionPolicy(3_000, high_ratio=0.9, low_ratio=0.1))
    monkeypatch.setattr(lmdb_committer, "MAX_EVICTED_ENTRIES", 1)
    for seed in range(9):
        group.commit([put(seed)])
    assert is_pressed(group), "it evicts one by one"

    def failing(*_: object) -> int:
        raise lmdb.DiskError("no room for copies of pages")

    monkeypatch.setattr(lmdb_committer, "evict", failing)
    outcomes = group.commit([Nothing()])
    assert outcomes[0].error is None
    assert not is_pressed(group)
    assert environment.read_totals().blobs == 8


def test_a_batch_without_changes_writes_nothing(environment: LmdbEnvironment) -> None:
    group = committer(environment)
    group.commit([put(1)])
    before = environment.env.info()["last_txnid"]
    outcomes = group.commit([Nothing()])
    assert outcomes[0].error is None
    assert environment.env.info()["last_txnid"] == before


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (lmdb.MapFullError("x"), ResourceExhaustedError),
        (lmdb.DiskError("x"), ResourceExhaustedError),
        (lmdb.TxnFullError("x"), ResourceExhaustedError),
        (lmdb.CorruptedError("x"), UnavailableError),
        (lmdb.Error("mdb_txn_commit: Disk quota exceeded"), ResourceExhaustedError),
        (lmdb.Error("mdb_txn_commit: File too large"), ResourceExhaustedError),
        (lmdb.Error("mdb_txn_commit: Input/output error"), UnavailableError),
    ],
)
def test_lmdbs_errors_become_what_a_client_understands(error: lmdb.Error, kind: type[LatheError]) -> None:
    assert type(to_lathe_error(error, 1 << 40)) is kind


def test_a_write_that_ended_early_for_want_of_room_is_a_full_disk() -> None:
    error = to_lathe_error(lmdb.Error("mdb_txn_commit: Input/output error"), 4096)
    assert isinstance(error, ResourceExhaustedError)
    assert "the disk is full" in error.message


def test_eviction_goes_on_through_entries_that_are_stale(
    environment: LmdbEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is freed by them, but what may go stands behind them: no writer should find them in its way."""
    step = 1
    policy = EvictionPolicy(3_000, high_ratio=0.6, low_ratio=0.1)
    group = LmdbCommitter(environment, policy, Touches(lambda: step), lambda: 1000.0, 86_400)
    monkeypatch.setattr(lmdb_committer, "MAX_EVICTED_ENTRIES", 1)
    group.commit([put(1), put(2)])
    for step in range(2, 20):  # noqa: B007 - the committer asks for it
        group._touches.blobs.update(Digest.of(content(100, seed)).key for seed in (1, 2))
        group.commit([])
    group.commit([put(seed) for seed in range(3, 8)])
    assert environment.read_totals().blobs == 7
    assert is_pressed(group)
    batches = 0
    while is_pressed(group):
        group.commit([])
        batches += 1
    assert environment.read_totals().kept_bytes <= 300
    assert batches >= 7


def test_many_touches_press_unless_they_cannot_be_written(
    environment: LmdbEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_committer, "MAX_TOUCHES", 1)
    group = committer(environment)
    group.commit([put(1)])
    group._touches.blobs.add(Digest.of(content(100, 1)).key)
    assert is_pressed(group)
    with monkeypatch.context() as patch:
        patch.setattr(WriteBatch, "finish", failing_finish)
        group.commit([Nothing()])
    assert group._touches
    assert not is_pressed(group), "a full disk would be tried again without a pause"
    group._touches.blobs.add(b"another")
    group.commit([Nothing()])
    assert is_pressed(group)


def commit_all(group: LmdbCommitter, operations: list[Operation[Any]]) -> list[int]:
    """Commit until nothing is put off; return the place of each operation, in the order in which they were done."""
    left = dict(enumerate(operations))
    order: list[int] = []
    while left:
        outcomes = group.commit(list(left.values()))
        done = [place for place, outcome in zip(left, outcomes, strict=True) if not outcome.is_put_off]
        assert [outcome.error for outcome in outcomes] == [None] * len(left)
        for place in done:
            del left[place]
        order += done
    return order


SMALL_BYTES = 322
"""What a blob of 100 bytes takes on disk."""


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three things go in a transaction for large writes, of more than 2,000 bytes, and three for small ones."""
    monkeypatch.setattr(lmdb_batch, "MAX_EVICTED_FOR_ROOM", 3)
    monkeypatch.setattr(lmdb_batch, "LARGE_WRITE_BYTES", 2_000)


def full_of_small_ones(environment: LmdbEnvironment, limit_bytes: int = 40 * SMALL_BYTES) -> LmdbCommitter:
    """Fill a store that evicts only when a write needs room."""
    group = committer(environment, EvictionPolicy(limit_bytes, high_ratio=1.0, low_ratio=0.99))
    group.commit([put(seed) for seed in range(40)])
    return group


@pytest.mark.usefixtures("few_at_once")
def test_room_for_a_large_write_is_made_in_bounded_steps(environment: LmdbEnvironment) -> None:
    group = full_of_small_ones(environment)
    blobs = []
    while group.commit([put(100, 3_000)])[0].is_put_off:
        blobs.append(environment.read_totals().blobs)
    assert blobs == [37, 34, 31, 28]
    assert environment.read_totals().blobs == 40 - 14 + 1
    assert group.report.refused_writes == 0


@pytest.mark.usefixtures("few_at_once")
def test_what_needs_no_room_is_done_beside_what_waits_for_it(environment: LmdbEnvironment) -> None:
    group = full_of_small_ones(environment)
    outcomes = group.commit([put(100, 3_000), Nothing(), put(101, 4_000), RenewLeases((), [Digest.of(b"").key])])
    assert [outcome.is_put_off for outcome in outcomes] == [True, False, True, False]
    assert environment.read_totals().blobs == 37


@pytest.mark.usefixtures("few_at_once")
def test_small_writes_do_not_wait_for_the_room_of_large_ones_nor_take_it(environment: LmdbEnvironment) -> None:
    group = full_of_small_ones(environment)
    large = put(100, 3_000)
    assert group.commit([large])[0].is_put_off
    for seed in range(200, 204):
        kept_bytes = environment.read_totals().kept_bytes
        outcomes = group.commit([large, put(seed)])
        assert [outcome.is_put_off for outcome in outcomes] == [seed < 203, False]
        if seed < 203:
            assert environment.read_totals().kept_bytes == kept_bytes - 3 * SMALL_BYTES


@pytest.mark.usefixtures("few_at_once")
def test_writes_of_one_size_get_their_room_in_the_order_in_which_they_came(environment: LmdbEnvironment) -> None:
    group = full_of_small_ones(environment)
    large = [put(seed, 3_000) for seed in range(100, 103)]
    small = [put(seed) for seed in range(200, 208)]
    order = commit_all(group, [*large, *small])
    assert [place for place in order if place < 3] == [0, 1, 2]
    assert [place for place in order if place >= 3] == list(range(3, 11))
    assert environment.read_totals().kept_bytes <= 40 * SMALL_BYTES


@pytest.mark.usefixtures("few_at_once")
def test_a_small_write_does_not_take_the_room_of_another_one_before_it(environment: LmdbEnvironment) -> None:
    group = full_of_small_ones(environment)
    writes = [put(200, 1_200), put(201)]
    assert [outcome.is_put_off for outcome in group.commit(writes)] == [True, True]
    assert environment.read_totals().kept_bytes == 37 * SMALL_BYTES
    assert [outcome.is_put_off for outcome in group.commit(writes)] == [False, False]


@pytest.mark.usefixtures("few_at_once")
def test_the_stages_of_an_upload_keep_their_order(environment: LmdbEnvironment) -> None:
    group = full_of_small_ones(environment)
    data = content(65_520 + 10)
    key = Digest.of(data).key
    upload = records.upload_key("main", "upload", key, len(data))
    chunks = cut(data, chunk_seed(key))
    stages: list[Operation[Any]] = [
        StageUpload(upload, 1, None, False, 0, 65_520, 0, chunks[:1], 1),
        PublishUpload(key, len(data), StageUpload(upload, 1, None, False, 65_520, len(data), 0, chunks[1:], 1)),
    ]
    group._policy = EvictionPolicy(70_000, high_ratio=1.0, low_ratio=0.99)
    assert commit_all(group, [put(99, 60_000)]) == [0]
    group.commit([put(seed) for seed in range(40)])
    assert commit_all(group, stages) == [0, 1]
    assert Digest.of(data) in recount(environment).blobs


@pytest.mark.usefixtures("few_at_once")
def test_after_the_limit_was_lowered_a_large_write_waits_for_its_own_room_alone(environment: LmdbEnvironment) -> None:
    full_of_small_ones(environment)
    lower = EvictionPolicy(20 * SMALL_BYTES, high_ratio=1.0, low_ratio=0.99)
    group = committer(environment, lower)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmdb_committer, "MAX_EVICTED_BYTES", 0)
        rounds = 0
        while group.commit([put(100, 3_000)])[0].is_put_off:
            rounds += 1
    assert rounds == 4
    assert environment.read_totals().blobs == 40 - 14 + 1


@pytest.mark.usefixtures("few_at_once")
def test_stale_entries_in_the_way_are_passed_in_bounded_steps_too(environment: LmdbEnvironment) -> None:
    step = 1
    policy = EvictionPolicy(40 * SMALL_BYTES, high_ratio=1.0, low_ratio=0.99)
    group = LmdbCommitter(environment, policy, Touches(lambda: step), lambda: 1000.0, 86_400)
    group.commit([put(seed) for seed in range(40)])
    for step in range(2, 6):  # noqa: B007 - the committer asks for it
        group._touches.blobs.update(Digest.of(content(100, seed)).key for seed in range(40))
        group.commit([])
    entries = [environment.read_totals().log_entries]
    while group.commit([put(100)])[0].is_put_off:
        entries.append(environment.read_totals().log_entries)
    assert entries == [200, 152, 104, 56]
    assert environment.read_totals().blobs == 40


def full_with_few_to_go(environment: LmdbEnvironment, old: int) -> LmdbCommitter:
    """Fill a store with forty small blobs; the leases of all but the first ``old`` are not over."""
    steps = {"now": 100}
    policy = EvictionPolicy(
        40 * SMALL_BYTES, high_ratio=1.0, low_ratio=0.99, lease_seconds=1_000, touch_step_seconds=10
    )
    group = LmdbCommitter(environment, policy, Touches(lambda: steps["now"]), lambda: 1000.0, 86_400)
    group.commit([put(seed) for seed in range(old)])
    steps["now"] = 300
    group.commit([put(seed) for seed in range(old, 40)])
    return group


@pytest.mark.usefixtures("few_at_once")
def test_what_waited_is_refused_when_nothing_more_may_go(environment: LmdbEnvironment) -> None:
    group = full_with_few_to_go(environment, 5)
    large = put(100, 3_000)
    small = put(200)
    assert [outcome.is_put_off for outcome in group.commit([large])] == [True]
    outcomes = group.commit([large, small])
    assert isinstance(outcomes[0].error, ResourceExhaustedError)
    assert outcomes[1] == Outcome(None), "the room that was made for the other is nobody's now"


@pytest.mark.usefixtures("few_at_once")
def test_room_that_is_kept_for_a_large_write_refuses_no_small_one(environment: LmdbEnvironment) -> None:
    group = full_with_few_to_go(environment, 3)
    outcomes = group.commit([put(100, 3_000), put(200)])
    assert outcomes[0].is_put_off
    assert outcomes[1] == Outcome(None)


def failing_finish(_: WriteBatch) -> None:
    raise lmdb.DiskError("full")
