"""Look-ups that meet an eviction of the same key: nobody is told that something is there which is about to go.

Other processes that share the environment are played by further committers: they know of each other only what is
committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any

import lmdb
import pytest
from tests.contract.cas.blob_making import content, put, read, upload_name
from tests.contract.cas.lmdb_store import STEP_SECONDS, LmdbStore
from tests.contract.cas.sharded_store import ShardedStore
from typing_extensions import override

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.blob_store import BlobStore
from lathe_cas.soon import settled
from lathe_cas.stores import lmdb_storage, lmdb_writer
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_committer import LmdbCommitter, Outcome
from lathe_cas.stores.lmdb_operations import NewBlob, Operation, PutBlob, RenewLeases
from lathe_shared.digest import Digest
from lathe_shared.errors import BlobNotFoundError, LatheError, ResourceExhaustedError

LIMIT_BYTES = 100_000
LEASE_SECONDS = 3_000
SIZE_BYTES = 60_000
ACTION = Digest.of(b"action")

LOOKS = ["find", "size", "result", "read", "read_zstd", "read_many", "status"]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    store = LmdbStore(tmp_path / "store", LIMIT_BYTES, lease_seconds=LEASE_SECONDS)
    await store.open()
    yield store
    await store.recount()
    await store.close()


class HoldTheWriter(Operation[None]):
    """Keeps the writer's thread, and with it every later operation, until it is told to go on."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()

    @override
    def apply(self, batch: WriteBatch) -> None:
        self.began.set()
        assert self.go_on.wait(30)


@contextlib.asynccontextmanager
async def held_writer(store: LmdbStore) -> AsyncIterator[None]:
    """Keep every write waiting within the block."""
    hold = HoldTheWriter()
    held = asyncio.ensure_future(store.storage.writer.submit(hold))
    try:
        await asyncio.to_thread(hold.began.wait, 30)
        yield
    finally:
        hold.go_on.set()
        await held


async def put_old(store: LmdbStore) -> Digest:
    """Put a blob and an action result that names it, and let their leases end."""
    (old,) = await put(store.blobs, content(SIZE_BYTES))
    await store.results.put("main", ACTION, StoredActionResult(b"result", [(old.key, old.size_bytes)]))
    store.now += LEASE_SECONDS + 2 * STEP_SECONDS
    return old


async def is_found(store: LmdbStore | ShardedStore, digest: Digest, look: str) -> bool:
    blobs: BlobStore = store.blobs
    if look == "find":
        return not await settled(blobs.find_missing([(digest, digest.key, digest.size_bytes)]))
    if look == "size":
        return await settled(blobs.find_sizes([digest.key])) == [digest.size_bytes]
    if look == "result":
        return await settled(store.results.get("main", ACTION)) is not None
    if look == "status":
        return (await blobs.upload_status(upload_name(digest))).complete
    if look == "read_many":
        return await blobs.read_many([digest]) != [None]
    try:
        if look == "read_zstd":
            return b"".join([piece async for piece in blobs.read_zstd(digest)]) != b""
        assert blobs.read_at_once(digest, 0, 100) is None, "not before the lease is renewed"
        return await read(blobs, digest) != b""
    except BlobNotFoundError:
        return False


def step_of(store: LmdbStore, digest: Digest) -> int:
    """Return the step of a blob's last use, as any process sees it."""
    environment = store.storage.environment
    with environment.read() as txn:
        return int.from_bytes(txn.get(digest.key, b"", environment.blobs)[8:12], "big")


def other_process(store: LmdbStore) -> LmdbCommitter:
    storage = store.storage
    touches = Touches(storage.step)
    return LmdbCommitter(storage.environment, store.options.policy, touches, storage.seconds, 86_400)


def large_blob(seed: int) -> PutBlob:
    """Make an operation for which all else has to go."""
    data = content(95_000, seed)
    key = Digest.of(data).key
    return PutBlob(NewBlob(key, len(data), cut(data, chunk_seed(key))))


def put_elsewhere(other: LmdbCommitter, seed: int) -> LatheError | None:
    (outcome,) = other.commit([large_blob(seed)])
    assert outcome.error is None or isinstance(outcome.error, LatheError)
    return outcome.error


