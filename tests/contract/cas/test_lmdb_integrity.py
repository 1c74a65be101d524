"""Bytes that went bad on disk, and folders that hold something else: never served, dropped, healed or refused."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import lmdb as lmdb_library
import pytest
import zstandard
from tests.contract.cas.blob_making import blob, content, feed, missing, put, read, upload_name
from tests.contract.cas.lmdb_store import MAP_BYTES, LmdbStore

from lathe_cas.action_result_store import FoundActionResult, StoredActionResult
from lathe_cas.blob_store import BlobStore, UploadStatus
from lathe_cas.fsck.child import check_here
from lathe_cas.fsck.command import main
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_environment import LOCK_FILE_BYTES, LmdbEnvironment, StorageFormatError
from lathe_cas.stores.lmdb_storage import StoreGivenUpError
from lathe_cas.stores.lmdb_upload import upload_key_of
from lathe_shared.digest import Digest
from lathe_shared.errors import BlobNotFoundError, ResourceExhaustedError, UnavailableError

CHUNK = 65_520
ACTION = Digest.of(b"action")


def flip(store: LmdbStore, piece: bytes, position: int) -> None:
    """Change one bit of a chunk that holds these bytes, behind the store's back."""
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.chunks) as txn:
        (key,) = [key for key, value in txn.cursor() if value == piece]
        damaged = bytearray(piece)
        damaged[position] ^= 0x10
        txn.put(key, bytes(damaged))
    store.damaged_ids.add(records.CHUNK_KEY.unpack(key)[0])


def lose(store: LmdbStore, piece: bytes) -> None:
    """Delete a chunk that holds these bytes, behind the store's back."""
    environment = store.storage.environment
    with environment.env.begin(write=True, db=environment.chunks) as txn:
        (key,) = [key for key, value in txn.cursor() if value == piece]
        txn.delete(key)


async def read_into(received: bytearray, store: BlobStore, digest: Digest) -> None:
    async for part in store.read(digest):
        received += part


PLACES = [(100, 0, 50), (100_000, 1, 0), (20 * CHUNK, 18, 77), (20 * CHUNK, 0, CHUNK - 1)]


@pytest.mark.parametrize(("size_bytes", "number", "position"), PLACES)
@pytest.mark.parametrize("how", ["flip", "lose"])
@pytest.mark.parametrize("reader", ["read", "read_many"])
async def test_a_damaged_blob_is_never_served_and_heals(
    lmdb: LmdbStore, size_bytes: int, number: int, position: int, how: str, reader: str
) -> None:
    digest, data = blob(size_bytes)
    await put(lmdb.blobs, data, content(100_000, 7))
    piece = data[number * CHUNK : (number + 1) * CHUNK]
    if how == "flip":
        flip(lmdb, piece, position)
    else:
        lose(lmdb, piece)
    if reader == "read":
        received = bytearray()
        with pytest.raises(BlobNotFoundError):
            await read_into(received, lmdb.blobs, digest)
        assert data.startswith(bytes(received)), "what was sent before was right"
    else:
        other = Digest.of(content(100_000, 7))
        assert await lmdb.blobs.read_many([digest, other]) == [None, content(100_000, 7)]
    await lmdb.settle()
    assert missing(lmdb.blobs, digest) == [digest]
    assert lmdb.blobs.status().counters["damaged_blobs"] == 1
    assert lmdb.blobs.status().blobs == 1
    await put(lmdb.blobs, data)
    assert await read(lmdb.blobs, digest) == data


async def read_as(store: BlobStore, digest: Digest, how: str) -> None:
    """Read a blob as a client does."""
    if how == "read_many":
        if await store.read_many([digest]) == [None]:
            raise BlobNotFoundError(digest)
    elif how == "read_zstd":
        async for _ in store.read_zstd(digest):
            pass
    elif how == "read" or store.read_at_once(digest, 0, 10) is None:
        await read(store, digest)


