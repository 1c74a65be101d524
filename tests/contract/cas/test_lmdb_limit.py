"""The size limit: what goes, in which order, what is refused, and what comes back after a restart."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.contract.cas.blob_making import blob, content, feed, missing, put, read, upload_name
from tests.contract.cas.lmdb_store import STEP_SECONDS, UPLOAD_MAX_AGE_SECONDS, LmdbStore

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.blob_store import Upload, UploadStatus
from lathe_cas.soon import settled
from lathe_cas.stores import lmdb_access_log, lmdb_batch, lmdb_committer, lmdb_environment, lmdb_writer
from lathe_cas.stores.lmdb_committer import Outcome
from lathe_cas.stores.lmdb_operations import Operation, PutBlob, RenewLeases, StageUpload
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import AbortedError, ResourceExhaustedError, UnavailableError

LIMIT_BYTES = 1_000_000
ACTION = Digest.of(b"action")
CHUNK = 65_520
STAGE = 16 * CHUNK


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    store = LmdbStore(tmp_path / "store", LIMIT_BYTES)
    await store.open()
    yield store
    await store.recount()
    await store.close()


async def feed_and(upload: Upload, data: bytes, end: Callable[[], Awaitable[object]]) -> None:
    """Append and end an upload; either may be what meets the limit."""
    await feed(upload, data)
    await end()


def kept_bytes(store: LmdbStore) -> int:
    return store.storage.environment.read_totals().kept_bytes


async def put_in_steps(store: LmdbStore, count: int, size_bytes: int = 30_000) -> list[Digest]:
    """Put blobs, each in a touch step of its own."""
    digests = []
    for seed in range(count):
        digests += await put(store.blobs, content(size_bytes, seed))
        store.now += STEP_SECONDS
    return digests


async def test_the_limit_is_never_passed_and_the_oldest_go_first(store: LmdbStore) -> None:
    digests: list[Digest] = []
    for seed in range(100):
        digests += await put(store.blobs, content(30_000, seed))
        store.now += STEP_SECONDS
        assert kept_bytes(store) <= LIMIT_BYTES
    await store.settle()
    left = list((await store.recount()).blobs)
    assert 20 <= len(left) < 33
    assert sorted(left) == sorted(digests[-len(left) :])
    assert store.blobs.status().counters["evicted_blobs"] == 100 - len(left)


async def test_a_batch_that_is_larger_than_the_store_does_not_pass_the_limit(store: LmdbStore) -> None:
    digests = await put(store.blobs, *(content(30_000, seed) for seed in range(40)))
    assert kept_bytes(store) <= LIMIT_BYTES
    left = [digest for digest in digests if not missing(store.blobs, digest)]
    assert left == digests[-len(left) :]
    assert len(left) > 20


@pytest.mark.parametrize("use", ["find", "size", "read", "read_many", "put", "status", "result"])
async def test_what_is_used_is_kept(store: LmdbStore, use: str) -> None:
    digests = await put_in_steps(store, 25)
    used = digests[0]
    if use == "result":
        await store.results.put("main", ACTION, StoredActionResult(b"result", [(used.key, used.size_bytes)]))
        store.now += STEP_SECONDS
        assert store.results.get("main", ACTION) is not None
    elif use == "find":
        assert missing(store.blobs, used) == []
    elif use == "size":
        assert store.blobs.find_sizes([used.key]) == [used.size_bytes]
    elif use == "read":
        await read(store.blobs, used)
    elif use == "read_many":
        await store.blobs.read_many([used])
    elif use == "put":
        await put(store.blobs, content(30_000, 0))
    else:
        assert (await store.blobs.upload_status(upload_name(used))).complete
    for seed in range(100, 120):
        store.now += STEP_SECONDS
        await put(store.blobs, content(30_000, seed))
    left = (await store.recount()).blobs
    assert used in left
    assert not set(digests[1:10]) & left.keys()


async def test_touches_are_kept_when_the_store_is_closed(store: LmdbStore) -> None:
    digests = await put_in_steps(store, 25)
    assert missing(store.blobs, *digests[:3]) == []
    await store.reopen()
    for seed in range(100, 120):
        await put(store.blobs, content(30_000, seed))
    left = (await store.recount()).blobs
    assert set(digests[:3]) <= left.keys()


async def test_an_action_result_goes_before_the_blobs_that_it_names(store: LmdbStore) -> None:
    digests = await put(store.blobs, *(content(30_000, seed) for seed in range(25)))
    references = [(digest.key, digest.size_bytes) for digest in digests]
    await store.results.put("main", ACTION, StoredActionResult(b"result", references))
    store.now += STEP_SECONDS
    await put(store.blobs, *(content(30_000, seed) for seed in range(100, 110)))
    count = await store.recount()
    assert not count.action_results
    assert set(digests) - count.blobs.keys()
    assert set(digests) & count.blobs.keys()
    assert store.results.get("main", ACTION) is None


async def test_a_lower_limit_is_met_after_a_restart(store: LmdbStore) -> None:
    digests = await put_in_steps(store, 30)
    await store.reopen(limit_bytes=400_000)
    await store.settle()
    count = await store.recount()
    assert 300_000 < count.totals.kept_bytes <= 380_000
    assert sorted(count.blobs) == sorted(digests[-len(count.blobs) :])


async def test_a_limit_far_below_the_file_is_met_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is larger than the map would be that the new limit needs; LMDB has to have room all the same."""
    monkeypatch.setattr(lmdb_environment, "_MAP_HEADROOM_BYTES", 1 << 20)
    store = LmdbStore(tmp_path, 20_000_000)
    store.options = dataclasses.replace(store.options, map_size_bytes=None)
    await store.open()
    await put_in_steps(store, 18, 1_000_000)
    await store.reopen(limit_bytes=4_000_000)
    await store.settle()
    assert kept_bytes(store) <= 4_000_000
    await put(store.blobs, content(10))
    assert not store.blobs.status().counters["failed_commits"]
    await store.recount()
    await store.close()


