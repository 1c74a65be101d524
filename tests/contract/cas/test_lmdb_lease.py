"""Lease and age: what was used stays for its time, what was not used goes in the end, whatever the clocks do."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.contract.cas.blob_making import blob, content, feed, missing, missing_soon, put, read, upload_name
from tests.contract.cas.lmdb_store import STEP_SECONDS, LmdbStore

from lathe_cas.action_result_store import FoundActionResult, StoredActionResult
from lathe_cas.soon import settled
from lathe_cas.stores import access_touches, lmdb_committer, lmdb_writer
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_operations import Operation, PutActionResult
from lathe_shared.digest import Digest
from lathe_shared.errors import LatheError, ResourceExhaustedError

LIMIT_BYTES = 1_000_000
LEASE_SECONDS = 10_000
"""No multiple of a step."""
SURELY_OVER_SECONDS = LEASE_SECONDS + 2 * STEP_SECONDS
ACTION = Digest.of(b"action")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    store = LmdbStore(tmp_path / "store", LIMIT_BYTES, lease_seconds=LEASE_SECONDS)
    await store.open()
    yield store
    await store.recount()
    await store.close()


async def put_one(store: LmdbStore, seed: int, size_bytes: int = 30_000) -> LatheError | None:
    data = content(size_bytes, seed)
    (outcome,) = await store.blobs.put_many([(Digest.of(data), memoryview(data))])
    return outcome


async def fill(store: LmdbStore) -> list[Digest]:
    """Put blobs until no more fit."""
    digests = []
    for seed in range(100):
        if await put_one(store, seed) is not None:
            break
        digests.append(Digest.of(content(30_000, seed)))
    assert len(digests) == 30
    return digests


async def test_what_is_leased_stays_and_the_refusal_says_what_to_change(store: LmdbStore) -> None:
    digests = await fill(store)
    store.now += LEASE_SECONDS - 1
    outcome = await put_one(store, 1_000)
    assert isinstance(outcome, ResourceExhaustedError)
    status = store.blobs.status()
    for part in (
        f"{status.stored_bytes} bytes are kept",
        f"limit is {LIMIT_BYTES} (setting max_size_bytes)",
        f"{LEASE_SECONDS} seconds (setting lease_seconds)",
        "unfinished uploads hold 0",
    ):
        assert part in str(outcome)
    assert await missing_soon(store.blobs, *digests) == []
    assert status.counters["refused_writes"] == 2
    assert status.counters["refused_bytes"] > 60_000
    assert (status.oldest_evicted_age_seconds, status.least_evicted_age_seconds) == (None, None)


@pytest.mark.parametrize("offset_seconds", [0, 1, STEP_SECONDS - 1])
async def test_a_lease_ends_and_never_early(store: LmdbStore, offset_seconds: int) -> None:
    """Whatever the moment of a step that it began in."""
    store.now += STEP_SECONDS - store.now % STEP_SECONDS + offset_seconds
    digests = await fill(store)
    began = store.now
    while await put_one(store, 1_000) is not None:
        store.now += 50
    assert LEASE_SECONDS <= store.now - began < SURELY_OVER_SECONDS
    assert await missing_soon(store.blobs, *digests) != []
    age = store.blobs.status().least_evicted_age_seconds
    assert age is not None
    assert LEASE_SECONDS <= age <= store.now - began


async def test_the_refusal_tells_when_there_is_room_again(store: LmdbStore) -> None:
    await fill(store)
    outcome = await put_one(store, 1_000)
    seconds = int(str(outcome).partition("may go in ")[2].split()[0])
    store.now += seconds
    assert await put_one(store, 1_000) is None


@pytest.mark.parametrize("use", ["find", "size", "read", "put", "result"])
async def test_use_renews_a_lease(store: LmdbStore, use: str) -> None:
    digests = await fill(store)
    used = digests[:5]
    if use == "result":
        await store.blobs.remove(digests[-1:])
        references = [(digest.key, digest.size_bytes) for digest in used]
        await store.results.put("main", ACTION, StoredActionResult(b"result", references))
    store.now += LEASE_SECONDS - 1
    if use == "find":
        assert await missing_soon(store.blobs, *used) == []
    elif use == "size":
        await settled(store.blobs.find_sizes([digest.key for digest in used]))
    elif use == "read":
        for digest in used:
            await read(store.blobs, digest)
    elif use == "put":
        await put(store.blobs, *(content(30_000, seed) for seed in range(5)))
    else:
        assert await settled(store.results.get("main", ACTION)) is not None
    store.now += LEASE_SECONDS - 1
    seeds = itertools.count(1_000)
    while await put_one(store, next(seeds)) is None:
        pass
    assert next(seeds) > 1_020, "all else has made room"
    assert await missing_soon(store.blobs, *used) == []
    if use == "result":
        assert await settled(store.results.get("main", ACTION)) is not None


async def test_uploads_and_action_results_are_refused_alike(store: LmdbStore) -> None:
    await fill(store)
    digest, data = blob(300_000)
    upload = await store.blobs.open_upload(upload_name(digest))
    await feed(upload, data)
    with pytest.raises(ResourceExhaustedError, match="lease_seconds"):
        await upload.finish()
    with pytest.raises(ResourceExhaustedError, match="lease_seconds"):
        await store.results.put("main", ACTION, StoredActionResult(bytes(300_000), []))
    assert store.blobs.status().staged_bytes == 0


async def test_an_action_result_never_counts_as_used_later_than_its_blobs(store: LmdbStore) -> None:
    """Even if a step begins between a request and the batch that notes its touches."""
    digests = await put(store.blobs, content(10, 1), content(10, 2))
    store.now += STEP_SECONDS
    references = [(digest.key, digest.size_bytes) for digest in digests]
    await store.results.put("main", ACTION, StoredActionResult(b"result", references))
    count = await store.recount()
    assert set(count.blobs.values()) == set(count.action_results.values())
    store.now += STEP_SECONDS
    assert missing(store.blobs, *digests) == []
    await store.settle()
    assert store.results.get("main", ACTION) is not None
    store.now += STEP_SECONDS
    count = await store.recount()
    assert set(count.blobs.values()) == set(count.action_results.values()) == {store.storage.step()}


async def test_a_clock_that_is_set_while_the_store_is_open_changes_nothing(store: LmdbStore) -> None:
    digests = await fill(store)
    for error_seconds in (-(10**9), 10**9):
        store.wall_error_seconds = error_seconds
        assert isinstance(await put_one(store, 1_000), ResourceExhaustedError)
    store.wall_error_seconds = -(10**9)
    store.now += SURELY_OVER_SECONDS
    assert await put_one(store, 1_000) is None
    gone = await missing_soon(store.blobs, *digests)
    assert gone == digests[: len(gone)] != []


async def test_after_a_start_with_a_clock_that_was_set_back_leases_hold_and_end(store: LmdbStore) -> None:
    digests = await fill(store)
    store.wall_error_seconds = -(10**9)
    await store.reopen()
    assert isinstance(await put_one(store, 1_000), ResourceExhaustedError)
    store.now += SURELY_OVER_SECONDS
    assert await missing_soon(store.blobs, *digests[:-1]) == []
    assert await put_one(store, 1_000) is None
    assert await missing_soon(store.blobs, *digests) == digests[-1:], "the order of use went on"


async def test_what_is_too_old_goes_though_there_is_room(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_committer, "MAX_EVICTED_ENTRIES", 2)
    store.set_policy(max_age_seconds=2 * LEASE_SECONDS)
    await store.reopen()
    old = await put(store.blobs, *(content(10, seed) for seed in range(7)))
    references = [(digest.key, digest.size_bytes) for digest in old]
    await store.results.put("main", ACTION, StoredActionResult(b"result", references))
    store.now += LEASE_SECONDS
    young = await put(store.blobs, *(content(10, seed) for seed in range(7, 9)))
    store.now += LEASE_SECONDS - 1
    assert (await store.recount()).totals.blobs == 9
    store.now += 2 * STEP_SECONDS
    count = await store.recount()
    assert count.blobs.keys() == set(young)
    assert not count.action_results
    least = store.blobs.status().least_evicted_age_seconds
    assert least is not None
    assert 2 * LEASE_SECONDS <= least < 2 * LEASE_SECONDS + 2 * STEP_SECONDS


async def test_touches_that_are_many_are_written_at_once(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_committer, "MAX_TOUCHES", 2)
    digests = await put(store.blobs, *(content(10, seed) for seed in range(7)))
    store.now += STEP_SECONDS
    assert missing(store.blobs, *digests[:1]) == []
    assert not store.storage.committer.has_pressing_upkeep
    assert missing(store.blobs, *digests[1:]) == []
    assert store.storage.committer.has_pressing_upkeep


async def test_an_orderly_stop_forgets_no_use(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = await put(store.blobs, *(content(10, seed) for seed in range(7)))
    store.now += LEASE_SECONDS - 2 * STEP_SECONDS
    monkeypatch.setattr(lmdb_committer, "MAX_TOUCHES", 2)
    # They are many, but nobody tells the writer before it is to stop.
    monkeypatch.setattr(lmdb_writer.LmdbWriter, "look_at_touches", lambda _: None)
    assert missing(store.blobs, *digests) == []
    step = store.storage.step()
    await store.reopen()
    monkeypatch.undo()
    assert set((await store.recount()).blobs.values()) == {step}


async def test_a_lower_limit_makes_nobody_wait(store: LmdbStore) -> None:
    """A write pushes out as much as it brings; the rest goes in small steps beside it."""
    await fill(store)
    store.now += SURELY_OVER_SECONDS
    await store.settle()
    blobs = store.blobs.status().blobs
    await store.close()
    store.set_policy(limit_bytes=200_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmdb_committer, "MAX_EVICTED_ENTRIES", 0)
        await store.open()
        assert await put_one(store, 1_000) is None
    assert store.blobs.status().blobs == blobs
    await store.settle()
    assert store.blobs.status().stored_bytes <= 200_000


MANY = 3_000
"""References of a large action result: more than one transaction touches, more than are looked for on the loop."""
TINY = [b"tiny %d" % number for number in range(MANY)]
LARGE = StoredActionResult(b"large", [(digest.key, digest.size_bytes) for digest in map(Digest.of, TINY)])


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many things each transaction touches."""
    counts: list[int] = []
    finish = WriteBatch.finish

    def noted(batch: WriteBatch) -> None:
        counts.append(batch.report.touched)
        finish(batch)

    monkeypatch.setattr(WriteBatch, "finish", noted)
    return counts