@pytest.mark.parametrize("how", ["read", "read_at_once", "read_many", "read_zstd"])
@pytest.mark.parametrize("compressing", [False, True])
@pytest.mark.parametrize("size_bytes", [100_000, 20 * CHUNK])
async def test_who_is_told_of_damage_finds_the_blob_missing_and_heals_it_at_once(
    tmp_path: Path, how: str, compressing: bool, size_bytes: int
) -> None:
    lmdb = LmdbStore(tmp_path, compress_stored=compressing)
    await lmdb.open()
    digest, data = blob(size_bytes)
    await put(lmdb.blobs, data)
    environment = lmdb.storage.environment
    with environment.read() as txn:
        piece = next(value for _, value in txn.cursor(environment.chunks))
    flip(lmdb, piece, 5)
    with pytest.raises(BlobNotFoundError):
        await read_as(lmdb.blobs, digest, how)
    assert missing(lmdb.blobs, digest) == [digest]
    assert await lmdb.blobs.upload_status(upload_name(digest)) == UploadStatus(0, False)
    await lmdb.blobs.put_upload(upload_name(digest), memoryview(data))
    await lmdb.settle()
    assert await read(lmdb.blobs, digest) == data
    assert lmdb.blobs.status().counters["damaged_blobs"] == 1
    await lmdb.close()


async def test_damage_in_one_place_leaves_other_ranges_readable(lmdb: LmdbStore) -> None:
    digest, data = blob(3 * CHUNK)
    await put(lmdb.blobs, data)
    flip(lmdb, data[2 * CHUNK :], 9)
    assert await read(lmdb.blobs, digest, 10, CHUNK) == data[10 : CHUNK + 10]
    with pytest.raises(BlobNotFoundError):
        await read(lmdb.blobs, digest, 2 * CHUNK, 1)


async def test_a_blob_written_anew_is_not_dropped_for_its_forerunners_damage(lmdb: LmdbStore) -> None:
    digest, data = blob(1000)
    await put(lmdb.blobs, data)
    flip(lmdb, data, 9)
    assert await lmdb.blobs.read_many([digest]) == [None]
    # The drop is under way; this is queued ahead of it or behind it, and must win either way.
    await lmdb.blobs.remove([digest])
    await put(lmdb.blobs, data)
    await lmdb.settle()
    assert await lmdb.blobs.read_many([digest]) == [data]


def change_record(store: LmdbStore, database: str, key: bytes, changed: Callable[[bytes], bytes]) -> None:
    """Change a record behind the store's back."""
    environment = store.storage.environment
    with environment.env.begin(write=True, db=getattr(environment, database)) as txn:
        txn.put(key, changed(txn.get(key, b"")))


def blob_record(store: LmdbStore, digest: Digest) -> records.BlobRecord:
    environment = store.storage.environment
    with environment.read() as txn:
        return records.BlobRecord.unpack(txn.get(digest.key, b"", environment.blobs))


def name_chunks_of(store: LmdbStore, digest: Digest, other: Digest) -> None:
    """Have a blob's record lead to the chunks of another blob, of as many bytes."""
    record = blob_record(store, digest)
    store.damaged_ids.add(record.storage_id)
    wrong = record._replace(storage_id=blob_record(store, other).storage_id)
    change_record(store, "blobs", digest.key, lambda _: wrong.pack())


async def drop_by_reading(store: LmdbStore, digest: Digest) -> None:
    assert await store.blobs.read_many([digest]) == [None]


async def drop_by_removing(store: LmdbStore, digest: Digest) -> None:
    assert await store.blobs.remove([digest]) == 1


async def drop_by_putting(store: LmdbStore, digest: Digest) -> None:
    """Have the store come upon a record that says another size, which goes, and remove what takes its place."""
    record = blob_record(store, digest)
    wrong = record._replace(size_bytes=record.size_bytes + 1)
    change_record(store, "blobs", digest.key, lambda _: wrong.pack())
    environment = store.storage.environment
    with environment.env.begin(write=True) as txn:
        totals = environment.totals_in(txn)
        totals.blob_bytes += 1
        environment.put_totals(txn, totals)
    await put(store.blobs, next(data for data in SAME_SIZES[digest.size_bytes] if Digest.of(data) == digest))
    await store.blobs.remove([digest])


SAME_SIZES = {size_bytes: [content(size_bytes, seed) for seed in (1, 2)] for size_bytes in (100, 50_000, 70 * CHUNK)}


