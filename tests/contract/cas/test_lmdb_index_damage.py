"""Index entries that went bad on disk: nothing wrong is served for them, and what they stood for heals.

LMDB has no checksums for its pages, so a damaged entry looks like any other. What is changed here is changed through
LMDB, as one bit on the disk would change it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import lmdb as lmdb_library
import pytest
from tests.contract.cas.blob_making import blob, content, feed, missing, put, read, upload_name
from tests.contract.cas.lmdb_store import LmdbStore

from lathe_cas.action_result_store import FoundActionResult, StoredActionResult
from lathe_cas.blob_store import UploadStatus
from lathe_cas.soon import settled
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_environment import StorageFormatError
from lathe_cas.stores.lmdb_upload import upload_key_of
from lathe_shared.digest import Digest
from lathe_shared.errors import BlobNotFoundError, UnavailableError

CHUNK = 65_520
PAGE = 4_096
ACTION = Digest.of(b"action")
KEY = records.action_result_key("main", ACTION.key)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    """A store that is not recounted at the end, since it is damaged."""
    store = LmdbStore(tmp_path / "store")
    await store.open()
    yield store
    await store.close()


def change_blob(store: LmdbStore, digest: Digest, **fields: int) -> None:
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.blobs) as txn:
        value = txn.get(digest.key)
        assert value is not None
        txn.put(digest.key, records.BlobRecord.unpack(value)._replace(**fields).pack())


def change_result(store: LmdbStore, **fields: int) -> None:
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.action_results) as txn:
        value = txn.get(KEY)
        assert value is not None
        txn.put(KEY, records.ActionResultRecord.unpack(value)._replace(**fields).pack())


def storage_id(store: LmdbStore, digest: Digest) -> int:
    environment = store.storage.environment
    with environment.read() as txn:
        return records.BlobRecord.unpack(txn.get(digest.key, b"", environment.blobs)).storage_id


@pytest.mark.parametrize("size_bytes", [100, 3 * CHUNK])
async def test_a_record_that_points_at_another_blob_of_its_size_serves_nothing(
    store: LmdbStore, size_bytes: int
) -> None:
    (digest, data), (other, other_data) = blob(size_bytes, 1), blob(size_bytes, 2)
    await put(store.blobs, data, other_data)
    change_blob(store, digest, storage_id=storage_id(store, other))
    with pytest.raises(BlobNotFoundError):
        await read(store.blobs, digest)
    await store.settle()
    assert missing(store.blobs, digest) == [digest]
    await put(store.blobs, data)
    assert await read(store.blobs, digest) == data


async def test_a_chunk_under_another_number_is_not_served(store: LmdbStore) -> None:
    digest, data = blob(4 * CHUNK)
    await put(store.blobs, data)
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.chunks) as txn:
        key, value = next((key, value) for key, value in txn.cursor() if value == data[CHUNK : 2 * CHUNK])
        txn.delete(key)
        id_, _, checksum = records.CHUNK_KEY.unpack(key)
        # It now comes before the true chunk 2 or behind it: the look-up must not take whichever is first.
        txn.put(records.CHUNK_KEY.pack(id_, 2, b"\0" + checksum[1:]), value)
        txn.put(records.CHUNK_KEY.pack(id_, 2, checksum), value)
    received = b""
    with pytest.raises(BlobNotFoundError):
        received = await read(store.blobs, digest, 2 * CHUNK, CHUNK)
    assert received in (b"", data[2 * CHUNK : 3 * CHUNK])


@pytest.mark.parametrize(
    "fields",
    [{"chunks": 0}, {"references": 0}, {"references": 3}, {"flags": 1}, {"payload_bytes": 6}, {"payload_bytes": 10**6}],
)
async def test_an_action_result_under_a_damaged_record_is_a_miss_and_heals(
    store: LmdbStore, fields: dict[str, int]
) -> None:
    digests = await put(store.blobs, b"one", b"two")
    stored = StoredActionResult(b"result", [(digest.key, digest.size_bytes) for digest in digests])
    await store.results.put("main", ACTION, stored)
    assert store.results.get("main", ACTION) == FoundActionResult(b"result", True)
    change_result(store, **fields)
    assert await settled(store.results.get("main", ACTION)) is None
    await store.settle()
    assert store.blobs.status().action_results == 0
    await store.results.put("main", ACTION, stored)
    assert store.results.get("main", ACTION) == FoundActionResult(b"result", True)


async def by_batch(store: LmdbStore, data: bytes) -> None:
    await put(store.blobs, data)


async def by_one_message(store: LmdbStore, data: bytes) -> None:
    await store.blobs.put_upload(upload_name(Digest.of(data)), memoryview(data))


async def by_stream(store: LmdbStore, data: bytes) -> None:
    upload = await store.blobs.open_upload(upload_name(Digest.of(data)))
    await upload.append([memoryview(data)], len(data))
    await upload.finish()


@pytest.mark.parametrize("upload", [by_batch, by_one_message, by_stream])
async def test_an_upload_heals_a_record_with_another_size(
    store: LmdbStore, upload: Callable[[LmdbStore, bytes], object]
) -> None:
    """Found missing, uploaded, acknowledged since its key is there, and missing still: that would never end."""
    digest, data = blob(1_000)
    await put(store.blobs, data)
    change_blob(store, digest, size_bytes=1_001)
    assert missing(store.blobs, digest) == [digest]
    await upload(store, data)  # type: ignore[misc]  # all three are coroutine functions
    assert missing(store.blobs, digest) == []
    assert await read(store.blobs, digest) == data
    assert store.blobs.status().blobs == 1


@pytest.mark.parametrize("fields", [{"disk_bytes": 1 << 63}, {"chunks": 1 << 31}])
async def test_a_damaged_blob_goes_whatever_else_its_record_says(store: LmdbStore, fields: dict[str, int]) -> None:
    digest, data = blob(3 * CHUNK)
    await put(store.blobs, data, b"other")
    change_blob(store, digest, storage_id=10**6, **fields)
    with pytest.raises(BlobNotFoundError):
        await read(store.blobs, digest)
    await store.settle()
    assert missing(store.blobs, digest) == [digest]
    assert store.blobs.status().garbage_bytes == 0
    await put(store.blobs, data)
    assert await read(store.blobs, digest) == data


async def test_a_record_of_another_length_is_damage_not_a_bug(store: LmdbStore) -> None:
    digest, data = blob(1_000)
    await put(store.blobs, data)
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.blobs) as txn:
        value = txn.get(digest.key)
        assert value is not None
        txn.put(digest.key, value[:18])
    with pytest.raises(BlobNotFoundError):
        await read(store.blobs, digest)
    await store.settle()
    assert missing(store.blobs, digest) == [digest]


async def test_eviction_passes_by_a_group_of_the_access_log_that_makes_no_sense(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, limit_bytes=4 << 20)
    await store.open()
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.access) as txn:
        txn.put(struct.pack(">IBQ", 1, 1, 1), bytes(100))
        txn.put(struct.pack(">IBQ", 1, 7, 2), b"\xff" * 100)
    for seed in range(8):
        store.now += 300
        await put(store.blobs, content(1 << 20, seed))
    await store.settle()
    assert store.blobs.status().counters["evicted_blobs"] > 0
    assert store.blobs.status().stored_bytes <= 4 << 20
    await store.close()


# Pages that make no sense to LMDB itself


P_LEAF = 2


def leaves_with(image: bytes, entry: bytes) -> list[int]:
    """Return where the pages of B-trees begin that hold these bytes; all but one are old, and are used no more."""
    places = [found.start() // PAGE * PAGE for found in re.finditer(re.escape(entry), image)]
    leaves = [start for start in places if image[start + 10] == P_LEAF]
    assert leaves
    return leaves


async def damage_page(store: LmdbStore, entry: bytes) -> None:
    """Make the page with this entry one that LMDB refuses to read: its count of entries is beyond its size."""
    await store.close()
    path = store.path / "data.mdb"
    image = bytearray(path.read_bytes())
    for start in leaves_with(bytes(image), entry):
        image[start + 13] ^= 0x80
    path.write_bytes(image)
    await store.open()


async def test_chunks_that_lmdb_cannot_reach_are_reported_missing_and_heal(store: LmdbStore) -> None:
    (digest, data), (other, other_data) = blob(1_000, 1), blob(100 * CHUNK, 2)
    await put(store.blobs, data)
    await put(store.blobs, other_data)
    await damage_page(store, data)
    with pytest.raises(BlobNotFoundError):
        await read(store.blobs, digest)
    await store.settle()
    assert missing(store.blobs, digest, other) == [digest]
    assert store.blobs.status().counters["damaged_blobs"] == 1
    await put(store.blobs, data)
    assert await read(store.blobs, digest) == data


async def test_records_that_lmdb_cannot_reach_are_missing_and_others_are_not(store: LmdbStore) -> None:
    blobs = [content(100, seed) for seed in range(300)]
    digests = await put(store.blobs, *blobs)
    await store.results.put("main", ACTION, StoredActionResult(b"result", [(d.key, 100) for d in digests]))
    await damage_page(store, digests[0].key + struct.pack(">Q", 100))
    lost = missing(store.blobs, *digests)
    assert digests[0] in lost
    assert len(lost) < 150, "the other pages are all right"
    sizes = await settled(store.blobs.find_sizes([digest.key for digest in digests]))
    assert sizes == [None if digest in lost else 100 for digest in digests]
    for digest, data in zip(digests, blobs, strict=True):
        assert await store.blobs.read_many([digest]) == [None if digest in lost else data]
    assert store.results.get("main", ACTION) is None
    with pytest.raises(UnavailableError, match=r"damaged.*lathe-cas fsck"):
        await store.blobs.put_many([(digests[0], memoryview(blobs[0]))])
    await put(store.blobs, *[data for digest, data in zip(digests, blobs, strict=True) if digest not in lost])


async def test_an_upload_that_lmdb_cannot_reach_is_unknown_and_refused_with_a_reason(store: LmdbStore) -> None:
    digest, data = blob(20 * CHUNK)
    upload = await store.blobs.open_upload(upload_name(digest))
    await feed(upload, data[: 18 * CHUNK])
    await upload.suspend()
    await damage_page(store, upload_key_of(upload_name(digest)))
    assert await store.blobs.upload_status(upload_name(digest)) == UploadStatus(0, False)
    with pytest.raises(UnavailableError, match=r"damaged.*lathe-cas fsck"):
        await store.blobs.put_upload(upload_name(digest), memoryview(data))


async def test_a_store_that_lost_a_database_is_refused(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    await store.open()
    await put(store.blobs, b"blob")
    await store.close()
    with lmdb_library.Environment(str(tmp_path), max_dbs=8) as env, env.begin(write=True) as txn:
        txn.drop(env.open_db(b"chunks", txn=txn), delete=True)
    with pytest.raises(StorageFormatError, match="lacks its database chunks"):
        await store.open()