async def oldest_step(store: LmdbStore) -> int:
    """Return the oldest step of any blob, having made sure that no action result counts as used later."""
    count = await store.recount()
    steps = count.blobs.values()
    assert all(step <= min(steps) for step in count.action_results.values())
    return min(steps)


async def test_what_a_large_action_result_names_is_touched_in_bounded_transactions(
    store: LmdbStore, touched: list[int]
) -> None:
    await put(store.blobs, *TINY)
    store.now += STEP_SECONDS
    await store.results.put("main", ACTION, LARGE)
    assert sum(touched) == MANY
    assert max(touched) <= lmdb_committer.MAX_TOUCHES
    assert await oldest_step(store) == store.storage.step()


async def test_many_action_results_share_a_transaction_only_as_far_as_there_is_time_for_their_blobs(
    store: LmdbStore, touched: list[int]
) -> None:
    await put(store.blobs, *TINY)
    store.now += STEP_SECONDS
    parts = [StoredActionResult(b"part", LARGE.references[start : start + 100]) for start in range(0, MANY, 100)]
    actions = [Digest.of(b"part %d" % number) for number in range(len(parts))]
    await asyncio.gather(*(store.results.put("main", *pair) for pair in zip(actions, parts, strict=True)))
    assert sum(touched) == MANY
    assert max(touched) < lmdb_committer.MAX_TOUCHES + 100


