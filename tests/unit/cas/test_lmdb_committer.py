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
from lathe_cas.stores import lmdb_committer
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_committer import LmdbCommitter, to_lathe_error
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_cas.stores.lmdb_operations import NewBlob, Nothing, Operation, PutBlobs
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


def put(seed: int, size_bytes: int = 100) -> PutBlobs:
    data = content(size_bytes, seed)
    key = Digest.of(data).key
    return PutBlobs([NewBlob(key, size_bytes, cut(data, chunk_seed(key)))])


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
    for step in range(2, 8):  # noqa: B007 - the committer asks for it
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


def failing_finish(_: WriteBatch) -> None:
    raise lmdb.DiskError("full")