@pytest.mark.parametrize("compressing", [False, True])
@pytest.mark.parametrize("look", LOOKS)
async def test_what_is_found_with_its_lease_over_is_renewed_durably_before_anyone_knows(
    tmp_path: Path, look: str, compressing: bool
) -> None:
    store = LmdbStore(tmp_path / "store", LIMIT_BYTES, lease_seconds=LEASE_SECONDS, compress_stored=compressing)
    await store.open()
    old = await put_old(store)
    await store.settle()
    steps: list[int] = []
    async with held_writer(store):
        found = asyncio.ensure_future(is_found(store, old, look))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not found.done()
        assert step_of(store, old) < store.storage.step()
        found.add_done_callback(lambda _: steps.append(step_of(store, old)))
    assert await found
    await asyncio.sleep(0)
    assert steps == [store.storage.step()]
    error = put_elsewhere(other_process(store), 1)
    assert isinstance(error, ResourceExhaustedError), "it has a lease"
    await store.recount()
    await store.close()


@pytest.mark.parametrize("look", LOOKS)
async def test_what_goes_before_its_lease_is_renewed_is_missing(store: LmdbStore, look: str) -> None:
    """A client that is told that a blob is there does not send it; so it had better be there a moment later, too."""
    old = await put_old(store)
    async with held_writer(store):
        evicting = asyncio.ensure_future(store.storage.writer.submit(large_blob(1)))
        await asyncio.sleep(0)
        found = asyncio.ensure_future(is_found(store, old, look))
        for _ in range(20):
            await asyncio.sleep(0)
    await evicting
    # Who reads has the bytes already.
    assert await found == look.startswith("read")
    assert old not in (await store.recount()).blobs


@pytest.mark.parametrize("look", ["find", "size", "result", "status"])
@pytest.mark.parametrize("age_seconds", range(0, LEASE_SECONDS + 3 * STEP_SECONDS, 100))
async def test_what_is_told_at_once_stays_until_that_is_noted(store: LmdbStore, look: str, age_seconds: int) -> None:
    """Whenever it is asked for: the writer has the rest of a step, and a whole one, to note it."""
    store.now -= store.now % STEP_SECONDS - 50
    (old,) = await put(store.blobs, content(SIZE_BYTES))
    await store.results.put("main", ACTION, StoredActionResult(b"result", [(old.key, old.size_bytes)]))
    store.now += age_seconds
    commits = store.storage.committer.commits
    async with held_writer(store):
        found = asyncio.ensure_future(is_found(store, old, look))
        for _ in range(20):
            await asyncio.sleep(0)
        at_once = found.done()
    assert await found
    if age_seconds < LEASE_SECONDS - STEP_SECONDS:
        assert at_once, "nobody waits for nothing"
    if at_once:
        # Another process does not see what this one has noted.
        store.storage.touches.blobs.clear()
        store.storage.touches.action_results.clear()
    store.now += STEP_SECONDS
    if store.storage.committer.commits <= commits + 1:
        assert isinstance(put_elsewhere(other_process(store), 1), ResourceExhaustedError)
        assert step_of(store, old)


async def test_many_leases_are_renewed_in_several_transactions(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_storage, "MAX_TOUCHES", 2)
    digests = await put(store.blobs, *(content(10, seed) for seed in range(7)))
    references = [(digest.key, digest.size_bytes) for digest in digests]
    await store.results.put("main", ACTION, StoredActionResult(b"result", references))
    store.now += LEASE_SECONDS + STEP_SECONDS
    assert await settled(store.results.get("main", ACTION)) is not None
    assert {step_of(store, digest) for digest in digests} == {store.storage.step()}
    await store.blobs.remove(digests[6:])
    store.now += LEASE_SECONDS + STEP_SECONDS
    wanted = [(digest, digest.key, digest.size_bytes) for digest in digests]
    assert await settled(store.blobs.find_missing(wanted)) == digests[6:]
    assert {step_of(store, digest) for digest in digests[:6]} == {store.storage.step()}


