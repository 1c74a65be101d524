"""Methods with a function beside their handler, frame by frame: who answers, and what is written."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from typing import Any

import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from tests.unit.shared.http2.memory_transport import MemoryTransport
from tests.unit.shared.http2.raw_frames import Sent, parse

from lathe_shared.grpclib_transport import RawCodec
from lathe_shared.http2 import frames
from lathe_shared.http2.at_once_calls import MAX_REQUEST_BYTES, AtOnceFunction, PendingAnswer
from lathe_shared.http2.ended_by import EndedBy
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import CLIENT_PREFACE, frame, rst_stream, window_update
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.limits import SERVER_LIMITS
from lathe_shared.http2.request_head import RequestHead
from lathe_shared.http2.server import Http2Server, ServerProtocol
from lathe_shared.http2.settings import INITIAL_WINDOW_SIZE, settings_frame
from lathe_shared.http2.watch import Watch

OK = literal_block([(b"grpc-status", b"0")])
TURNS = 10
"""Turns of the loop that any call here needs at most; nothing waits for time."""


def block(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    return literal_block(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *more,
        ]
    )


READ = block(b"/t.S/Read")
WRITE = block(b"/t.S/Write")


def message(data: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(data).to_bytes(4, "big") + data


def request(number: int, body: bytes, encoded: bytes = READ) -> bytes:
    return frame(frames.HEADERS, 4, number, encoded) + frame(frames.DATA, 1, number, body)


def response(number: int, *messages: bytes) -> list[Sent]:
    headers = literal_block([(b":status", b"200"), (b"content-type", b"application/grpc+proto")])
    return [
        Sent(frames.HEADERS, 4, number, headers),
        *(Sent(frames.DATA, 0, number, message(data)) for data in messages),
        Sent(frames.HEADERS, 5, number, OK),
    ]


def status_of(sent: list[Sent]) -> Status:
    """Return the status of a response of one block."""
    (only,) = sent
    name = b"grpc-status"
    start = only.payload.index(name) + len(name)
    size = only.payload[start]
    return Status(int(only.payload[start + 1 : start + 1 + size]))


class Client:
    """A client of a server-streaming and a client-streaming method that share one function, without sockets."""

    def __init__(
        self,
        function: AtOnceFunction,
        settings: dict[int, int] | None = None,
        max_message_bytes: int = SERVER_LIMITS.max_message_bytes,
    ) -> None:
        self.asked: list[bytes] = []
        self.handled: list[bytes] = []
        self.failure: BaseException | None = None
        self.server = Http2Server(
            [self],
            at_once={"/t.S/Read": self._counted(function), "/t.S/Write": self._counted(function)},
            codec=RawCodec(),
            max_message_bytes=max_message_bytes,
        )
        self.protocol = ServerProtocol(self.server)
        self.transport = MemoryTransport(self.protocol)
        self.protocol.data_received(CLIENT_PREFACE + settings_frame(settings or {}) + frames.SETTINGS_ACK)

    def _counted(self, function: AtOnceFunction) -> AtOnceFunction:
        def counted(request: bytes, head: RequestHead) -> Any:
            self.asked.append(request)
            return function(request, head)

        return counted

    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/t.S/Read": Handler(self._read, Cardinality.UNARY_STREAM, bytes, bytes),
            "/t.S/Write": Handler(self._write, Cardinality.STREAM_UNARY, bytes, bytes),
            "/t.S/Handled": Handler(self._write, Cardinality.STREAM_UNARY, bytes, bytes),
        }

    async def _read(self, stream: Any) -> None:
        data = await self._receive(stream)
        await stream.send_message(b"handled")
        await stream.send_message(data)

    async def _write(self, stream: Any) -> None:
        parts = []
        while (data := await self._receive(stream)) is not None:
            parts.append(data)
        await stream.send_message(b"+".join(parts))

    async def _receive(self, stream: Any) -> Any:
        try:
            data = await stream.recv_message()
        except BaseException as error:
            self.failure = error
            raise
        if data is not None:
            self.handled.append(data)
        return data

    async def send(self, *parts: bytes) -> list[Sent]:
        """Send in some reads, and return what is written by the time that nothing more happens."""
        self.transport.written = b""
        for part in parts:
            self.protocol.data_received(part)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        return parse(self.transport.written)

    async def warm(self, encoded: bytes = READ) -> None:
        """Make a header block known, so that the next request can go the short way."""
        await self.send(request(1, message(b"warm"), encoded))
        self.asked.clear()
        self.handled.clear()


def echo(request: bytes, _head: RequestHead) -> bytes:
    return request


def decline(_request: bytes, _head: RequestHead) -> None:
    return None


@pytest.mark.parametrize("encoded", [READ, WRITE])
async def test_the_usual_shape_is_answered_in_the_same_turn(encoded: bytes) -> None:
    client = Client(echo)
    await client.warm(encoded)
    client.transport.written = b""

    client.protocol.data_received(request(3, message(b"hello"), encoded))

    assert parse(client.transport.written) == response(3, b"hello")
    assert client.asked == [b"hello"]
    assert client.handled == []
    assert client.protocol.http2.streams == {}


SHAPES: list[Callable[[bytes], list[bytes]]] = [
    lambda encoded: [request(3, message(b"hello"), encoded)],
    lambda encoded: [request(3, message(b"hello"), encoded)[:-3], request(3, message(b"hello"), encoded)[-3:]],
    lambda encoded: [bytes([byte]) for byte in request(3, message(b"hello"), encoded)],
    lambda encoded: [
        frame(frames.HEADERS, 4, 3, encoded)
        + frame(frames.DATA, 0, 3, message(b"hello"))
        + frame(frames.DATA, 1, 3, b"")
    ],
    lambda encoded: [
        frame(frames.HEADERS, 4, 3, encoded),
        frame(frames.DATA, 0, 3, message(b"hello")[:4]) + frame(frames.DATA, 0, 3, message(b"hello")[4:7]),
        frame(frames.DATA, 1, 3, message(b"hello")[7:]),
    ],
]


@pytest.mark.parametrize("encoded", [READ, WRITE])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_request_of_any_shape_is_answered_by_the_function(
    encoded: bytes, known: bool, shape: Callable[[bytes], list[bytes]]
) -> None:
    client = Client(echo)
    if known:
        await client.warm(encoded)

    assert await client.send(*shape(encoded)) == response(3, b"hello")
    assert client.asked == [b"hello"]
    assert client.handled == []
    assert client.protocol.http2.streams == {}
    assert client.protocol.borrowed_bytes == 0


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
async def test_what_is_declined_is_the_handlers_with_its_message(
    known: bool, shape: Callable[[bytes], list[bytes]]
) -> None:
    client = Client(decline)
    if known:
        await client.warm()

    assert await client.send(*shape(READ)) == response(3, b"handled", b"hello")
    assert client.asked == [b"hello"]
    assert client.handled == [b"hello"]
    assert client.protocol.http2.streams == {}
    assert client.protocol.borrowed_bytes == 0


@pytest.mark.parametrize("known", [False, True])
async def test_a_declined_stream_of_requests_reaches_the_handler_whole(known: bool) -> None:
    client = Client(decline)
    if known:
        await client.warm(WRITE)
    begin = frame(frames.HEADERS, 4, 3, WRITE)

    # The second message begins in the frame that ends the first one.
    sent = await client.send(
        begin + frame(frames.DATA, 0, 3, message(b"one") + message(b"two")[:6]),
        frame(frames.DATA, 0, 3, message(b"two")[6:] + message(b"three")),
        frame(frames.DATA, 1, 3, b""),
    )

    assert sent == response(3, b"one+two+three")
    assert client.asked == [b"one"]
    assert client.protocol.http2.uncredited_bytes == sum(len(message(part)) for part in (b"one", b"two", b"three")) + (
        len(message(b"warm")) if known else 0
    )


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
async def test_a_large_first_message_is_the_handlers_without_a_question(known: bool, is_whole: bool) -> None:
    client = Client(echo)
    if known:
        await client.warm()
    data = b"l" * (MAX_REQUEST_BYTES + 1)
    body = message(data)
    pieces = [body[start : start + 200_000] for start in range(0, len(body), 200_000)]
    parts = [frame(frames.DATA, int(piece is pieces[-1]), 3, piece) for piece in pieces]

    begin = frame(frames.HEADERS, 4, 3, READ)
    await client.send(*([b"".join((begin, *parts))] if is_whole else (begin, *parts)))

    assert client.handled == [data]
    assert client.asked == []
    assert client.protocol.borrowed_bytes == 0


async def test_a_compressed_message_is_the_handlers() -> None:
    client = Client(echo)
    encoded = block(b"/t.S/Read", (b"grpc-encoding", b"gzip"))

    sent = await client.send(request(3, message(gzip.compress(b"hello"), 1), encoded))

    assert sent == response(3, b"handled", b"hello")
    assert client.asked == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", Status.UNKNOWN),
        (message(b"hello")[:-1], Status.INVALID_ARGUMENT),
        (message(b"hello", 7), Status.INTERNAL),
        ((2000).to_bytes(5, "big") + b"x", Status.RESOURCE_EXHAUSTED),
    ],
)
@pytest.mark.parametrize("known", [False, True])
async def test_what_is_no_message_is_for_the_handler_to_find_out(known: bool, body: bytes, status: Status) -> None:
    client = Client(echo, max_message_bytes=1000)
    if known:
        await client.warm()

    sent = await client.send(request(3, body))

    assert client.asked == []
    if body:
        assert isinstance(client.failure, GRPCError)
        assert status_of(sent) is client.failure.status is status
    else:
        # Our handler here sends None on, which is its own affair.
        assert client.failure is None
        assert client.handled == []


@pytest.mark.parametrize("known", [False, True])
async def test_what_the_function_raises_is_the_answer(known: bool) -> None:
    def fail(request: bytes, _head: RequestHead) -> bytes:
        if request == b"warm":
            return request
        raise GRPCError(Status.NOT_FOUND, "not there")

    client = Client(fail)
    if known:
        await client.warm()

    assert status_of(await client.send(request(3, message(b"x")))) is Status.NOT_FOUND
    assert client.handled == []
    assert client.protocol.http2.streams == {}


@pytest.mark.parametrize("known", [False, True])
async def test_a_client_that_takes_nothing_gets_its_answer_when_it_does(known: bool) -> None:
    client = Client(echo, {INITIAL_WINDOW_SIZE: 8})
    if known:
        await client.warm()  # four bytes and their prefix are one more than the window
        assert await client.send(window_update(1, 100))

    sent = await client.send(request(3, message(b"hello")))

    assert [part.kind for part in sent] == [frames.HEADERS, frames.DATA]
    rest = await client.send(window_update(3, 100))
    assert sent[1].payload + rest[0].payload == message(b"hello")
    assert rest[1] == Sent(frames.HEADERS, 5, 3, OK)
    assert client.protocol.http2.streams == {}


async def test_when_much_waits_for_the_client_the_handler_is_called_instead() -> None:
    client = Client(lambda _request, _head: b"m" * 100_000, {INITIAL_WINDOW_SIZE: 0})
    await client.warm()
    limit = client.protocol.limits.max_unsent_bytes

    await client.send(b"".join(request(number, message(b"x")) for number in range(3, 403, 2)))

    assert limit // 100_000 <= len(client.asked) <= limit // 100_000 + 1
    assert len(client.handled) == 200 - len(client.asked)


async def test_many_answers_are_written_before_all_are_made() -> None:
    written: list[int] = []

    def large(_request: bytes, _head: RequestHead) -> bytes:
        written.append(len(client.transport.written))
        return b"m" * 16_384

    client = Client(large, {INITIAL_WINDOW_SIZE: 1 << 20})
    await client.send(window_update(0, 1 << 20))
    await client.warm()

    await client.send(request(3, message(b"x")) + request(5, message(b"x")))

    assert written[-1] > 16_384


@pytest.mark.parametrize("encoded", [READ, WRITE])
async def test_a_client_that_sends_on_is_told_to_stop_once_it_is_answered(encoded: bytes) -> None:
    client = Client(echo)

    sent = await client.send(frame(frames.HEADERS, 4, 3, encoded) + frame(frames.DATA, 0, 3, message(b"hello")))

    assert sent[:-1] == response(3, b"hello")
    assert (sent[-1].kind, sent[-1].code) == (frames.RST_STREAM, ErrorCode.NO_ERROR)
    assert await client.send(frame(frames.DATA, 1, 3, message(b"more"))) == []
    assert client.protocol.http2.streams == {}


@pytest.mark.parametrize("known", [False, True])
async def test_an_answer_may_wait_for_a_future(known: bool) -> None:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    client = Client(lambda _request, _head: PendingAnswer(future, lambda done, _ended_by: done.result()))
    if known:
        await client.warm(WRITE)

    assert await client.send(request(3, message(b"x"), WRITE)) == []
    assert "/t.S/Write" in client.server.running_methods()
    future.set_result(b"done")

    assert (await client.send())[-3:] == response(3, b"done")
    assert client.server.running_methods() == []
    assert client.handled == []


async def test_a_future_that_fails_is_the_answer() -> None:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    client = Client(lambda _request, _head: PendingAnswer(future, lambda done, _ended_by: done.result()))
    await client.send(request(3, message(b"x"), WRITE))
    future.set_exception(GRPCError(Status.ABORTED, "taken over"))

    assert status_of(await client.send()) is Status.ABORTED


async def test_a_call_that_the_client_resets_cancels_what_its_answer_waits_for() -> None:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    reasons: list[EndedBy | None] = []

    def answer(done: asyncio.Future[bytes], ended_by: EndedBy | None) -> bytes:
        reasons.append(ended_by)
        return done.result()

    client = Client(lambda _request, _head: PendingAnswer(future, answer))
    await client.send(request(3, message(b"x"), WRITE))

    assert await client.send(rst_stream(3, ErrorCode.CANCEL)) == []
    assert future.cancelled()
    assert reasons == [EndedBy.CLIENT_CANCEL]
    assert client.server.running_methods() == []


async def test_a_stopping_server_answers_what_still_waits() -> None:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    client = Client(lambda _request, _head: PendingAnswer(future, lambda done, _ended_by: done.result()))
    await client.send(request(3, message(b"x"), WRITE))

    client.server.end_rpcs()

    assert status_of(await client.send()) is Status.UNAVAILABLE


async def open_streams_after(client: Client, seconds: float) -> set[int]:
    """Let time pass for a client that is there and sends nothing for its calls; return which are still open."""
    watch = Watch(client.protocol.http2, 0.0)
    now = 0.0
    while now < seconds:
        watch.check(now, 0)
        await client.send(frame(frames.PING, frames.ACK, 0, bytes(8)))
        now += 10.0
    watch.check(seconds, 0)
    await client.send(b"")
    return set(client.protocol.http2.streams)


@pytest.mark.parametrize("path", ["/t.S/Read", "/t.S/Write", "/t.S/Handled"])
@pytest.mark.parametrize("begun", [b"", b"\0\0", b"\0\0\0\0\5he"], ids=["nothing", "half a prefix", "half a message"])
async def test_a_call_whose_first_message_does_not_come_is_given_up(path: str, begun: bytes) -> None:
    client = Client(decline)
    body = frame(frames.DATA, 0, 1, begun) if begun else b""
    await client.send(frame(frames.HEADERS, 4, 1, block(path.encode())) + body)
    limit = SERVER_LIMITS.progress_seconds
    assert await open_streams_after(client, limit - 0.5) == {1}
    assert await open_streams_after(client, limit + 0.5) == set()
    assert not client.server.serving.running
    assert client.asked == []


@pytest.mark.parametrize("path", ["/t.S/Write", "/t.S/Handled"])
async def test_between_two_messages_a_client_may_take_its_time(path: str) -> None:
    client = Client(decline)
    await client.send(frame(frames.HEADERS, 4, 1, block(path.encode())) + frame(frames.DATA, 0, 1, message(b"one")))
    assert client.handled == [b"one"]
    assert await open_streams_after(client, 1_000.0) == {1}


async def test_an_answer_that_takes_long_is_waited_for() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    client = Client(lambda _request, _head: PendingAnswer(future, lambda _future, _ended_by: b"late"))
    await client.send(frame(frames.HEADERS, 4, 1, READ) + frame(frames.DATA, 0, 1, message(b"slow")))
    assert client.asked == [b"slow"]
    assert await open_streams_after(client, 1_000.0) == {1}
    future.set_result(None)
    assert await client.send(b"") != []


async def test_a_call_that_is_reset_before_the_function_was_asked_is_nobodys() -> None:
    client = Client(echo)
    unfinished = frame(frames.HEADERS, 4, 3, READ) + frame(frames.DATA, 0, 3, message(b"hello"))

    assert await client.send(unfinished + rst_stream(3, ErrorCode.CANCEL)) == []
    assert client.asked == client.handled == []


async def test_while_events_are_listened_to_the_handler_is_called() -> None:
    from grpclib.events import RecvRequest, listen

    client = Client(echo)
    seen: list[str] = []

    async def note(event: RecvRequest) -> None:
        seen.append(event.method_name)

    listen(client.server, RecvRequest, note)

    assert (await client.send(request(3, message(b"hello"))))[1:] == response(3, b"handled", b"hello")[1:]
    assert seen == ["/t.S/Read"]
    assert client.asked == []
