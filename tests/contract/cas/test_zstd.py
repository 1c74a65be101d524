"""What every blob store does with zstd: blobs that come compressed, and clients that want them so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zstandard
from tests.contract.cas.blob_making import blob, content, feed, missing, put, read, upload_name
from tests.contract.cas.conftest import Stores
from tests.contract.cas.lmdb_store import LmdbStore
from tests.unit.cas.zstd_frames import bomb

from lathe_cas.blob_store import BlobStore, UploadName, UploadStatus
from lathe_cas.compression.zstd_framing import MalformedZstdError
from lathe_cas.stores import lmdb_records as records
from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest
from lathe_shared.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    InvalidArgumentError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnavailableError,
)

CHUNK = 65_520
STAGE = 16 * CHUNK
SIZES = [1, 300, 2_011, CHUNK, 3 * CHUNK, STAGE + 1, 5 * STAGE + 7]
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "another blob": lambda data: encoded(b"\0" * 9 + data[9:]),
    "cut off": lambda data: encoded(data)[:-1],
    "garbage behind": lambda data: encoded(data) + b"garbage",
    "garbage": lambda data: data,
    "too short": lambda data: encoded(data[:-1]),
    "too long": lambda data: encoded(data + b"x"),
    "a bomb": lambda data: bomb(1000),
    "nothing": lambda data: b"",
}


def encoded(data: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def decoded(stream: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) as reader:
        return reader.read()


def zstd_name(digest: Digest, upload_id: str = "upload") -> UploadName:
    return upload_name(digest, upload_id)._replace(compressor=Compressor.ZSTD)


async def read_zstd(store: BlobStore, digest: Digest, offset_bytes: int = 0) -> bytes:
    return b"".join([piece async for piece in store.read_zstd(digest, offset_bytes)])


async def put_zstd(store: BlobStore, data: bytes, stream: bytes) -> Digest:
    digest = Digest.of(data)
    assert await store.put_many_zstd([(digest, memoryview(stream))]) == [None]
    return digest


async def upload_zstd(store: BlobStore, name: UploadName, stream: bytes, piece_bytes: int = 100_000) -> None:
    """Upload as the runner does it, which abandons what was refused."""
    upload = await store.open_upload(name)
    try:
        await feed(upload, stream, piece_bytes)
    except InvalidArgumentError:
        await upload.suspend()
        raise
    await upload.finish()


@pytest.mark.parametrize("size_bytes", SIZES)
async def test_a_compressed_blob_in_a_batch_is_a_blob(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    await put_zstd(blobs, data, encoded(data))
    assert missing(blobs, digest) == []
    assert await read(blobs, digest) == data
    assert await blobs.read_many([digest]) == [data]
    assert decoded(await read_zstd(blobs, digest)) == data


@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize("piece_bytes", [50_000, 3_000_000])
async def test_a_compressed_upload_becomes_a_blob(blobs: BlobStore, size_bytes: int, piece_bytes: int) -> None:
    digest, data = blob(size_bytes)
    await upload_zstd(blobs, zstd_name(digest), encoded(data), piece_bytes)
    assert await read(blobs, digest) == data
    assert decoded(await read_zstd(blobs, digest)) == data
    assert await blobs.upload_status(zstd_name(digest)) == UploadStatus(size_bytes, True)
    assert blobs.status().staged_bytes == 0


@pytest.mark.parametrize("size_bytes", [300, 3 * CHUNK])
async def test_a_compressed_upload_in_one_piece_becomes_a_blob(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    await blobs.put_upload(zstd_name(digest), memoryview(encoded(data)))
    assert await read(blobs, digest) == data


@pytest.mark.parametrize("size_bytes", [1, 300, CHUNK, 5 * STAGE + 7])
async def test_a_plain_blob_is_read_compressed(blobs: BlobStore, size_bytes: int) -> None:
    (digest,) = await put(blobs, content(size_bytes))
    assert decoded(await read_zstd(blobs, digest)) == content(size_bytes)


@pytest.mark.parametrize("came_compressed", [False, True])
async def test_a_compressed_read_may_begin_anywhere(blobs: BlobStore, came_compressed: bool) -> None:
    digest, data = blob(3 * STAGE)
    await (put_zstd(blobs, data, encoded(data)) if came_compressed else put(blobs, data))
    for offset_bytes in (0, 1, CHUNK, STAGE - 1, 2 * STAGE + 100, 3 * STAGE - 1, 3 * STAGE):
        assert decoded(await read_zstd(blobs, digest, offset_bytes)) == data[offset_bytes:]
        assert await read(blobs, digest, offset_bytes, 100) == data[offset_bytes : offset_bytes + 100]
        assert await read(blobs, digest, offset_bytes, STAGE) == data[offset_bytes : offset_bytes + STAGE]


@pytest.mark.parametrize("size_bytes", [0, 300, 3 * CHUNK])
async def test_a_compressed_read_past_the_end_is_out_of_range(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    await put_zstd(blobs, data, encoded(data))
    assert decoded(await read_zstd(blobs, digest, size_bytes)) == b""
    with pytest.raises(OutOfRangeError):
        await read_zstd(blobs, digest, size_bytes + 1)
    with pytest.raises(OutOfRangeError):
        await read(blobs, digest, size_bytes + 1)


async def test_a_blob_that_is_not_there_is_not_read_compressed(blobs: BlobStore) -> None:
    for offset_bytes in (0, 5):
        with pytest.raises(BlobNotFoundError):
            await read_zstd(blobs, Digest.of(b"not there"), offset_bytes)
    assert await blobs.read_many_as_stored([Digest.of(b"not there"), Digest.of(b"")]) == [
        None, (Compressor.IDENTITY, b"")
    ]  # fmt: skip
    assert await blobs.put_many_zstd([]) == []


# Large ones are staged while they are decoded, in one and the same way by all stores over LMDB.
@pytest.mark.parametrize(
    ("stores", "size_bytes"),
    [("memory", 300), ("lmdb", 300), ("lmdb, compressing", 300), ("sharded", 300), ("lmdb", 5 * STAGE)],
    indirect=["stores"],
)
@pytest.mark.parametrize("how", BROKEN)
async def test_what_does_not_decode_to_the_blob_is_refused_and_forgotten(
    stores: Stores, size_bytes: int, how: str
) -> None:
    digest, data = blob(size_bytes)
    store, stream = stores.blobs, BROKEN[how](data)
    (outcome,) = await store.put_many_zstd([(digest, memoryview(stream))])
    assert isinstance(outcome, DigestMismatchError if how == "another blob" else MalformedZstdError)
    with pytest.raises(type(outcome)):
        await upload_zstd(store, zstd_name(digest), stream)
    if stream:
        with pytest.raises(type(outcome)):
            await store.put_upload(zstd_name(digest, "in one piece"), memoryview(stream))
    assert missing(store, digest) == [digest]
    assert (store.status().blobs, store.status().staged_bytes) == (0, 0)
    await upload_zstd(store, zstd_name(digest), encoded(data))
    assert await read(store, digest) == data


async def test_each_compressed_blob_of_a_batch_has_an_outcome_of_its_own(blobs: BlobStore) -> None:
    data = [content(300, seed) for seed in range(3)]
    streams = [encoded(data[0]), encoded(data[1])[:-1], encoded(data[2])]
    outcomes = await blobs.put_many_zstd(
        [(Digest.of(each), memoryview(stream)) for each, stream in zip(data, streams, strict=True)]
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), MalformedZstdError, type(None)]
    assert await blobs.read_many(list(map(Digest.of, data))) == [data[0], None, data[2]]


@pytest.mark.parametrize("first_bytes", [100, 2 * STAGE])
@pytest.mark.parametrize("closes", [False, True])
async def test_a_compressed_upload_that_breaks_begins_anew(stores: Stores, first_bytes: int, closes: bool) -> None:
    digest, data = blob(6 * STAGE)
    stream, name = encoded(data), zstd_name(digest)
    for how in ("soon", "at once", "never"):
        upload = await stores.blobs.open_upload(name)
        assert upload.committed_bytes == 0
        await feed(upload, stream[:first_bytes])
        if how == "soon":
            upload.suspend_soon([memoryview(stream)[first_bytes : first_bytes + 10]], 10)
        elif how == "at once":
            assert await upload.suspend() == 0
            assert stores.blobs.status().staged_bytes == 0
        if closes:
            await stores.reopen()
        assert await stores.blobs.upload_status(name) == UploadStatus(0, False)
    await upload_zstd(stores.blobs, name, stream)
    assert await read(stores.blobs, digest) == data
    assert stores.blobs.status().staged_bytes == 0


async def test_compressed_and_plain_uploads_are_different_ones(blobs: BlobStore) -> None:
    digest, data = blob(STAGE)
    plain = await blobs.open_upload(upload_name(digest))
    await feed(plain, data[:1000])
    await plain.suspend()
    await upload_zstd(blobs, zstd_name(digest, "other"), encoded(data))
    assert await read(blobs, digest) == data
    await blobs.remove([digest])
    assert await blobs.upload_status(upload_name(digest)) == UploadStatus(1000, False)
    assert await blobs.upload_status(zstd_name(digest)) == UploadStatus(0, False)


@pytest.fixture
async def compressing(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    store = LmdbStore(tmp_path / "store", compress_stored=True)
    await store.open()
    yield store
    await store.recount()
    await store.close()


@pytest.mark.parametrize("size_bytes", [300, 3 * CHUNK, 5 * STAGE])
@pytest.mark.parametrize("way", ["batch", "upload"])
async def test_what_the_client_compressed_goes_out_unchanged(lmdb: LmdbStore, size_bytes: int, way: str) -> None:
    digest, data = blob(size_bytes)
    stream = encoded(data, 7)
    if way == "batch":
        await put_zstd(lmdb.blobs, data, stream)
    else:
        await upload_zstd(lmdb.blobs, zstd_name(digest), stream)
    assert await read_zstd(lmdb.blobs, digest) == stream
    assert await lmdb.blobs.read_many_as_stored([digest]) == [(Compressor.ZSTD, stream)]
    counters = lmdb.blobs.status().counters
    assert counters["compressed_blobs"] == 1
    assert counters["compression_saved_bytes"] > 0
    await lmdb.reopen()
    assert await read_zstd(lmdb.blobs, digest) == stream
    assert await read(lmdb.blobs, digest) == data


@pytest.mark.parametrize("size_bytes", [10, CHUNK])
@pytest.mark.parametrize("way", ["batch", "upload", "one piece"])
async def test_what_compressing_made_larger_is_stored_plain(lmdb: LmdbStore, size_bytes: int, way: str) -> None:
    data = encoded(content(3 * size_bytes))[:size_bytes]
    digest, stream = Digest.of(data), encoded(data)
    assert len(stream) >= len(data)
    if way == "batch":
        await put_zstd(lmdb.blobs, data, stream)
    elif way == "upload":
        await upload_zstd(lmdb.blobs, zstd_name(digest), stream)
    else:
        await lmdb.blobs.put_upload(zstd_name(digest), memoryview(stream))
    assert await lmdb.blobs.read_many_as_stored([digest]) == [(Compressor.IDENTITY, data)]
    assert lmdb.blobs.status().counters["compressed_blobs"] == 0


async def test_what_is_longer_than_its_blob_leaves_a_batch_decompressed(lmdb: LmdbStore) -> None:
    data = encoded(content(6 * STAGE))[: 2 * STAGE]
    digest = Digest.of(data)
    # Staged as it came, with a frame behind it that decoders skip.
    stream = encoded(data) + b"\x50\x2a\x4d\x18" + (100_000).to_bytes(4, "little") + bytes(100_000)
    assert len(stream) > len(data) == 2 * STAGE
    await upload_zstd(lmdb.blobs, zstd_name(digest), stream)
    assert await read_zstd(lmdb.blobs, digest) == stream
    assert await lmdb.blobs.read_many_as_stored([digest]) == [(Compressor.IDENTITY, data)]


async def test_a_store_compresses_what_is_worth_it(compressing: LmdbStore) -> None:
    store = compressing.blobs
    worth, small = content(10_000), content(100)
    noise = encoded(content(30_000))
    digests = await put(store, worth, small, noise)
    forms = await store.read_many_as_stored(digests)
    assert [form and form[0] for form in forms] == [Compressor.ZSTD, Compressor.IDENTITY, Compressor.IDENTITY]
    assert await store.read_many(digests) == [worth, small, noise]
    assert store.status().counters["compressed_blobs"] == 1
    plain_bytes = sum(records.blob_disk_bytes(len(data)) for data in (worth, small, noise))
    saved_bytes = store.status().counters["compression_saved_bytes"]
    assert saved_bytes > 0
    assert store.status().stored_bytes == plain_bytes - saved_bytes + 3 * records.INDEX_OVERHEAD_BYTES


@pytest.mark.parametrize("is_noise", [False, True])
async def test_the_first_mebibyte_decides_how_an_upload_is_stored(compressing: LmdbStore, is_noise: bool) -> None:
    store = compressing.blobs
    text = content(3 * STAGE)
    noise = encoded(content(4 * STAGE, 1))[: STAGE + 1]
    data = noise + text if is_noise else text + noise
    digest = Digest.of(data)
    upload = await store.open_upload(upload_name(digest))
    await feed(upload, data)
    await upload.finish()
    assert await read(store, digest) == data
    assert store.status().counters["compressed_blobs"] == (0 if is_noise else 1)


@pytest.mark.parametrize("compresses_later", [False, True])
async def test_an_upload_goes_on_as_it_was_begun_whatever_is_configured(
    compressing: LmdbStore, compresses_later: bool
) -> None:
    digest, data = blob(3 * STAGE)
    compressing.configure_compression(on=not compresses_later)
    await compressing.reopen()
    upload = await compressing.blobs.open_upload(upload_name(digest))
    await feed(upload, data[: 2 * STAGE + 5])
    assert await upload.suspend() == 2 * STAGE + 5
    compressing.configure_compression(on=compresses_later)
    await compressing.reopen()
    upload = await compressing.blobs.open_upload(upload_name(digest))
    assert upload.committed_bytes == 2 * STAGE + 5
    await feed(upload, data[2 * STAGE + 5 :])
    await upload.finish()
    assert await read(compressing.blobs, digest) == data
    assert compressing.blobs.status().counters["compressed_blobs"] == (0 if compresses_later else 1)


async def test_what_is_kept_compressed_counts_for_what_it_takes(tmp_path: Path) -> None:
    """A store takes in more than its limit of blobs, if they are compressed, and evicts by what they take."""
    store = LmdbStore(tmp_path / "store", 1_000_000)
    await store.open()
    for seed in range(60):
        data = content(40_000, seed)
        await put_zstd(store.blobs, data, encoded(data))
        assert store.blobs.status().stored_bytes <= 1_000_000
        store.now += 300
    await store.settle()
    count = await store.recount()
    assert count.totals.blob_bytes > 1_000_000
    assert 30 < count.totals.blobs < 60
    await store.close()


async def test_a_blob_beyond_the_limit_is_refused_however_small_it_comes(lmdb: LmdbStore) -> None:
    with pytest.raises(ResourceExhaustedError, match="max_size_bytes"):
        await lmdb.blobs.open_upload(zstd_name(Digest("0" * 64, 1 << 40)))


async def test_a_blob_that_is_stored_anew_while_it_is_read_goes_on(lmdb: LmdbStore) -> None:
    """What was compressed, then plain, then compressed in another way."""
    digest, data = blob(40 * STAGE)
    await put_zstd(lmdb.blobs, data, encoded(data))
    pieces = lmdb.blobs.read(digest)
    begin = await anext(pieces)
    whole = lmdb.blobs.read_zstd(digest)
    await anext(whole)
    await lmdb.settle_threads()
    await lmdb.blobs.remove([digest])
    await put(lmdb.blobs, data)
    rest = [piece async for piece in pieces]
    assert begin + b"".join(rest) == data
    with pytest.raises(UnavailableError, match="stored anew"):
        async for _ in whole:
            pass


async def test_a_plain_blob_that_is_stored_compressed_while_it_is_read_goes_on(lmdb: LmdbStore) -> None:
    digest, data = blob(10 * STAGE)
    await put(lmdb.blobs, data)
    pieces = lmdb.blobs.read(digest)
    begin = await anext(pieces)
    await lmdb.settle_threads()
    await lmdb.blobs.remove([digest])
    await put_zstd(lmdb.blobs, data, encoded(data))
    assert begin + b"".join([piece async for piece in pieces]) == data


@pytest.mark.parametrize("stores", ["lmdb", "sharded"], indirect=True)
async def test_what_a_client_compressed_is_kept_as_it_came_in_one_store_and_in_several(stores: Stores) -> None:
    blobs = stores.blobs
    contents = [content(3_000, seed) for seed in range(9)]
    # By another level than the store's own, which would not be the same stream.
    streams = [encoded(data, level=1) for data in contents]
    digests = [await put_zstd(blobs, data, stream) for data, stream in zip(contents, streams, strict=True)]
    assert await blobs.read_many_as_stored(digests) == [(Compressor.ZSTD, stream) for stream in streams]
    assert [await read_zstd(blobs, digest) for digest in digests] == streams


async def test_an_upload_that_finds_no_room_at_its_end_leaves_nothing(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, 4 * STAGE, lease_seconds=10_000)
    await store.open()
    await put(store.blobs, content(2 * STAGE))
    data = random.Random(0).randbytes(2 * STAGE)
    upload = await store.blobs.open_upload(zstd_name(Digest.of(data)))
    # The first stage finds room. That the second one does not is told at the end.
    await feed(upload, encoded(data), STAGE)
    with pytest.raises(ResourceExhaustedError):
        await upload.finish()
    assert store.blobs.status().staged_bytes == 0
    await store.recount()
    await store.close()


async def test_an_upload_whose_client_goes_away_at_its_end_leaves_nothing(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    await store.open()
    data = random.Random(0).randbytes(2 * STAGE)
    upload = await store.blobs.open_upload(zstd_name(Digest.of(data)))
    await feed(upload, encoded(data))
    finishing = asyncio.create_task(upload.finish())
    await asyncio.sleep(0)
    finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    for held in list(store.blobs.active_uploads.values()):
        await held.give_up()
    await store.settle()
    assert store.blobs.status().staged_bytes == 0
    await store.recount()
    await store.close()