async def test_a_blob_larger_than_the_store_is_refused(store: LmdbStore) -> None:
    digests = await put_in_steps(store, 10)
    digest, data = blob(LIMIT_BYTES)
    (outcome,) = await store.blobs.put_many([(digest, memoryview(data))])
    assert isinstance(outcome, ResourceExhaustedError)
    assert "max_size_bytes" in str(outcome)
    with pytest.raises(ResourceExhaustedError, match="max_size_bytes"):
        await store.blobs.open_upload(upload_name(digest))
    assert missing(store.blobs, *digests, digest) == [digest], "nothing was evicted for it"


async def test_of_a_batch_only_what_does_not_fit_is_refused(store: LmdbStore) -> None:
    data = [content(10, 1), content(LIMIT_BYTES + 1, 2), content(10, 3)]
    outcomes = await store.blobs.put_many([(Digest.of(each), memoryview(each)) for each in data])
    assert [type(outcome) for outcome in outcomes] == [type(None), ResourceExhaustedError, type(None)]


async def test_uploads_push_out_what_is_old(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, 4 * STAGE)
    await store.open()
    old = await put_in_steps(store, 4, STAGE - 10_000)
    digest, data = blob(2 * STAGE)
    upload = await store.blobs.open_upload(upload_name(digest))
    await feed(upload, data)
    await upload.finish()
    assert kept_bytes(store) <= 4 * STAGE
    assert await read(store.blobs, digest) == data
    assert missing(store.blobs, *old)[:2] == old[:2]
    await store.recount()
    await store.close()


async def test_unfinished_uploads_that_hold_all_room_are_named(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, 4 * STAGE)
    await store.open()
    names = [upload_name(Digest.of(content(3 * STAGE, seed))) for seed in range(2)]
    first = await store.blobs.open_upload(names[0])
    await feed(first, content(3 * STAGE, 0)[:-1])
    assert await first.suspend() == 3 * STAGE - 1
    second = await store.blobs.open_upload(names[1])
    with pytest.raises(ResourceExhaustedError, match="unfinished uploads"):
        await feed_and(second, content(3 * STAGE, 1)[:-1], second.suspend)
    assert store.blobs.status().counters["refused_writes"] > 0
    assert await store.blobs.upload_status(names[0]) == UploadStatus(3 * STAGE - 1, False)
    third = await store.blobs.open_upload(names[1])
    await third.abandon()
    first = await store.blobs.open_upload(names[0])
    await feed(first, content(3 * STAGE, 0)[-1:])
    await first.finish()
    assert missing(store.blobs, names[0].digest) == []
    await store.recount()
    await store.close()


async def test_an_upload_that_was_refused_room_leaves_nothing_when_abandoned(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, 4 * STAGE)
    await store.open()
    other = await store.blobs.open_upload(upload_name(Digest.of(content(2 * STAGE + 1))))
    await feed(other, content(2 * STAGE))
    await other.suspend()
    digest, data = blob(3 * STAGE)
    upload = await store.blobs.open_upload(upload_name(digest))
    with pytest.raises(ResourceExhaustedError):
        await feed_and(upload, data, upload.suspend)
    upload = await store.blobs.open_upload(upload_name(digest))
    with pytest.raises(ResourceExhaustedError):
        await feed_and(upload, data[upload.committed_bytes :], upload.finish)
    upload = await store.blobs.open_upload(upload_name(digest))
    (staged,) = store.blobs.active_uploads.values()
    # No later append can hear of the second stage: its refusal is there when the upload is abandoned, and not before.
    await feed(upload, data[: 2 * STAGE])
    await staged._settle_hashing()
    with pytest.raises(ResourceExhaustedError):
        await asyncio.shield(staged._stages[-1])
    await upload.abandon()
    assert await store.blobs.upload_status(upload_name(digest)) == UploadStatus(0, False)
    await store.recount()
    await store.close()


