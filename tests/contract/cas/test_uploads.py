"""What every blob store does with uploads: whole or not at all, resumable, one stream at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.contract.cas.blob_making import blob, content, feed, missing, put, read, upload_name
from tests.contract.cas.conftest import Stores
from tests.contract.cas.lmdb_store import LmdbStore

from lathe_cas.blob_store import BlobStore, UnnamedUpload, UploadName, UploadStatus
from lathe_cas.stores import lmdb_upload
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut, read_chunks
from lathe_cas.stores.lmdb_committer import LmdbCommitter
from lathe_cas.stores.lmdb_operations import Nothing, StageUpload
from lathe_cas.stores.lmdb_upload import upload_key_of
from lathe_cas.stores.lmdb_writer import MAX_PENDING_BYTES
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import AbortedError, DigestMismatchError

CHUNK = 65_520
STAGE = 16 * CHUNK
SIZES = [1, CHUNK - 1, CHUNK, CHUNK + 1, STAGE - 1, STAGE, STAGE + 1, 3 * STAGE + 5]


@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize("piece_bytes", [50_000, 3_000_000])
async def test_an_upload_becomes_a_blob_when_it_is_finished(
    blobs: BlobStore, size_bytes: int, piece_bytes: int
) -> None:
    digest, data = blob(size_bytes)
    name = upload_name(digest)
    upload = await blobs.open_upload(name)
    assert upload.committed_bytes == 0
    await feed(upload, data, piece_bytes)
    assert missing(blobs, digest) == [digest]
    await upload.finish()
    assert missing(blobs, digest) == []
    assert await read(blobs, digest) == data
    assert await blobs.upload_status(name) == UploadStatus(size_bytes, True)
    assert blobs.status().staged_bytes == 0


@pytest.mark.parametrize("size_bytes", [*SIZES, 2 * CHUNK, 2 * CHUNK + 1])
async def test_an_upload_in_one_piece_becomes_a_blob(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    for upload_id in ("one", "one", "other"):
        await blobs.put_upload(UploadName("main", upload_id, digest), memoryview(data))
    assert await read(blobs, digest) == data
    assert (blobs.status().blobs, blobs.status().staged_bytes) == (1, 0)


@pytest.mark.parametrize("size_bytes", [100, 2 * CHUNK + 1])
async def test_an_upload_in_one_piece_is_verified(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    with pytest.raises(DigestMismatchError):
        await blobs.put_upload(upload_name(digest), memoryview(b"\0" * 9 + data[9:]))
    assert missing(blobs, digest) == [digest]
    assert blobs.status().staged_bytes == 0


@pytest.mark.parametrize("size_bytes", [100, 2 * CHUNK + 1])
async def test_an_upload_in_one_piece_forgets_what_had_arrived(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    name, other = upload_name(digest), upload_name(digest, "other")
    for begun in (name, other):
        upload = await blobs.open_upload(begun)
        await feed(upload, data[:50])
        await upload.suspend()
    staged_bytes = blobs.status().staged_bytes
    await blobs.put_upload(name, memoryview(data))
    assert await read(blobs, digest) == data
    assert 2 * blobs.status().staged_bytes == staged_bytes > 0


async def test_a_small_upload_is_begun_at_once(lmdb: LmdbStore) -> None:
    blobs = lmdb.blobs
    digest, data = blob(2 * CHUNK)
    stored = blobs.put_at_once(upload_name(digest), memoryview(data))
    assert stored is not None
    assert missing(blobs, digest) == [digest]
    await stored
    assert await read(blobs, digest) == data
    with pytest.raises(DigestMismatchError):
        blobs.put_at_once(upload_name(digest), memoryview(b"\0" * 9 + data[9:]))


async def test_a_large_upload_is_not_begun_at_once(lmdb: LmdbStore) -> None:
    digest, data = blob(2 * CHUNK + 1)
    assert lmdb.blobs.put_at_once(upload_name(digest), memoryview(data)) is None


class Costly(Nothing):
    """Keeps as much in memory as the writer takes."""

    cost_bytes = MAX_PENDING_BYTES


async def test_no_upload_is_begun_at_once_while_the_writer_has_much_to_do(lmdb: LmdbStore) -> None:
    waiting = lmdb.storage.writer.submit_nowait(Costly())
    digest, data = blob(100)
    assert lmdb.blobs.put_at_once(upload_name(digest), memoryview(data)) is None
    await waiting
    stored = lmdb.blobs.put_at_once(upload_name(digest), memoryview(data))
    assert stored is not None
    await stored


async def test_the_empty_blob_can_be_uploaded(blobs: BlobStore) -> None:
    upload = await blobs.open_upload(upload_name(Digest.of(b"")))
    await upload.append([], 0)
    await upload.finish()
    assert blobs.status().blobs == 0


@pytest.mark.parametrize("size_bytes", [100, 2 * STAGE + 100])
@pytest.mark.parametrize("wrong", ["a byte", "the end", "all of it"])
async def test_bytes_that_are_not_the_blob_are_refused_and_forgotten(
    blobs: BlobStore, size_bytes: int, wrong: str
) -> None:
    digest, data = blob(size_bytes)
    sent = {"a byte": b"\0" * 9 + data[9:], "the end": data[:-1], "all of it": b""}[wrong]
    name = upload_name(digest)
    upload = await blobs.open_upload(name)
    await feed(upload, sent)
    with pytest.raises(DigestMismatchError):
        await upload.finish()
    assert missing(blobs, digest) == [digest]
    assert await blobs.upload_status(name) == UploadStatus(0, False)
    assert blobs.status().staged_bytes == 0


# What is staged is looked up anew whether or not the store was closed: one part chunk and one whole one tell that.
@pytest.mark.parametrize(
    ("first_bytes", "closes"), [*((size, False) for size in SIZES), (CHUNK - 1, True), (STAGE, True)]
)
async def test_a_suspended_upload_goes_on_where_it_stopped(stores: Stores, first_bytes: int, closes: bool) -> None:
    digest, data = blob(3 * STAGE + 5)
    name = upload_name(digest)
    upload = await stores.blobs.open_upload(name)
    await feed(upload, data[:first_bytes])
    assert await upload.suspend() == first_bytes
    if closes:
        await stores.reopen()
    assert await stores.blobs.upload_status(name) == UploadStatus(first_bytes, False)
    assert missing(stores.blobs, digest) == [digest]
    upload = await stores.blobs.open_upload(name)
    assert upload.committed_bytes == first_bytes
    await feed(upload, data[first_bytes:])
    await upload.finish()
    assert await read(stores.blobs, digest) == data
    assert stores.blobs.status().staged_bytes == 0


async def test_an_upload_may_be_suspended_many_times(stores: Stores) -> None:
    digest, data = blob(3 * CHUNK)
    cuts = [0, 0, 1, 2, 100, CHUNK - 1, CHUNK, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 3 * CHUNK, 3 * CHUNK]
    for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False)):
        upload = await stores.blobs.open_upload(upload_name(digest))
        assert upload.committed_bytes == start
        await feed(upload, data[start:end], 30_000)
        assert await upload.suspend() == end
        if number % 3 == 0:
            await stores.reopen()
    upload = await stores.blobs.open_upload(upload_name(digest))
    await upload.finish()
    assert await read(stores.blobs, digest) == data


async def test_suspending_takes_in_the_last_bytes(blobs: BlobStore) -> None:
    digest, data = blob(1000)
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, data[:100])
    assert await upload.suspend([memoryview(data)[100:150], memoryview(data)[150:300]], 200) == 300
    upload = await blobs.open_upload(upload_name(digest))
    assert upload.committed_bytes == 300
    upload.suspend_soon([memoryview(data)[300:450]], 150)
    upload = await blobs.open_upload(upload_name(digest))
    assert upload.committed_bytes == 450
    await feed(upload, data[450:])
    await upload.finish()
    assert missing(blobs, digest) == []


@pytest.mark.parametrize("first_bytes", [100, STAGE + 100])
async def test_an_upload_begun_anew_forgets_what_had_arrived(blobs: BlobStore, first_bytes: int) -> None:
    digest, data = blob(2 * STAGE)
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, bytes(first_bytes))
    await upload.suspend()
    upload = await blobs.open_upload(upload_name(digest), restart=True)
    assert upload.committed_bytes == 0
    await feed(upload, data)
    await upload.finish()
    assert await read(blobs, digest) == data
    assert blobs.status().staged_bytes == 0


async def test_a_small_upload_begun_anew_forgets_what_had_arrived(blobs: BlobStore) -> None:
    digest, data = blob(100)
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, bytes(50))
    await upload.suspend()
    upload = await blobs.open_upload(upload_name(digest), restart=True)
    await feed(upload, data)
    await upload.finish()
    assert await read(blobs, digest) == data


@pytest.mark.parametrize("first_bytes", [0, 100, STAGE + 100])
async def test_an_abandoned_upload_leaves_nothing(blobs: BlobStore, first_bytes: int) -> None:
    digest, data = blob(2 * STAGE)
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, data[:50])
    await upload.suspend()
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, data[50:first_bytes])
    await upload.abandon()
    assert await blobs.upload_status(upload_name(digest)) == UploadStatus(0, False)
    assert blobs.status().staged_bytes == 0


async def test_uploads_under_other_names_are_other_uploads(blobs: BlobStore) -> None:
    digest, data = blob(1000)
    names = [
        upload_name(digest, "a", "one"),
        upload_name(digest, "a", "two"),
        upload_name(digest, "b", "one"),
        upload_name(Digest(digest.hash, 1001), "a", "one"),
    ]
    for number, name in enumerate(names, 1):
        upload = await blobs.open_upload(name)
        await feed(upload, data[: 100 * number])
        await upload.suspend()
    assert [(await blobs.upload_status(name)).committed_bytes for name in names] == [100, 200, 300, 400]
    upload = await blobs.open_upload(names[1])
    await feed(upload, data[200:])
    await upload.finish()
    assert [await blobs.upload_status(name) for name in names[:3]] == [UploadStatus(1000, True)] * 3
    assert await blobs.upload_status(names[3]) == UploadStatus(400, False)


@pytest.mark.parametrize("first_bytes", [0, 100, STAGE, STAGE + 100])
async def test_a_second_stream_takes_an_upload_over(blobs: BlobStore, first_bytes: int) -> None:
    digest, data = blob(2 * STAGE + 100)
    first = await blobs.open_upload(upload_name(digest))
    await feed(first, bytes(first_bytes))
    second = await blobs.open_upload(upload_name(digest), restart=True)
    for attempt in (feed(first, b"x"), first.finish(), first.suspend()):
        with pytest.raises(AbortedError):
            await attempt
    await feed(second, data[:-10])
    with pytest.raises(AbortedError):
        await first.append([memoryview(bytes(STAGE))], STAGE)
    await feed(second, data[-10:])
    await second.finish()
    assert await read(blobs, digest) == data
    assert blobs.status().staged_bytes == 0


async def test_abandoning_a_lost_upload_leaves_the_new_one_alone(blobs: BlobStore) -> None:
    digest, data = blob(2 * STAGE)
    first = await blobs.open_upload(upload_name(digest))
    await feed(first, data[:STAGE])
    second = await blobs.open_upload(upload_name(digest))
    done_bytes = second.committed_bytes
    await feed(second, data[done_bytes : STAGE + 100])
    await first.abandon()
    await feed(second, data[max(done_bytes, STAGE + 100) :])
    await second.finish()
    assert await read(blobs, digest) == data


async def test_a_second_stream_goes_on_with_what_the_first_one_had_durable(blobs: BlobStore) -> None:
    digest, data = blob(4 * STAGE)
    first = await blobs.open_upload(upload_name(digest))
    await feed(first, data[: 3 * STAGE])
    second = await blobs.open_upload(upload_name(digest))
    done_bytes = second.committed_bytes
    assert 0 <= done_bytes <= 3 * STAGE
    assert await blobs.upload_status(upload_name(digest)) == UploadStatus(done_bytes, False)
    await feed(second, data[done_bytes:])
    await second.finish()
    assert await read(blobs, digest) == data


async def test_streams_that_all_want_the_same_upload(blobs: BlobStore) -> None:
    """However they interleave: the last one to open holds it and finishes, the others are told."""
    digest, data = blob(2 * STAGE + 77)

    async def stream() -> str:
        upload = await blobs.open_upload(upload_name(digest))
        try:
            await feed(upload, data[upload.committed_bytes :])
            await upload.finish()
        except AbortedError:
            return "aborted"
        return "finished"

    outcomes = await asyncio.gather(*(stream() for _ in range(8)))
    assert "finished" in outcomes
    assert set(outcomes) <= {"finished", "aborted"}
    assert await read(blobs, digest) == data


async def test_a_stream_that_is_finishing_loses_its_upload_without_harm(blobs: BlobStore) -> None:
    digest, data = blob(4 * STAGE)
    first = await blobs.open_upload(upload_name(digest))
    await feed(first, data)
    finishing = asyncio.create_task(first.finish())
    await asyncio.sleep(0)
    second = await blobs.open_upload(upload_name(digest))
    (outcome,) = await asyncio.gather(finishing, return_exceptions=True)
    assert outcome is None or isinstance(outcome, AbortedError)
    if missing(blobs, digest):
        await feed(second, data[second.committed_bytes :])
        await second.finish()
    else:
        await second.abandon()
    assert await read(blobs, digest) == data


async def test_uploads_of_the_same_blob_under_other_names_all_succeed(blobs: BlobStore) -> None:
    digest, data = blob(2 * STAGE + 77)

    async def stream(upload_id: str) -> None:
        upload = await blobs.open_upload(upload_name(digest, upload_id))
        await feed(upload, data)
        await upload.finish()

    await asyncio.gather(*(stream(str(number)) for number in range(6)))
    assert await read(blobs, digest) == data
    assert blobs.status().blobs == 1
    assert blobs.status().staged_bytes == 0


async def test_an_upload_of_a_blob_that_appeared_meanwhile_is_finished_all_the_same(blobs: BlobStore) -> None:
    digest, data = blob(STAGE + 1)
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, data)
    await put(blobs, data)
    assert await blobs.upload_status(upload_name(digest)) == UploadStatus(digest.size_bytes, True)
    await upload.finish()
    assert await read(blobs, digest) == data
    assert blobs.status().staged_bytes == 0


async def test_an_upload_kept_in_the_background_can_be_resumed_at_once(blobs: BlobStore) -> None:
    digest, data = blob(2 * STAGE)
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, data[: STAGE + 100])
    upload.suspend_soon()
    upload = await blobs.open_upload(upload_name(digest))
    assert upload.committed_bytes == STAGE + 100
    await feed(upload, data[STAGE + 100 :])
    await upload.finish()
    assert await read(blobs, digest) == data


async def test_an_upload_kept_in_the_background_survives_closing(stores: Stores) -> None:
    digest, data = blob(2 * STAGE)
    upload = await stores.blobs.open_upload(upload_name(digest))
    await feed(upload, data[: STAGE + 100])
    upload.suspend_soon()
    await stores.reopen()
    assert await stores.blobs.upload_status(upload_name(digest)) == UploadStatus(STAGE + 100, False)


async def test_who_resumes_while_a_stream_of_another_process_goes_on_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LmdbStore(tmp_path)
    await store.open()
    storage = store.storage
    digest, data = blob(300_000)
    name = upload_name(digest)
    upload = await store.blobs.open_upload(name)
    await feed(upload, data[:100])
    assert await upload.suspend() == 100
    key = upload_key_of(name)
    record = lmdb_upload.find_upload(storage, key)
    assert record is not None
    chunks = cut(data[: 2 * CHUNK], chunk_seed(digest.key))
    stage = StageUpload(key, 1, record.owner, False, 0, 2 * CHUNK, 100, chunks, record.updated_at)
    other = LmdbCommitter(storage.environment, store.options.policy, Touches(storage.step), storage.seconds, 86_400)

    def read_behind_the_other(*arguments: Any) -> list[bytes]:
        assert other.commit([stage])[0].error is None
        with storage.environment.read() as txn:
            return read_chunks(txn, *arguments[1:])

    with monkeypatch.context() as patch:
        patch.setattr(lmdb_upload, "read_chunks", read_behind_the_other)
        with pytest.raises(AbortedError):
            await store.blobs.open_upload(name)
    assert await store.blobs.upload_status(name) == UploadStatus(2 * CHUNK, False)
    upload = await store.blobs.open_upload(name)
    await feed(upload, data[upload.committed_bytes :])
    await upload.finish()
    assert await read(store.blobs, digest) == data
    await store.recount()
    await store.close()


async def test_an_upload_takes_the_room_of_what_has_arrived_whatever_it_declares(tmp_path: Path) -> None:
    """Sixty-four clients that each declare a tebibyte and pause keep nobody else from writing."""
    store = LmdbStore(tmp_path, limit_bytes=2 << 40)
    await store.open()
    names = [upload_name(Digest(f"{number:064x}", 1 << 40)) for number in range(64)]
    uploads = [await store.blobs.open_upload(name) for name in names]
    for upload in uploads:
        await feed(upload, content(100))
    (other,) = await put(store.blobs, content(300_000))
    assert await read(store.blobs, other) == content(300_000)
    assert store.blobs.status().staged_bytes == 0, "the first mebibyte of an upload waits in memory"
    for upload in uploads:
        assert await upload.suspend() == 100
    assert store.blobs.status().staged_bytes < 64 * 500
    assert [await store.blobs.upload_status(name) for name in names] == [UploadStatus(100, False)] * 64
    await store.recount()
    await store.close()


async def test_staged_bytes_are_counted(blobs: BlobStore) -> None:
    digest, data = blob(2 * STAGE)
    upload = await blobs.open_upload(upload_name(digest))
    await feed(upload, data[:100_000])
    await upload.suspend()
    status = blobs.status()
    assert status.blobs == 0
    assert 50_000 <= status.staged_bytes <= status.stored_bytes


# What a function changes is the hash and the length of the key, under which all is written once more at the end.
@pytest.mark.parametrize(
    ("size_bytes", "function"),
    [
        *((size, DigestFunction.SHA256) for size in [0, *SIZES]),
        *((STAGE + 1, function) for function in DigestFunction if function is not DigestFunction.SHA256),
    ],
)
async def test_an_unnamed_upload_becomes_a_blob_when_it_is_finished(
    blobs: BlobStore, size_bytes: int, function: DigestFunction
) -> None:
    data = content(size_bytes)
    digest = Digest.of(data, function)
    for expected_hash in (None, digest.hash):
        upload = await blobs.open_unnamed_upload(function, expected_hash)
        await feed_unnamed(upload, data)
        assert await upload.finish() == digest
        assert await read(blobs, digest) == data
    assert blobs.status().blobs == min(1, size_bytes)
    assert blobs.status().staged_bytes == 0


@pytest.mark.parametrize("size_bytes", [100, 2 * STAGE + 100])
@pytest.mark.parametrize("end", ["wrong hash", "abandon", "abandon soon"])
async def test_an_unnamed_upload_that_comes_to_nothing_is_forgotten(stores: Stores, size_bytes: int, end: str) -> None:
    digest, data = blob(size_bytes)
    expected_hash = "0" * 64 if end == "wrong hash" else None
    upload = await stores.blobs.open_unnamed_upload(DigestFunction.SHA256, expected_hash)
    await feed_unnamed(upload, data)
    if end == "wrong hash":
        with pytest.raises(DigestMismatchError, match=digest.hash):
            await upload.finish()
    elif end == "abandon":
        await upload.abandon()
    else:
        upload.abandon_soon()
        await stores.reopen()
    assert missing(stores.blobs, digest) == [digest]
    assert stores.blobs.status().staged_bytes == 0


async def test_unnamed_uploads_do_not_meet(blobs: BlobStore) -> None:
    uploads = [await blobs.open_unnamed_upload(DigestFunction.SHA256) for _ in range(3)]
    contents = [content(STAGE + 7, seed) for seed in range(3)]
    for start in range(0, STAGE + 7, 200_000):
        for upload, data in zip(uploads, contents, strict=True):
            piece = memoryview(data)[start : start + 200_000]
            await upload.append([piece], len(piece))
    assert [await upload.finish() for upload in uploads] == [Digest.of(data) for data in contents]
    assert blobs.status().blobs == 3


async def feed_unnamed(upload: UnnamedUpload, data: bytes) -> None:
    for start in range(0, len(data), 100_000):
        piece = memoryview(data)[start : start + 100_000]
        await upload.append([piece], len(piece))
