"""Write streams against a blob store: what is answered, what is kept, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import zstandard
from tests.contract.cas.memory_stores import MemoryBlobStore, MemoryUpload
from typing_extensions import override

from lathe_cas.blob_store import UploadName
from lathe_cas.upload_runner import run_upload
from lathe_shared.cas_wire import write_request
from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest
from lathe_shared.errors import (
    AbortedError,
    DigestMismatchError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from lathe_shared.resource_name import format_write, parse_write

DATA = bytes(range(256)) * 2048
SIZE = len(DATA)
DIGEST = Digest.of(DATA)
NAME = UploadName("main", "upload", DIGEST)
RESOURCE = format_write(DIGEST, "upload", "main")
PIECE = 50_000


def messages(start: int = 0, end: int = SIZE, *, finish: bool = True, data: bytes = DATA) -> list[bytes]:
    """Return the messages of a stream that sends ``data[start:end]``."""
    starts = range(start, end, PIECE) or [start]
    return [
        write_request(
            RESOURCE if at == start else "", at, finish and at + PIECE >= end, data[at : min(end, at + PIECE)]
        )
        for at in starts
    ]


class Stream:
    """A stream whose end can be held back; it counts what was taken from it."""

    def __init__(self, sent: Sequence[bytes], *, stays_open: bool = False) -> None:
        self.sent = sent
        self.taken = 0
        self.at_end = asyncio.Event()
        self.may_end = asyncio.Event()
        if not stays_open:
            self.may_end.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for item in self.sent:
            await asyncio.sleep(0)
            self.taken += 1
            yield item
        self.at_end.set()
        await self.may_end.wait()


async def run(store: MemoryBlobStore, sent: Sequence[bytes] | Stream) -> int:
    stream = sent if isinstance(sent, Stream) else Stream(sent)
    return await run_upload(aiter(stream), store, parse_write)


async def test_a_whole_stream_becomes_a_blob() -> None:
    store = MemoryBlobStore()
    assert await run(store, messages()) == SIZE
    assert store.whole(DIGEST) == DATA
    assert not store.held


async def test_a_finished_stream_is_not_read_on() -> None:
    """The client need not close its side before it gets an answer."""
    store = MemoryBlobStore()
    assert await run(store, Stream(messages(), stays_open=True)) == SIZE


async def test_a_blob_that_is_there_is_answered_at_the_first_message() -> None:
    store = MemoryBlobStore()
    store.put(DIGEST, DATA)
    stream = Stream(messages(), stays_open=True)
    assert await run(store, stream) == SIZE
    assert stream.taken == 1


async def test_the_empty_blob_is_always_there() -> None:
    empty = write_request(format_write(Digest.of(b""), "upload"), 0, True, b"")
    assert await run(MemoryBlobStore(), [empty]) == 0


async def test_a_blob_that_appears_meanwhile_ends_the_stream() -> None:
    store = MemoryBlobStore()

    class Appearing(Stream):
        @override
        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for item in super().__aiter__():
                if self.taken == 5:
                    store.put(DIGEST, DATA)
                yield item

    stream = Appearing(messages())
    assert await run(store, stream) == SIZE
    assert 5 <= stream.taken < len(stream.sent)
    assert not store.held
    assert not store.staged


@pytest.mark.parametrize("kept_bytes", [0, 10, PIECE, 3 * PIECE + 1, SIZE])
async def test_a_stream_that_ends_early_is_kept_and_resumed(kept_bytes: int) -> None:
    store = MemoryBlobStore()
    assert await run(store, messages(0, kept_bytes, finish=False)) == kept_bytes
    assert store.staged[NAME] == DATA[:kept_bytes]
    assert await store.upload_status(NAME) == (kept_bytes, False)
    assert await run(store, messages(kept_bytes)) == SIZE
    assert store.whole(DIGEST) == DATA
    assert not store.staged


async def test_a_stream_from_the_first_byte_forgets_what_was_kept() -> None:
    store = MemoryBlobStore()
    store.staged[NAME] = b"wrong"
    assert await run(store, messages()) == SIZE
    assert store.whole(DIGEST) == DATA


async def test_a_gap_leaves_what_was_kept() -> None:
    store = MemoryBlobStore()
    store.staged[NAME] = DATA[:100]
    with pytest.raises(InvalidArgumentError, match="gap"):
        await run(store, messages(200))
    assert store.staged[NAME] == DATA[:100]
    assert not store.held


@pytest.mark.parametrize(
    "last",
    [
        write_request("", 7, False, b"at the wrong place"),
        write_request("another/name", 3 * PIECE, False, b"x"),
        b"\xff\xff not a message",
    ],
)
async def test_a_broken_rule_leaves_what_came_before(last: bytes) -> None:
    store = MemoryBlobStore()
    with pytest.raises(InvalidArgumentError):
        await run(store, [*messages(0, 3 * PIECE, finish=False), last])
    assert store.staged[NAME] == DATA[: 3 * PIECE]
    assert not store.held


@pytest.mark.parametrize(
    "last", [write_request("", 3 * PIECE, False, bytes(SIZE)), write_request("", 3 * PIECE, True, b"early")]
)
async def test_a_spoilt_upload_is_forgotten(last: bytes) -> None:
    store = MemoryBlobStore()
    store.staged[NAME] = DATA[:100]
    with pytest.raises(InvalidArgumentError):
        await run(
            store, [*messages(100, 100 + PIECE, finish=False), *messages(100 + PIECE, 3 * PIECE, finish=False), last]
        )
    assert not store.staged
    assert not store.held


async def test_wrong_bytes_are_refused_and_forgotten() -> None:
    store = MemoryBlobStore()
    with pytest.raises(DigestMismatchError):
        await run(store, messages(data=bytes(SIZE)))
    assert store.whole(DIGEST) is None
    assert not store.staged
    assert not store.held


@pytest.mark.parametrize("first", [write_request("", 0, True, DATA), b"\xff\xff not a message"])
async def test_a_first_message_that_is_wrong_touches_nothing(first: bytes) -> None:
    store = MemoryBlobStore()
    with pytest.raises(InvalidArgumentError):
        await run(store, [first])
    assert not store.held
    assert not store.staged


async def test_a_stream_without_messages_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="first message"):
        await run(MemoryBlobStore(), [])


async def test_a_blob_that_is_too_large_is_refused() -> None:
    store = MemoryBlobStore(limit_bytes=SIZE - 1)
    with pytest.raises(ResourceExhaustedError):
        await run(store, messages())
    assert not store.held


@pytest.mark.parametrize("kept_bytes", [10, PIECE, 5 * PIECE])
async def test_cancellation_keeps_what_arrived(kept_bytes: int) -> None:
    store = MemoryBlobStore()
    stream = Stream(messages(0, kept_bytes, finish=False), stays_open=True)
    task = asyncio.create_task(run(store, stream))
    await stream.at_end.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.staged[NAME] == DATA[:kept_bytes]
    assert await run(store, messages(kept_bytes)) == SIZE


@pytest.mark.parametrize("kept_bytes", [10, 3 * PIECE + 1])
async def test_a_client_that_sends_nothing_for_long_is_not_waited_for(kept_bytes: int) -> None:
    class AtHand(Stream):
        @override
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for item in self.sent:
                yield item
            await self.may_end.wait()

    store = MemoryBlobStore()
    stream = AtHand(messages(0, kept_bytes, finish=False), stays_open=True)
    with pytest.raises(UnavailableError, match="no message came for 0 seconds"):
        await run_upload(aiter(stream), store, parse_write, idle_seconds=0)
    assert store.staged[NAME] == DATA[:kept_bytes]
    assert not store.held
    assert await run(store, messages(kept_bytes)) == SIZE
    assert store.whole(DIGEST) == DATA


async def test_a_client_that_names_nothing_for_long_is_not_waited_for() -> None:
    with pytest.raises(UnavailableError, match="no message came"):
        await run_upload(aiter(Stream([], stays_open=True)), MemoryBlobStore(), parse_write, idle_seconds=0)


async def test_a_stream_that_breaks_keeps_what_arrived() -> None:
    store = MemoryBlobStore()

    async def breaking() -> AsyncIterator[bytes]:
        for item in messages(0, 3 * PIECE, finish=False):
            yield item
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await run_upload(breaking(), store, parse_write)
    assert store.staged[NAME] == DATA[: 3 * PIECE]


async def test_a_second_stream_takes_the_upload_over() -> None:
    store = MemoryBlobStore()
    first = Stream(messages(0, 5 * PIECE, finish=False), stays_open=True)
    task = asyncio.create_task(run(store, first))
    await first.at_end.wait()
    assert await run(store, messages(finish=False)) == SIZE
    first.may_end.set()
    with pytest.raises(AbortedError):
        await task
    assert store.staged[NAME] == DATA, "what the second one kept is untouched"


async def test_an_error_of_the_store_is_what_the_client_sees() -> None:
    """Even if the attempt to keep what arrived fails, too."""

    class Full(MemoryUpload):
        @override
        async def append(self, pieces: Sequence[memoryview], length: int) -> None:
            raise ResourceExhaustedError("full")

        @override
        async def suspend(self, pieces: Sequence[memoryview] = (), length: int = 0) -> int:
            raise AbortedError("cannot suspend either")

    class FullStore(MemoryBlobStore):
        @override
        async def open_upload(self, name: UploadName, *, restart: bool = False) -> MemoryUpload:
            return Full(self, name, b"")

    with pytest.raises(ResourceExhaustedError, match="full"):
        await run(FullStore(), messages())


async def test_tiny_messages_reach_the_store_joined() -> None:
    appended: list[int] = []

    class Counting(MemoryUpload):
        @override
        async def append(self, pieces: Sequence[memoryview], length: int) -> None:
            appended.append(len(pieces))
            await super().append(pieces, length)

    class CountingStore(MemoryBlobStore):
        @override
        async def open_upload(self, name: UploadName, *, restart: bool = False) -> MemoryUpload:
            self.held[name] = upload = Counting(self, name, b"")
            return upload

    store = CountingStore()
    data = DATA[:2000]
    name = format_write(Digest.of(data), "upload")
    sent = [write_request(name if not at else "", at, at == 1999, data[at : at + 1]) for at in range(2000)]
    assert await run(store, sent) == 2000
    assert store.whole(Digest.of(data)) == data
    assert appended == [1] * 8


ZSTD_RESOURCE = format_write(DIGEST, "upload", "main", Compressor.ZSTD)


def zstd_messages(stream: bytes) -> list[bytes]:
    return [
        write_request(ZSTD_RESOURCE if not at else "", at, at + 100 >= len(stream), stream[at : at + 100])
        for at in range(0, len(stream), 100)
    ]


async def test_a_compressed_upload_commits_what_was_sent() -> None:
    store = MemoryBlobStore()
    stream = zstandard.compress(DATA)
    assert await run(store, zstd_messages(stream)) == len(stream)
    assert await store.read_many([DIGEST]) == [DATA]


@pytest.mark.parametrize("in_one_message", [False, True])
async def test_a_compressed_upload_of_a_blob_that_is_there_says_so(in_one_message: bool) -> None:
    store = MemoryBlobStore()
    assert store.put(DIGEST, DATA) is None
    stream = zstandard.compress(DATA)
    one = [write_request(ZSTD_RESOURCE, 0, True, stream)]
    assert await run(store, one if in_one_message else zstd_messages(stream)) == -1


@pytest.mark.parametrize("in_one_message", [False, True])
async def test_a_compressed_upload_that_cannot_be_decoded_leaves_nothing(in_one_message: bool) -> None:
    store = MemoryBlobStore()
    stream = zstandard.compress(DATA)[:-1]
    one = [write_request(ZSTD_RESOURCE, 0, True, stream)]
    with pytest.raises(InvalidArgumentError, match="middle of a frame"):
        await run(store, one if in_one_message else zstd_messages(stream))
    assert await store.read_many([DIGEST]) == [None]
    assert not store.staged
    assert not store.held