# With the second one it is the last bytes of the copy under the right key that do not fit.
@pytest.mark.parametrize("limit_bytes", [4 * STAGE, 4 * STAGE + STAGE // 2])
async def test_an_unnamed_upload_that_does_not_fit_at_its_end_leaves_nothing(tmp_path: Path, limit_bytes: int) -> None:
    store = LmdbStore(tmp_path, limit_bytes)
    await store.open()
    other = await store.blobs.open_upload(upload_name(Digest.of(content(2 * STAGE + 1))))
    await feed(other, content(2 * STAGE))
    await other.suspend()
    staged_bytes = store.blobs.status().staged_bytes
    upload = await store.blobs.open_unnamed_upload(DigestFunction.SHA256)
    data = content(2 * STAGE - 1)
    await upload.append([memoryview(data)[:STAGE]], STAGE)
    await upload.append([memoryview(data)[STAGE:]], STAGE - 1)
    with pytest.raises(ResourceExhaustedError):
        await upload.finish()
    assert store.blobs.status().staged_bytes == staged_bytes
    await store.recount()
    await store.close()


async def test_an_action_result_that_does_not_fit_is_refused(store: LmdbStore) -> None:
    with pytest.raises(ResourceExhaustedError):
        await store.results.put("main", ACTION, StoredActionResult(bytes(LIMIT_BYTES), []))
    assert store.results.get("main", ACTION) is None


async def test_an_abandoned_upload_is_cleared_after_a_day(store: LmdbStore) -> None:
    digest, data = blob(3 * CHUNK)
    name = upload_name(digest)
    upload = await store.blobs.open_upload(name)
    await feed(upload, data[: 2 * CHUNK + 5])
    await upload.suspend()
    store.now += UPLOAD_MAX_AGE_SECONDS
    await store.settle()
    assert await store.blobs.upload_status(name) == UploadStatus(2 * CHUNK + 5, False)
    resumed = await store.blobs.open_upload(name)
    store.now += 120
    await store.settle()
    assert await store.blobs.upload_status(name) == UploadStatus(0, False)
    assert store.blobs.status().counters["expired_uploads"] == 1
    await feed(resumed, data[2 * CHUNK + 5 :])
    with pytest.raises(AbortedError, match="cleared"):
        await resumed.finish()
    assert missing(store.blobs, digest) == [digest]


async def test_what_is_left_of_an_upload_goes_when_its_blob_is_there(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    await store.open()
    begun = [blob(2 * STAGE, seed) for seed in range(2)]
    for digest, data in begun:
        upload = await store.blobs.open_upload(upload_name(digest))
        await feed(upload, data[:STAGE])
        await upload.suspend()
    kept = store.blobs.status().staged_bytes // 2
    await put(store.blobs, begun[1][1])
    store.now += lmdb_committer.SUPERFLUOUS_AFTER_SECONDS + 1
    await store.settle()
    assert store.blobs.status().staged_bytes == kept
    assert await store.blobs.upload_status(upload_name(begun[0][0])) == UploadStatus(STAGE, False)
    await store.recount()
    await store.close()


async def test_what_many_touches_leave_behind_is_swept(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_committer, "_LOG_SLACK_ENTRIES", 50)
    monkeypatch.setattr(lmdb_access_log, "MAX_GROUP_ENTRIES", 7)
    digests = await put(store.blobs, *(content(10, seed) for seed in range(40)))
    for _ in range(30):
        store.now += STEP_SECONDS
        assert missing(store.blobs, *digests) == []
        await store.settle()
    totals = (await store.recount()).totals
    assert 40 <= totals.log_entries <= 2 * 40 + 50
    assert missing(store.blobs, *digests) == []


async def test_large_blobs_are_freed_step_by_step(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    await store.open()
    digests = await put(store.blobs, content(70 * CHUNK, 1), content(600 * CHUNK, 2))
    await store.blobs.remove(digests)
    assert store.blobs.status().stored_bytes == 0
    totals = (await store.recount()).totals
    assert totals.garbage_bytes == 0
    assert store.storage.environment.env.stat()["overflow_pages"] == 0
    await store.close()


async def test_all_who_wait_for_room_in_the_queue_get_it(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them being cancelled in the moment when room appears must not leave the others waiting."""
    monkeypatch.setattr(lmdb_writer, "MAX_PENDING_BYTES", 1)
    writer = store.storage.writer
    first = asyncio.create_task(store.blobs.put_many([(Digest.of(b"first"), memoryview(b"first"))]))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(writer.wait_for_room()) for _ in range(5)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    await first
    waiting[0].cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True] * 5


@pytest.fixture
async def full_of_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LmdbStore]:
    """Make a store that is full of small blobs, and lets seven of them go in a transaction for large writes."""
    monkeypatch.setattr(lmdb_batch, "MAX_EVICTED_FOR_ROOM", 7)
    monkeypatch.setattr(lmdb_batch, "LARGE_WRITE_BYTES", 4_000)
    store = LmdbStore(tmp_path / "small", 3 * STAGE, lease_seconds=3_000)
    store.set_policy(high_ratio=1.0, low_ratio=0.99)
    await store.open()
    await put(store.blobs, *(content(400, seed) for seed in range(5_000)))
    store.now += 3_000 + 3 * STEP_SECONDS
    yield store
    await store.recount()
    await store.close()


async def test_uploads_that_wait_for_room_get_it_and_keep_nobody_waiting(
    full_of_small_ones: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = full_of_small_ones
    times_put_off: Counter[type[Operation[Any]]] = Counter()
    commit = store.storage.committer.commit

    def counting(operations: Sequence[Operation[Any]]) -> list[Outcome]:
        outcomes = commit(operations)
        times_put_off.update(
            type(operation) for operation, outcome in zip(operations, outcomes, strict=True) if outcome.is_put_off
        )
        return outcomes

    monkeypatch.setattr(store.storage.committer, "commit", counting)

    async def upload(seed: int) -> Digest:
        digest, data = blob(STAGE + 100_000, seed)
        upload = await store.blobs.open_upload(upload_name(digest))
        await feed(upload, data)
        await upload.finish()
        return digest

    uploads = [asyncio.create_task(upload(seed)) for seed in range(2)]
    used = [Digest.of(content(400, seed)) for seed in range(4_000, 5_000)]
    done_beside = 0
    while not all(task.done() for task in uploads):
        await put(store.blobs, content(50, done_beside))
        if done_beside < len(used):
            digest = used[done_beside]
            assert await settled(store.blobs.find_missing([(digest, digest.key, digest.size_bytes)])) == []
        done_beside += 1
    assert done_beside > 20
    assert times_put_off[StageUpload] > 100
    assert not times_put_off[PutBlob]
    assert not times_put_off[RenewLeases]
    assert missing(store.blobs, *[task.result() for task in uploads]) == []
    assert kept_bytes(store) <= 3 * STAGE
    assert store.blobs.status().counters["refused_writes"] == 0


async def test_what_waits_for_room_does_not_fill_the_transactions(
    full_of_small_ones: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More waits for room than fits a transaction, and a stage that comes later must not overtake those before it."""
    store = full_of_small_ones
    monkeypatch.setattr(lmdb_writer, "MAX_BATCH_BYTES", STAGE)
    digest, data = blob(2 * STAGE + STAGE // 2)
    upload = await store.blobs.open_upload(upload_name(digest))
    for start in range(0, len(data), STAGE):
        await feed(upload, data[start : start + STAGE])
    finishing = asyncio.create_task(upload.finish())
    for seed in range(5):
        await put(store.blobs, content(50, seed))
    assert not finishing.done(), "there was more to do than operations that the small ones could have waited for"
    await finishing
    assert await read(store.blobs, digest) == data


async def test_a_store_is_closed_when_what_waits_for_room_is_done(full_of_small_ones: LmdbStore) -> None:
    store = full_of_small_ones
    digest, data = blob(100_000, 1)
    putting = asyncio.create_task(store.blobs.put_many([(digest, memoryview(data))]))
    await asyncio.sleep(0)
    await store.reopen()
    assert await putting == [None]
    assert await read(store.blobs, digest) == data


async def test_a_store_that_is_closed_refuses_with_a_clear_error(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    await store.open()
    upload = await store.blobs.open_upload(upload_name(Digest.of(b"later")))
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    with pytest.raises(AbortedError):
        await upload.append([memoryview(b"later")], 5)
    await closing
    with pytest.raises(UnavailableError, match="shutting down"):
        await store.blobs.put_many([(Digest.of(b"x"), memoryview(b"x"))])