@pytest.mark.parametrize("size_bytes", SAME_SIZES)
@pytest.mark.parametrize("drop", [drop_by_reading, drop_by_removing, drop_by_putting])
async def test_a_record_that_leads_to_anothers_chunks_does_not_take_them_along(
    lmdb: LmdbStore, size_bytes: int, drop: Callable[[LmdbStore, Digest], Awaitable[None]]
) -> None:
    damaged, whole = await put(lmdb.blobs, *SAME_SIZES[size_bytes])
    name_chunks_of(lmdb, damaged, whole)
    await drop(lmdb, damaged)
    await lmdb.settle()
    assert missing(lmdb.blobs, damaged, whole) == [damaged]
    assert await read(lmdb.blobs, whole) == SAME_SIZES[size_bytes][1]
    await lmdb.close()
    flags = (f"--data-dir={lmdb.path}", f"--temp-dir={lmdb.path.parent}")
    assert [main([*flags, *more], {}, check_here) for more in ((), ("--repair",), ())] == [1, 3, 0], "chunks left over"
    lmdb.damaged_ids.clear()
    await lmdb.open()
    assert await read(lmdb.blobs, whole) == SAME_SIZES[size_bytes][1]


@pytest.mark.parametrize(("size_bytes", "other_bytes"), [(100, 100), (3_000, 3_000), (50_000, 2 * CHUNK)])
async def test_eviction_by_a_damaged_record_does_not_take_anothers_chunks_along(
    lmdb: LmdbStore, size_bytes: int, other_bytes: int
) -> None:
    (damaged,) = await put(lmdb.blobs, content(size_bytes, 1))
    lmdb.now += 600
    (whole,) = await put(lmdb.blobs, content(other_bytes, 2))
    name_chunks_of(lmdb, damaged, whole)
    await lmdb.reopen(limit_bytes=(records.blob_disk_bytes(other_bytes) + 192) * 10 // 9 + 2)
    await lmdb.settle()
    assert missing(lmdb.blobs, damaged, whole) == [damaged]
    assert await read(lmdb.blobs, whole) == content(other_bytes, 2)


async def test_eviction_frees_what_is_compressed(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store", compress_stored=True)
    await store.open()
    digests = await put(store.blobs, content(1_000), content(100_000), content(3 << 20))
    await store.reopen(limit_bytes=1000)
    await store.settle()
    assert missing(store.blobs, *digests) == digests
    await store.recount()
    await store.close()


async def test_a_blob_that_lost_a_chunk_gives_back_the_others(lmdb: LmdbStore) -> None:
    (digest,) = await put(lmdb.blobs, content(3 * CHUNK))
    lose(lmdb, content(3 * CHUNK)[:CHUNK])
    assert await lmdb.blobs.read_many([digest]) == [None]


async def test_an_action_result_that_leads_to_anothers_chunks_does_not_take_them_along(lmdb: LmdbStore) -> None:
    other = Digest.of(b"other action")
    for action in (ACTION, other):
        await lmdb.results.put("main", action, StoredActionResult(b"result", []))
    keys = [records.action_result_key("main", action.key) for action in (ACTION, other)]
    environment = lmdb.storage.environment
    with environment.read() as txn:
        damaged, whole = (
            records.ActionResultRecord.unpack(txn.get(key, b"", environment.action_results)) for key in keys
        )
    lmdb.damaged_ids.add(damaged.storage_id)
    wrong = damaged._replace(storage_id=whole.storage_id).pack()
    change_record(lmdb, "action_results", keys[0], lambda _: wrong)
    await lmdb.results.put("main", ACTION, StoredActionResult(b"new", []))
    assert lmdb.results.get("main", ACTION) == FoundActionResult(b"new", True)
    assert lmdb.results.get("main", other) == FoundActionResult(b"result", True)
    change_record(lmdb, "action_results", keys[0], lambda _: wrong)
    assert lmdb.results.get("main", ACTION) is None
    await lmdb.settle()
    assert lmdb.results.get("main", other) == FoundActionResult(b"result", True)
    with environment.env.begin(write=True) as txn:
        totals = environment.totals_in(txn)
        totals.action_result_bytes = whole.disk_bytes
        environment.put_totals(txn, totals)
        new_id = records.CHUNK_KEY.unpack(next(key for key, data in txn.cursor(environment.chunks) if data == b"new"))
    lmdb.damaged_ids.add(new_id[0])


async def test_an_upload_that_leads_to_anothers_chunks_does_not_take_them_along(lmdb: LmdbStore) -> None:
    (whole,) = await put(lmdb.blobs, content(3 * CHUNK))
    name = upload_name(blob(9 * CHUNK)[0])
    upload = await lmdb.blobs.open_upload(name)
    await feed(upload, content(9 * CHUNK)[: 3 * CHUNK])
    await upload.suspend()

    def lead_astray(value: bytes) -> bytes:
        record = records.UploadRecord.unpack(value)
        lmdb.damaged_ids.add(record.storage_id)
        return record._replace(storage_id=blob_record(lmdb, whole).storage_id).pack()

    change_record(lmdb, "uploads", upload_key_of(name), lead_astray)
    assert (await lmdb.blobs.open_upload(name)).committed_bytes == 0, "what it leads to are not its bytes"
    assert await read(lmdb.blobs, whole) == content(3 * CHUNK)


@pytest.mark.parametrize("damaged_next", [1, 2, (1 << 64) - 1])
async def test_a_counter_of_storage_ids_that_is_damaged_has_no_chunk_lost(lmdb: LmdbStore, damaged_next: int) -> None:
    before = await put(lmdb.blobs, content(100_000, 1), content(100, 2))
    environment = lmdb.storage.environment
    with environment.env.begin(write=True) as txn:
        totals = environment.totals_in(txn)
        totals.next_storage_id = damaged_next
        environment.put_totals(txn, totals)
    after = await put(lmdb.blobs, content(70_000, 3), content(100, 4))
    await lmdb.results.put("main", ACTION, StoredActionResult(b"result", []))
    assert [len(await read(lmdb.blobs, digest)) for digest in (*before, *after)] == [100_000, 100, 70_000, 100]
    assert lmdb.results.get("main", ACTION) == FoundActionResult(b"result", True)
    assert environment.read_totals().next_storage_id == 6


async def test_a_damaged_chunk_key_behind_all_others_keeps_nobody_from_writing(lmdb: LmdbStore) -> None:
    await put(lmdb.blobs, content(1_000, 1))
    environment = lmdb.storage.environment
    with environment.env.begin(write=True, db=environment.chunks) as txn:
        txn.put(records.CHUNK_KEY.pack((1 << 63) + 1, 0, bytes(8)), b"of nobody")
    lmdb.damaged_ids.add((1 << 63) + 1)
    digests = await put(lmdb.blobs, content(100_000, 2), content(100, 3))
    assert [len(await read(lmdb.blobs, digest)) for digest in digests] == [100_000, 100]
    assert environment.read_totals().next_storage_id == 4
    await lmdb.close()
    flags = (f"--data-dir={lmdb.path}", f"--temp-dir={lmdb.path.parent}")
    assert [main([*flags, *more], {}, check_here) for more in (("--repair",), ())] == [3, 0]
    lmdb.damaged_ids.clear()
    await lmdb.open()
    assert lmdb.storage.environment.read_totals().next_storage_id == 4
    assert missing(lmdb.blobs, *digests) == []


async def test_damage_on_the_disk_itself_is_noticed(lmdb: LmdbStore) -> None:
    digest, data = blob(100_000)
    await put(lmdb.blobs, data)
    await lmdb.close()
    path = lmdb.path / "data.mdb"
    image = bytearray(path.read_bytes())
    place = image.find(data[:CHUNK])
    assert place > 0
    image[place + 1234] ^= 1
    path.write_bytes(image)
    await lmdb.open()
    with pytest.raises(BlobNotFoundError):
        await read(lmdb.blobs, digest)
    await lmdb.settle()
    assert missing(lmdb.blobs, digest) == [digest]


async def test_a_damaged_action_result_is_a_miss_and_heals(lmdb: LmdbStore) -> None:
    (digest,) = await put(lmdb.blobs, b"output")
    stored = StoredActionResult(b"result", [(digest.key, digest.size_bytes)])
    await lmdb.results.put("main", ACTION, stored)
    flip(lmdb, digest.key + digest.size_bytes.to_bytes(8, "big") + b"result", 3)
    assert lmdb.results.get("main", ACTION) is None
    await lmdb.settle()
    assert lmdb.blobs.status().action_results == 0
    assert lmdb.blobs.status().counters["damaged_action_results"] == 1
    await lmdb.results.put("main", ACTION, stored)
    assert lmdb.results.get("main", ACTION) == FoundActionResult(b"result", True)


@pytest.mark.parametrize("number", [0, 2])
async def test_a_damaged_upload_begins_again(lmdb: LmdbStore, number: int) -> None:
    digest, data = blob(4 * CHUNK)
    name = upload_name(digest)
    upload = await lmdb.blobs.open_upload(name)
    await feed(upload, data[: 3 * CHUNK - 100])
    await upload.suspend()
    flip(lmdb, data[number * CHUNK : min((number + 1) * CHUNK, 3 * CHUNK - 100)], 9)
    upload = await lmdb.blobs.open_upload(name)
    assert upload.committed_bytes == 0
    assert await lmdb.blobs.upload_status(name) == UploadStatus(0, False)
    assert await upload.suspend() == 0
    assert await lmdb.blobs.upload_status(name) == UploadStatus(0, False), "the client is told where to go on"
    upload = await lmdb.blobs.open_upload(name)
    await feed(upload, data)
    await upload.finish()
    assert await read(lmdb.blobs, digest) == data


@pytest.mark.parametrize(
    ("version", "what_to_do"), [(1, "remove data.mdb and lock.mdb"), (3, "start the newer version that wrote it")]
)
async def test_a_store_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, what_to_do: str
) -> None:
    store = LmdbStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(records, "FORMAT_VERSION", version)
        await store.open()
        (digest,) = await put(store.blobs, b"of another time")
        await store.close()
    with pytest.raises(StorageFormatError, match=rf"format {version}, .*format 2.*{what_to_do}"):
        await store.open()
    with monkeypatch.context() as patch:
        patch.setattr(records, "FORMAT_VERSION", version)
        await store.open()
        assert await read(store.blobs, digest) == b"of another time"
        await store.close()


COMPRESSED_PLACES = [(300, 0), (200_000, 0), (200_000, 1), (40 * CHUNK, 17)]


@pytest.mark.parametrize(("size_bytes", "number"), COMPRESSED_PLACES)
@pytest.mark.parametrize("how", ["flip", "lose"])
@pytest.mark.parametrize("reader", ["read", "read_many", "read_zstd", "read_many_as_stored"])
async def test_a_damaged_compressed_blob_is_never_served_and_heals(
    lmdb: LmdbStore, size_bytes: int, number: int, how: str, reader: str
) -> None:
    digest, data = blob(size_bytes)
    stream = zstandard.compress(data)
    await lmdb.blobs.put_many_zstd([(digest, memoryview(stream))])
    piece = stream[number * CHUNK : (number + 1) * CHUNK]
    if how == "flip":
        flip(lmdb, piece, 20)
    else:
        lose(lmdb, piece)
    if reader == "read_many":
        assert await lmdb.blobs.read_many([digest]) == [None]
    elif reader == "read_many_as_stored":
        assert await lmdb.blobs.read_many_as_stored([digest]) == [None]
    else:
        read_one = lmdb.blobs.read if reader == "read" else lmdb.blobs.read_zstd
        with pytest.raises(BlobNotFoundError):
            _ = [part async for part in read_one(digest)]
    await lmdb.settle()
    assert missing(lmdb.blobs, digest) == [digest]
    assert lmdb.blobs.status().counters["damaged_blobs"] == 1
    await put(lmdb.blobs, data)
    assert await read(lmdb.blobs, digest) == data


@pytest.mark.parametrize("size_bytes", [600, 200_000])
@pytest.mark.parametrize("sent_as_zstd", [False, True])
async def test_a_record_that_is_wrong_about_compression_has_no_stream_taken_for_the_blob(
    lmdb: LmdbStore, size_bytes: int, sent_as_zstd: bool
) -> None:
    digest, data = blob(size_bytes)
    if sent_as_zstd:
        await lmdb.blobs.put_many_zstd([(digest, memoryview(zstandard.compress(data)))])
    else:
        await put(lmdb.blobs, data)
    environment = lmdb.storage.environment
    with environment.env.begin(write=True, db=environment.blobs) as txn:
        record = records.BlobRecord.unpack(txn.get(digest.key, b""))
        assert record.compression == sent_as_zstd
        lmdb.damaged_ids.add(record.storage_id)
        txn.put(digest.key, record._replace(compression=1 - record.compression).pack())
    with pytest.raises(BlobNotFoundError):
        await read(lmdb.blobs, digest)
    await lmdb.settle()
    assert missing(lmdb.blobs, digest) == [digest]


async def test_a_damaged_upload_that_was_staged_compressed_begins_again(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, compress_stored=True)
    await store.open()
    digest, data = blob(20 * CHUNK)
    upload = await store.blobs.open_upload(upload_name(digest))
    await feed(upload, data[: 18 * CHUNK])
    await upload.suspend()
    with store.storage.environment.read() as txn:
        piece = [bytes(value) for _, value in txn.cursor(store.storage.environment.chunks)][2]
    flip(store, piece, 9)
    upload = await store.blobs.open_upload(upload_name(digest))
    assert upload.committed_bytes == 0
    await feed(upload, data)
    await upload.finish()
    assert await read(store.blobs, digest) == data
    await store.recount()
    await store.close()


async def test_a_store_without_totals_is_refused(tmp_path: Path) -> None:
    environment = LmdbEnvironment(tmp_path, MAP_BYTES)
    with environment.env.begin(write=True) as txn:
        txn.delete(b"totals", db=environment.meta)
    with pytest.raises(StorageFormatError, match="no totals"):
        environment.read_totals()
    environment.close()


async def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(content(100_000))
    with pytest.raises(lmdb_library.InvalidError):
        await LmdbStore(tmp_path).open()


async def test_the_folder_is_its_owners_alone(lmdb: LmdbStore) -> None:
    assert lmdb.path.stat().st_mode & 0o777 == 0o700
    assert (lmdb.path / "data.mdb").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("is_there", [False, True])
async def test_the_lock_file_has_no_holes_that_a_full_disk_could_not_fill(tmp_path: Path, is_there: bool) -> None:
    path = tmp_path / "lock.mdb"
    if is_there:
        path.touch(0o600)
        os.truncate(path, LOCK_FILE_BYTES)
    store = LmdbStore(tmp_path)
    await store.open()
    status = path.stat()
    assert status.st_blocks * 512 >= status.st_size >= LOCK_FILE_BYTES
    assert status.st_mode & 0o777 == 0o600
    assert store.storage.environment.env.info()["max_readers"] >= 4096
    await store.close()


async def test_a_map_that_is_full_fails_what_does_not_fit_and_nothing_else(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    store.options = dataclasses.replace(store.options, map_size_bytes=2 << 20)
    await store.open()
    small, large = [content(1_000, seed) for seed in range(5)], content(4 << 20)
    batch = [*small[:3], large, *small[3:]]
    outcomes = await store.blobs.put_many([(Digest.of(data), memoryview(data)) for data in batch])
    assert [type(outcome) for outcome in outcomes] == [
        *[type(None)] * 3, ResourceExhaustedError, *[type(None)] * 2
    ]  # fmt: skip
    assert "full" in str(outcomes[3])
    await put(store.blobs, content(2_000))
    await store.recount()
    assert missing(store.blobs, *map(Digest.of, batch), Digest.of(content(2_000))) == [Digest.of(large)]
    assert store.blobs.status().counters["failed_commits"] > 0
    await store.close()


def descriptor_for_meta_pages(data_path: Path) -> int:
    """Return the descriptor by which LMDB writes the page that completes a transaction."""
    (number,) = [
        int(entry.name)
        for entry in Path("/proc/self/fd").iterdir()
        if entry.exists() and entry.samefile(data_path) and fcntl.fcntl(int(entry.name), fcntl.F_GETFL) & os.O_DSYNC
    ]
    return number


async def test_a_store_that_lmdb_gives_up_says_so_and_has_lost_nothing(lmdb: LmdbStore) -> None:
    (digest,) = await put(lmdb.blobs, b"stored")
    watching = asyncio.create_task(lmdb.storage.watch())
    data_path = lmdb.path / "data.mdb"
    read_only = os.open(data_path, os.O_RDONLY)
    os.dup2(read_only, descriptor_for_meta_pages(data_path))
    os.close(read_only)
    with pytest.raises(UnavailableError):
        await lmdb.blobs.put_many([(Digest.of(b"lost"), memoryview(b"lost"))])
    with pytest.raises(StoreGivenUpError):
        await watching
    await lmdb.close()
    await lmdb.open()
    assert await read(lmdb.blobs, digest) == b"stored"
    await put(lmdb.blobs, b"lost")