@pytest.mark.parametrize("ended_steps", [1, 5])
async def test_a_large_action_result_never_counts_as_used_later_than_its_blobs(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch, ended_steps: int
) -> None:
    await put(store.blobs, *TINY)
    submit = store.storage.writer.submit
    left = ended_steps

    async def submit_slowly(operation: Operation[Any]) -> Any:
        nonlocal left
        if isinstance(operation, PutActionResult) and left:
            left -= 1
            store.now += STEP_SECONDS
        return await submit(operation)

    monkeypatch.setattr(store.storage.writer, "submit", submit_slowly)
    await store.results.put("main", ACTION, LARGE)
    assert store.blobs.status().action_results == 1
    assert await oldest_step(store) == store.storage.step()


async def test_a_large_action_result_is_looked_up_beside_other_requests_and_leased(store: LmdbStore) -> None:
    await put(store.blobs, *TINY)
    await store.results.put("main", ACTION, LARGE)
    for passed in (0, STEP_SECONDS, SURELY_OVER_SECONDS):
        store.now += passed
        answer = store.results.get("main", ACTION)
        assert answer is not None
        assert not isinstance(answer, FoundActionResult), "not on the loop"
        assert await answer == FoundActionResult(b"large", True)
        assert await oldest_step(store) == store.storage.step()
    await store.blobs.remove([Digest.of(TINY[-1])])
    assert await settled(store.results.get("main", ACTION)) is None


async def test_a_large_action_result_that_is_damaged_is_a_miss_and_goes(store: LmdbStore) -> None:
    await store.results.put("main", ACTION, LARGE)
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.chunks) as txn:
        (key,) = [key for key, value in txn.cursor() if value.endswith(b"large")]
        txn.delete(key)
    assert await settled(store.results.get("main", ACTION)) is None
    await store.settle()
    assert store.blobs.status().action_results == 0


async def steps_on_disk(store: LmdbStore, digests: list[Digest]) -> list[int]:
    environment = store.storage.environment
    with environment.read() as txn:
        found = [txn.get(digest.key, b"", environment.blobs) for digest in digests]
    return [records.BlobRecord.unpack(value).step for value in found]


@pytest.mark.parametrize("how", ["find_missing", "find_sizes", "read_many", "action_result"])
async def test_uses_that_are_too_many_to_wait_are_noted_before_anyone_is_told(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(access_touches, "MAX_WAITING", 4)
    digests = await put(store.blobs, *TINY[:10])
    named = [(digest.key, digest.size_bytes) for digest in digests]
    await store.results.put("main", ACTION, StoredActionResult(b"result", named))
    store.now += STEP_SECONDS
    touches = store.storage.touches
    assert missing(store.blobs, *digests[:4]) == []
    assert len(touches) == 4, "these may wait"
    if how == "find_missing":
        answer: Any = store.blobs.find_missing([(digest, digest.key, digest.size_bytes) for digest in digests[4:]])
    elif how == "find_sizes":
        answer = store.blobs.find_sizes([digest.key for digest in digests[4:]])
    elif how == "read_many":
        answer = store.blobs.read_many(digests[4:])
    else:
        answer = store.results.get("main", ACTION)
    assert inspect.isawaitable(answer)
    assert len(touches) == 4
    await answer
    assert set(await steps_on_disk(store, digests[4:])) == {store.storage.step()}
    await oldest_step(store)