async def test_a_store_that_cannot_be_written_is_read_all_the_same(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await put_old(store)

    def fail(*_: object) -> bool:
        raise lmdb.DiskError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(WriteBatch, "touch", fail)
        for look in LOOKS:
            if look != "read":
                assert await is_found(store, old, look)
        assert await read(store.blobs, old) == content(SIZE_BYTES)
    assert step_of(store, old) < store.storage.step()
    assert store.storage.touches.blobs, "it is noted as soon as that can be done"
    await store.settle()
    assert step_of(store, old) == store.storage.step()


async def test_leases_that_many_have_renewed_at_once_keep_nobody_waiting(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_storage, "MAX_TOUCHES", 2)
    monkeypatch.setattr(lmdb_writer, "MAX_TOUCHES", 2)
    digests = await put(store.blobs, *(content(10, seed) for seed in range(8)))
    store.now += LEASE_SECONDS + STEP_SECONDS
    hold = HoldTheWriter()
    holding = store.storage.writer.submit_nowait(hold)
    await asyncio.to_thread(hold.began.wait, 30)
    finding = [
        asyncio.ensure_future(settled(store.blobs.find_missing([(digest, digest.key, digest.size_bytes)])))
        for digest in digests
    ]
    await asyncio.sleep(0)
    putting = asyncio.ensure_future(put(store.blobs, b"small"))
    await asyncio.sleep(0)
    batches: list[Counter[type]] = []
    commit = store.storage.committer.commit

    def watched(operations: Sequence[Operation[Any]]) -> list[Outcome]:
        batches.append(Counter(map(type, operations)))
        return commit(operations)

    monkeypatch.setattr(store.storage.committer, "commit", watched)
    hold.go_on.set()
    await holding
    await putting
    assert await asyncio.gather(*finding) == [[]] * len(digests)
    assert batches == [{PutBlob: 1, RenewLeases: 2}, *[{RenewLeases: 2}] * 3]


async def test_what_is_gone_is_missing_though_other_leases_cannot_be_renewed(
    store: LmdbStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_storage, "MAX_TOUCHES", 2)
    digests = await put(store.blobs, *(content(10, seed) for seed in range(4)))
    store.now += LEASE_SECONDS + STEP_SECONDS
    wanted = [(digest, digest.key, digest.size_bytes) for digest in digests]
    hold = HoldTheWriter()
    holding = store.storage.writer.submit_nowait(hold)
    removing = asyncio.ensure_future(store.blobs.remove(digests[:1]))
    await asyncio.sleep(0)
    found = store.blobs.find_missing(wanted)
    assert not isinstance(found, list), "it saw all of them, and renews their leases behind the removal"
    hold.go_on.set()
    await holding
    touch = WriteBatch.touch

    def touch_some(batch: WriteBatch, kind: int, key: bytes) -> bool:
        if key == digests[3].key:
            raise lmdb.DiskError("no room")
        return touch(batch, kind, key)

    with monkeypatch.context() as patch:
        patch.setattr(WriteBatch, "touch", touch_some)
        assert await found == digests[:1]
    await removing


async def test_a_store_without_leases_answers_at_once(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store", LIMIT_BYTES)
    await store.open()
    old = await put_old(store)
    assert store.blobs.find_missing([(old, old.key, old.size_bytes)]) == []
    assert store.blobs.find_sizes([old.key]) == [old.size_bytes]
    assert not isinstance(store.results.get("main", ACTION), Awaitable)
    assert store.blobs.read_at_once(old) == content(SIZE_BYTES)
    await store.recount()
    await store.close()


@pytest.mark.parametrize("lost", [False, True])
async def test_leases_on_several_disks(tmp_path: Path, lost: bool) -> None:
    """An action result and what it names are renewed wherever they are, and each answer has the caller's order."""
    store = ShardedStore(tmp_path / "store", lease_seconds=LEASE_SECONDS)
    await store.open()
    digests = await put(store.blobs, *(content(10, seed) for seed in range(20)))
    references = [(digest.key, digest.size_bytes) for digest in digests]
    await store.results.put("main", ACTION, StoredActionResult(b"result", references))
    for shard in store.shards:
        shard.now += LEASE_SECONDS + STEP_SECONDS
    gone = digests[3:5] if lost else []
    await store.blobs.remove(gone)
    found = await settled(store.results.get("main", ACTION))
    assert (found is None) == lost
    wanted = [(digest, digest.key, digest.size_bytes) for digest in digests]
    for shard in store.shards:
        shard.now += LEASE_SECONDS + STEP_SECONDS
    assert await settled(store.blobs.find_missing(wanted)) == gone
    sizes = [None if digest in gone else 10 for digest in digests]
    for shard in store.shards:
        shard.now += LEASE_SECONDS + STEP_SECONDS
    assert await settled(store.blobs.find_sizes([digest.key for digest in digests])) == sizes
    assert store.blobs.find_missing(wanted) == gone, "at once, now that they are renewed"
    assert store.blobs.find_sizes([digest.key for digest in digests]) == sizes
    await store.recount()
    await store.close()
