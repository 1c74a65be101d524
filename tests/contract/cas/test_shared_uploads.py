"""Several streams that bring one blob at the same time: staged once, and none is at another's mercy."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.contract.cas.blob_making import blob, feed, missing, put, read, upload_name
from tests.contract.cas.lmdb_store import LmdbStore
from typing_extensions import override

from lathe_cas.blob_store import Upload, UploadName, UploadStatus
from lathe_cas.stores import lmdb_shared_upload
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_operations import Nothing, Operation
from lathe_cas.stores.lmdb_shared_upload import REMEMBERED_SECONDS, SharedUpload
from lathe_cas.stores.lmdb_upload import STAGE_BYTES as STAGE
from lathe_cas.stores.lmdb_upload import upload_key_of
from lathe_cas.upload_runner import run_upload
from lathe_shared.cas_wire import write_request
from lathe_shared.errors import (
    AbortedError,
    DigestMismatchError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from lathe_shared.resource_name import format_write, parse_write

DIGEST, DATA = blob(4 * STAGE + 777)
SIZE = len(DATA)
X, Y, Z = (upload_name(DIGEST, upload_id) for upload_id in "xyz")


@pytest.fixture(params=["plain", "compressing"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LmdbStore]:
    """A store, recounted at the end of each test."""
    store = LmdbStore(tmp_path / "store", compress_stored=request.param == "compressing")
    await store.open()
    yield store
    await store.recount()
    await store.close()


async def begin(store: LmdbStore, *names: UploadName) -> list[Upload]:
    return [await store.blobs.open_upload(name, restart=True) for name in names]


async def staged_bytes(store: LmdbStore) -> int:
    """Bytes that are staged, when all is that can be."""
    for upload in list(store.blobs.active_uploads.values()):
        await upload._settle_hashing()
    await store.storage.writer.submit(Nothing())
    return store.blobs.status().staged_bytes


async def abort(upload: Upload) -> None:
    """Do what a stream does that is told to try again."""
    with pytest.raises(AbortedError):
        await feed(upload, bytes(100))
    with pytest.raises(AbortedError):
        await upload.suspend()


async def test_what_several_bring_is_staged_once(store: LmdbStore) -> None:
    uploads = await begin(store, *(upload_name(DIGEST, str(number)) for number in range(5)))
    for start in range(0, 3 * STAGE, 100_000):
        for upload in uploads:
            await feed(upload, DATA[start : start + 100_000])
    assert 0 < await staged_bytes(store) < 4 * STAGE
    for upload in uploads:
        await feed(upload, DATA[-(-3 * STAGE // 100_000) * 100_000 :])
        await upload.finish()
    assert await read(store.blobs, DIGEST) == DATA
    status = store.blobs.status()
    assert (status.blobs, status.staged_bytes, status.counters["written_blobs"]) == (1, 0, 1)


async def test_the_end_of_the_fastest_is_the_end_for_all(store: LmdbStore) -> None:
    slow, fast, idle = await begin(store, X, Y, Z)
    await feed(slow, DATA[:STAGE])
    await feed(fast, DATA)
    await fast.finish()
    assert await read(store.blobs, DIGEST) == DATA
    assert await store.blobs.upload_status(X) == UploadStatus(SIZE, True)
    assert await slow.suspend([memoryview(DATA)[STAGE : STAGE + 5]], 5) == SIZE
    await feed(idle, DATA)
    await idle.finish()
    assert store.blobs.status().staged_bytes == 0


async def test_a_stream_that_is_behind_keeps_nothing(store: LmdbStore) -> None:
    slow, fast = await begin(store, X, Y)
    await feed(fast, DATA[: STAGE // 2])
    sent = bytearray(STAGE // 2)
    view = memoryview(sent)
    await slow.append([view], len(sent))
    view.release()
    sent.clear()  # which is an error while anybody has a view of it
    await feed(slow, DATA[STAGE // 2 :])
    await slow.finish()
    assert await read(store.blobs, DIGEST) == DATA


LEAVING = [
    "suspend",
    "suspend soon",
    "abandon",
    "too many bytes",
    "too few bytes",
    "cancelled",
    "cancelled in its turn",
]


async def leave(upload: Upload, how: str) -> None:
    """End a stream in the middle of an upload."""
    if how == "suspend":
        await upload.suspend()
    elif how == "suspend soon":
        upload.suspend_soon()
        await asyncio.sleep(0)
    elif how == "abandon":
        await upload.abandon()
    elif how == "too many bytes":
        with pytest.raises(InvalidArgumentError):
            await feed(upload, bytes(SIZE), SIZE)
        await upload.abandon()
    elif how == "too few bytes":
        with pytest.raises(DigestMismatchError):
            await upload.finish()
    else:
        appending = asyncio.create_task(feed(upload, DATA[2 * STAGE : 3 * STAGE], STAGE))
        if how == "cancelled in its turn":
            await asyncio.sleep(0)
        appending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await appending
        upload.suspend_soon()


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("which", ["the first", "another"])
async def test_one_that_leaves_does_not_disturb_the_others(store: LmdbStore, how: str, which: str) -> None:
    first, second, third = await begin(store, X, Y, Z)
    leaving, staying = (first, second) if which == "the first" else (second, first)
    await feed(leaving, DATA[: 2 * STAGE])
    await feed(staying, DATA[:STAGE])
    await leave(leaving, how)
    # What it brought is there: other bytes in its place make no difference.
    await feed(staying, bytes(STAGE) + DATA[2 * STAGE : 3 * STAGE])
    await feed(third, bytes(3 * STAGE) + DATA[3 * STAGE :])
    await third.finish()
    await feed(staying, DATA[3 * STAGE :])
    await staying.finish()
    assert await read(store.blobs, DIGEST) == DATA
    assert store.blobs.status().staged_bytes == 0


async def test_one_that_is_cancelled_while_it_waits_for_another_brings_nothing(store: LmdbStore) -> None:
    first, second = await begin(store, X, Y)
    piece = memoryview(DATA)
    writing = asyncio.create_task(first.append([piece[: 2 * STAGE]], 2 * STAGE))
    waiting = asyncio.create_task(second.append([piece[: 3 * STAGE]], 3 * STAGE))
    await asyncio.sleep(0)
    writing.cancel()
    waiting.cancel()
    await asyncio.gather(writing, waiting, return_exceptions=True)
    assert await second.suspend() in (0, SIZE)
    await feed(first, DATA[2 * STAGE :])
    await first.finish()
    assert await read(store.blobs, DIGEST) == DATA


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("last", [X, Y])
async def test_what_is_staged_when_the_last_one_leaves_can_be_resumed(
    store: LmdbStore, closes: bool, last: UploadName
) -> None:
    uploads = dict(zip((X, Y, Z), await begin(store, X, Y, Z), strict=True))
    await feed(uploads[Y], DATA[: 2 * STAGE + 5])
    await feed(uploads[X], DATA[:STAGE])
    kept = {name: await upload.suspend() for name, upload in uploads.items() if name != last}
    kept[last] = await uploads[last].suspend()
    if closes:
        await store.reopen()
    told = {name: (await store.blobs.upload_status(name)).committed_bytes for name in (X, Y, Z)}
    assert told == {X: 2 * STAGE + 5, Y: 0, Z: 0}, "it is staged under the name that was first"
    assert all(kept[name] <= told[name] for name in kept)
    for name, committed_bytes in told.items():
        upload = await store.blobs.open_upload(name, restart=not committed_bytes)
        assert upload.committed_bytes == committed_bytes
        await feed(upload, DATA[committed_bytes : 3 * STAGE])
        uploads[name] = upload
    for upload in uploads.values():
        await feed(upload, DATA[3 * STAGE :])
        await upload.finish()
    assert await read(store.blobs, DIGEST) == DATA
    assert store.blobs.status().staged_bytes == 0


async def test_who_was_told_an_offset_can_go_on_there_while_others_do(store: LmdbStore) -> None:
    first, second = await begin(store, X, Y)
    await feed(first, DATA[: STAGE + 100_000])
    first_kept = await first.suspend()
    assert first_kept <= STAGE
    await feed(second, DATA[: 2 * STAGE])
    await staged_bytes(store)
    told = (await store.blobs.upload_status(X)).committed_bytes
    assert told >= STAGE
    first = await store.blobs.open_upload(X)
    assert first_kept <= first.committed_bytes == told
    await feed(first, DATA[told:])
    await first.finish()
    await second.finish() if second.committed_bytes else await second.abandon()
    assert await read(store.blobs, DIGEST) == DATA
    assert store.blobs.status().staged_bytes == 0


async def test_a_lie_is_found_out_and_honest_ones_succeed_alone(store: LmdbStore) -> None:
    liar, honest, slow = await begin(store, X, Y, Z)
    await feed(liar, bytes(STAGE) + DATA[STAGE : 2 * STAGE])
    await feed(slow, DATA[:STAGE])
    await feed(honest, DATA)
    with pytest.raises(AbortedError, match="together"):
        await honest.finish()
    await abort(liar)
    await abort(slow)
    assert missing(store.blobs, DIGEST) == [DIGEST]
    assert store.blobs.status().staged_bytes == 0
    assert [await store.blobs.upload_status(name) for name in (X, Y, Z)] == [UploadStatus(0, False)] * 3
    # Each for itself now, however they interleave.
    liar, honest, slow = await begin(store, X, Y, Z)
    await feed(liar, bytes(STAGE) + DATA[STAGE:])
    await feed(slow, DATA[: 2 * STAGE])
    await feed(honest, DATA[: 2 * STAGE])
    assert await staged_bytes(store) > (3 if store.options.compress_stored else 6) * STAGE
    with pytest.raises(DigestMismatchError):
        await liar.finish()
    await feed(honest, DATA[2 * STAGE :])
    await honest.finish()
    await feed(slow, DATA[2 * STAGE :])
    await slow.finish()
    assert await read(store.blobs, DIGEST) == DATA
    assert store.blobs.status().staged_bytes == 0


async def test_after_a_while_what_was_spoilt_is_shared_again(store: LmdbStore) -> None:
    for seconds, is_shared in ((0, False), (REMEMBERED_SECONDS - 1, False), (REMEMBERED_SECONDS, True)):
        liar, honest = await begin(store, X, Y)
        await feed(liar, bytes(STAGE))
        await feed(honest, DATA)
        with pytest.raises(AbortedError):
            await honest.finish()
        await abort(liar)
        store.now += seconds
        first, second = await begin(store, X, Y)
        await feed(first, DATA[:STAGE])
        await feed(second, bytes(STAGE) + DATA[STAGE:])
        if is_shared:
            await second.finish()
            assert await store.blobs.remove([DIGEST]) == 1
        else:
            with pytest.raises(DigestMismatchError):
                await second.finish()
        await first.abandon()
        store.now += REMEMBERED_SECONDS


async def test_only_so_much_is_remembered(store: LmdbStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_shared_upload, "MAX_REMEMBERED", 2)
    blobs = [blob(STAGE, seed) for seed in range(3)]
    for digest, data in blobs:
        liar, honest = await begin(store, upload_name(digest, "x"), upload_name(digest, "y"))
        await feed(liar, bytes(100))
        await feed(honest, data)
        with pytest.raises(AbortedError):
            await honest.finish()
        await abort(liar)
    for number, (digest, data) in enumerate(blobs):
        first, second = await begin(store, upload_name(digest, "x"), upload_name(digest, "y"))
        await feed(first, data[:100])
        await feed(second, bytes(100) + data[100:])
        if number == 0:
            await second.finish()
        else:
            with pytest.raises(DigestMismatchError):
                await second.finish()
        await first.abandon()


async def test_who_brought_everything_is_shown_to_be_wrong(store: LmdbStore) -> None:
    liar, honest = await begin(store, X, Y)
    await feed(liar, DATA[:-1] + b"?")
    await feed(honest, DATA[:STAGE])
    with pytest.raises(DigestMismatchError):
        await liar.finish()
    await abort(honest)
    assert store.blobs.status().staged_bytes == 0


async def test_what_others_spoilt_before_is_not_laid_to_who_resumes(store: LmdbStore) -> None:
    honest, liar = await begin(store, X, Y)
    await feed(liar, bytes(2 * STAGE))
    await feed(honest, DATA[:STAGE])
    await liar.suspend()
    assert await honest.suspend() == 2 * STAGE
    honest = await store.blobs.open_upload(X)
    await feed(honest, DATA[honest.committed_bytes :])
    with pytest.raises(AbortedError, match="together"):
        await honest.finish()
    (honest,) = await begin(store, X)
    await feed(honest, DATA)
    await honest.finish()
    assert await read(store.blobs, DIGEST) == DATA


async def test_who_resumes_what_only_he_brought_is_shown_to_be_wrong(store: LmdbStore) -> None:
    (liar,) = await begin(store, X)
    await feed(liar, DATA[: 2 * STAGE])
    await liar.suspend()
    liar = await store.blobs.open_upload(X)
    await feed(liar, bytes(SIZE - 2 * STAGE))
    with pytest.raises(DigestMismatchError):
        await liar.finish()


@pytest.mark.parametrize("why", ["a lie", "no room"])
async def test_who_was_told_what_others_lost_begins_again(tmp_path: Path, why: str) -> None:
    store = LmdbStore(tmp_path, 5 * STAGE)
    await store.open()
    away, other = await begin(store, X, Y)
    await feed(away, DATA[: 2 * STAGE])
    await staged_bytes(store)
    told = await away.suspend()
    assert told > 0
    if why == "a lie":
        await feed(other, DATA[:-1] + b"?")
        with pytest.raises(AbortedError):
            await other.finish()
    else:
        in_the_way = await store.blobs.open_upload(upload_name(blob(2 * STAGE, 1)[0]))
        await feed(in_the_way, blob(2 * STAGE, 1)[1])
        with pytest.raises(ResourceExhaustedError):
            await feed_and_finish(other, DATA)
        await in_the_way.abandon()
    assert store.blobs.status().staged_bytes == 0
    with pytest.raises(AbortedError, match="begin it again"):
        await store.blobs.open_upload(X)
    (away,) = await begin(store, X)
    await feed_and_finish(away, DATA)
    assert await read(store.blobs, DIGEST) == DATA
    await store.recount()
    await store.close()


async def feed_and_finish(upload: Upload, data: bytes) -> None:
    await feed(upload, data)
    await upload.finish()


async def test_all_are_told_when_no_room_is_left_and_nothing_stays(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, 5 * STAGE)
    await store.open()
    in_the_way = await store.blobs.open_upload(upload_name(blob(2 * STAGE, 1)[0]))
    await feed(in_the_way, blob(2 * STAGE, 1)[1])
    await in_the_way.suspend()
    kept_bytes = store.blobs.status().staged_bytes
    uploads = await begin(store, X, Y, Z)
    with pytest.raises(ResourceExhaustedError):
        await feed_and_finish(uploads[0], DATA)
    assert store.blobs.status().staged_bytes == kept_bytes, "at once, before the others bring anything"
    for upload in uploads[1:]:
        with pytest.raises(ResourceExhaustedError):
            await feed(upload, DATA[:10])
        await upload.abandon()
    in_the_way = await store.blobs.open_upload(upload_name(blob(2 * STAGE, 1)[0]), restart=True)
    await in_the_way.abandon()
    for upload in await begin(store, X, Y, Z):
        await feed_and_finish(upload, DATA)
    assert await read(store.blobs, DIGEST) == DATA
    await store.recount()
    await store.close()


async def test_a_client_that_begins_its_upload_again_disturbs_nobody(store: LmdbStore) -> None:
    first, second = await begin(store, X, Y)
    await feed(first, DATA[: 2 * STAGE])
    await feed(second, DATA[:STAGE])
    (again,) = await begin(store, X)
    assert again.committed_bytes == 0
    await abort(first)
    await first.abandon()
    await feed(second, bytes(STAGE) + DATA[2 * STAGE : 3 * STAGE])
    await feed(again, bytes(3 * STAGE) + DATA[3 * STAGE :])
    await again.finish()
    await feed(second, DATA[3 * STAGE :])
    await second.finish()
    assert await read(store.blobs, DIGEST) == DATA
    assert store.blobs.status().staged_bytes == 0


@pytest.mark.parametrize("end", ["finish", "abandon"])
async def test_what_was_staged_under_an_own_name_goes_with_the_end(store: LmdbStore, end: str) -> None:
    (upload,) = await begin(store, Y)
    await feed(upload, DATA[:STAGE])
    assert await upload.suspend() == STAGE
    (first,) = await begin(store, X)
    await feed(first, DATA[: 2 * STAGE])
    upload = await store.blobs.open_upload(Y)
    assert upload.committed_bytes == STAGE
    await feed(upload, bytes(STAGE) + DATA[2 * STAGE : 3 * STAGE])
    assert await store.blobs.upload_status(Y) == UploadStatus(STAGE, False)
    await feed(first, DATA[2 * STAGE :])
    await first.finish()
    if end == "finish":
        await feed(upload, DATA[3 * STAGE :])
        await upload.finish()
    else:
        await upload.abandon()
    assert store.blobs.status().staged_bytes == 0


async def test_one_that_begins_again_and_joins_others_forgets_what_it_had(store: LmdbStore) -> None:
    (upload,) = await begin(store, Y)
    await feed(upload, bytes(STAGE))
    await upload.suspend()
    (first,) = await begin(store, X)
    (upload,) = await begin(store, Y)
    assert await store.blobs.upload_status(Y) == UploadStatus(0, False)
    await feed(upload, DATA)
    await upload.finish()
    await first.abandon()
    assert store.blobs.status().staged_bytes == 0


async def test_who_begins_again_is_told_so_at_once(store: LmdbStore) -> None:
    (upload,) = await begin(store, X)
    await feed(upload, DATA[:STAGE])
    await upload.suspend()
    (upload,) = await begin(store, X)
    assert await store.blobs.upload_status(X) == UploadStatus(0, False)
    await feed_and_finish(upload, DATA)


async def test_one_that_resumes_ahead_of_the_others_goes_on_alone(store: LmdbStore) -> None:
    (ahead,) = await begin(store, Y)
    await feed(ahead, DATA[: 2 * STAGE])
    await ahead.suspend()
    (first,) = await begin(store, X)
    await feed(first, DATA[:STAGE])
    ahead = await store.blobs.open_upload(Y)
    assert ahead.committed_bytes == 2 * STAGE
    await feed(ahead, DATA[2 * STAGE :])
    await ahead.finish()
    await feed(first, DATA[STAGE:])
    await first.finish()
    assert await read(store.blobs, DIGEST) == DATA
    assert store.blobs.status().staged_bytes == 0


async def test_the_client_that_finishes_may_be_cancelled(store: LmdbStore) -> None:
    slow, fast = await begin(store, X, Y)
    await feed(fast, DATA)
    finishing = asyncio.create_task(fast.finish())
    await asyncio.sleep(0)
    finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    await feed(slow, DATA)
    await slow.finish()
    assert await read(store.blobs, DIGEST) == DATA


async def test_a_blob_that_is_gone_again_is_not_said_to_be_there(store: LmdbStore) -> None:
    slow, fast = await begin(store, X, Y)
    await feed_and_finish(fast, DATA)
    assert await store.blobs.remove([DIGEST]) == 1
    with pytest.raises(AbortedError, match="gone again"):
        await feed_and_finish(slow, DATA)


async def test_a_blob_that_comes_by_another_way_ends_what_was_shared(store: LmdbStore) -> None:
    first, second, third = await begin(store, X, Y, Z)
    await feed(first, DATA[: 2 * STAGE])
    await first.suspend()
    await put(store.blobs, DATA)
    await second.abandon()
    await feed(third, DATA[:100])
    await third.abandon()
    assert store.blobs.status().staged_bytes == 0


async def test_one_that_only_broke_the_rules_leaves_another_client_its_own(store: LmdbStore) -> None:
    first, second = await begin(store, X, Y)
    await feed(first, DATA[: 2 * STAGE])
    await staged_bytes(store)
    told = await first.suspend()
    await second.abandon()
    assert (await store.blobs.upload_status(X)).committed_bytes >= told > 0
    first = await store.blobs.open_upload(X)
    await feed_and_finish(first, DATA[first.committed_bytes :])
    assert await read(store.blobs, DIGEST) == DATA


async def test_closing_takes_the_upload_from_all_and_keeps_what_they_brought(store: LmdbStore) -> None:
    uploads = await begin(store, X, Y, Z)
    for upload in uploads:
        await feed(upload, DATA[: STAGE + 7])
    await store.reopen()
    for upload in uploads:
        await abort(upload)
    assert await store.blobs.upload_status(X) == UploadStatus(STAGE + 7, False)
    upload = await store.blobs.open_upload(X)
    await feed_and_finish(upload, DATA[STAGE + 7 :])
    assert await read(store.blobs, DIGEST) == DATA


class TakenOver(Operation[None]):
    """An upload gets another owner, as when a stream of another process goes on with it."""

    def __init__(self, name: UploadName) -> None:
        self.key = upload_key_of(name)

    @override
    def apply(self, batch: WriteBatch) -> None:
        record = batch.upload(self.key)
        assert record is not None
        batch.put_upload(self.key, record, record._replace(owner=record.owner ^ 1))


async def test_another_process_that_takes_the_upload_over_has_it(store: LmdbStore) -> None:
    first, second = await begin(store, X, Y)
    await feed(first, DATA[: 2 * STAGE])
    await staged_bytes(store)
    await store.storage.writer.submit(TakenOver(X))
    with pytest.raises(AbortedError, match="another stream"):
        await feed_and_finish(second, DATA)
    await abort(first)
    assert (await store.blobs.upload_status(X)).committed_bytes >= STAGE, "what the other one goes on with"
    again = await store.blobs.open_upload(Y, restart=True)
    await feed_and_finish(again, DATA)
    assert await read(store.blobs, DIGEST) == DATA


async def test_small_uploads_are_not_shared_as_they_are_not_staged(store: LmdbStore) -> None:
    digest, _ = blob(STAGE - 1)
    assert not isinstance(await store.blobs.open_upload(upload_name(digest)), SharedUpload)
    assert isinstance(await store.blobs.open_upload(upload_name(blob(STAGE)[0])), SharedUpload)


async def write(store: LmdbStore, name: UploadName, data: bytes, rng: random.Random) -> int:
    """Send a stream with pauses, resuming it where it stopped, until it is through."""
    blobs = store.blobs
    while True:
        # What is answered while an earlier stream of the same client is being dealt with is old a moment later.
        holder = blobs._shared_uploads._holders.get(name)
        if holder is not None and holder._ending is not None:
            await asyncio.wait([holder._ending])
        await store.storage.writer.submit(Nothing())
        status = await blobs.upload_status(name)
        start = status.committed_bytes if not status.complete else 0
        stops_at = rng.choice([len(data), len(data), rng.randrange(start, len(data) + 1)])
        sending = asyncio.create_task(run_upload(sent(name, data, start, stops_at, rng), blobs, parse_write))
        if rng.random() < 0.3:
            for _ in range(rng.randrange(200)):
                await asyncio.sleep(0)
            sending.cancel()
        try:
            committed_bytes = await sending
        except (AbortedError, asyncio.CancelledError):
            continue
        if committed_bytes == len(data) and not missing(blobs, name.digest):
            return committed_bytes


async def sent(name: UploadName, data: bytes, start: int, end: int, rng: random.Random) -> AsyncIterator[bytes]:
    resource = format_write(name.digest, name.upload_id, name.instance_name)
    while True:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        stop = min(end, start + rng.choice([1_000, 50_000, 300_000]))
        yield write_request(resource, start, stop == len(data), data[start:stop])
        start = stop
        if start == end:
            return


@pytest.mark.parametrize("seed", range(8))
async def test_clients_that_come_and_go_all_succeed(store: LmdbStore, seed: int) -> None:
    rng = random.Random(seed)
    names = [upload_name(DIGEST, str(number)) for number in range(12)]
    answers = await asyncio.gather(*(write(store, name, DATA, rng) for name in names))
    assert answers == [SIZE] * len(names)
    assert await read(store.blobs, DIGEST) == DATA
    assert store.blobs.status().blobs == 1


@pytest.mark.parametrize("seed", range(4))
async def test_honest_clients_succeed_among_liars(store: LmdbStore, seed: int) -> None:
    rng = random.Random(seed)

    async def lie(number: int) -> None:
        at = rng.randrange(SIZE)
        lie = DATA[:at] + bytes((DATA[at] ^ 1,)) + DATA[at + 1 :]
        name = upload_name(DIGEST, f"liar {number}")
        for _ in range(3):
            with contextlib.suppress(AbortedError, DigestMismatchError):
                await run_upload(sent(name, lie, 0, SIZE, rng), store.blobs, parse_write)

    honest = (write(store, upload_name(DIGEST, str(number)), DATA, rng) for number in range(6))
    await asyncio.gather(*honest, *(lie(number) for number in range(3)))
    assert await read(store.blobs, DIGEST) == DATA
