"""Inline methods, frame by frame: what is written for requests in every shape, and how often."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from tests.unit.shared.http2.memory_transport import MemoryTransport
from tests.unit.shared.http2.raw_frames import Sent, parse
from typing_extensions import override

from lathe_shared.http2 import frames
from lathe_shared.http2.frames import CLIENT_PREFACE, frame, window_update
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.inline_calls import default_error
from lathe_shared.http2.limits import SERVER_LIMITS
from lathe_shared.http2.request_head import RequestHead
from lathe_shared.http2.server import Http2Server, ServerProtocol
from lathe_shared.http2.settings import settings_frame
from lathe_shared.http2.watch import Watch


def block(*more: tuple[bytes, bytes]) -> bytes:
    return literal_block(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/t.S/m"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *more,
        ]
    )


BLOCK = block()


def message(data: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(data).to_bytes(4, "big") + data


def request(number: int, body: bytes, encoded: bytes = BLOCK) -> bytes:
    return frame(frames.HEADERS, 4, number, encoded) + frame(frames.DATA, 1, number, body)


class Counting(MemoryTransport):
    """Counts writes."""

    writes = 0

    @override
    def write(self, data: Any) -> None:
        super().write(data)
        self.writes += 1


class Client:
    """A client of one inline method, without sockets."""

    def __init__(
        self,
        function: Callable[[bytes, RequestHead], bytes],
        settings: dict[int, int] | None = None,
        on_error: Callable[[str, Exception], GRPCError] = default_error,
        max_message_bytes: int = SERVER_LIMITS.max_message_bytes,
    ) -> None:
        self.calls = 0

        def counted(request: bytes, head: RequestHead) -> bytes:
            self.calls += 1
            return function(request, head)

        server = Http2Server([], inline={"/t.S/m": counted}, max_message_bytes=max_message_bytes, on_error=on_error)
        self.protocol = ServerProtocol(server)
        self.transport = Counting(self.protocol)
        self.send(CLIENT_PREFACE + settings_frame(settings or {}) + frames.SETTINGS_ACK)

    def send(self, data: bytes) -> list[Sent]:
        """Send, and return what the server writes at once."""
        self.transport.written = b""
        self.transport.writes = 0
        self.protocol.data_received(data)
        return parse(self.transport.written)

    def warm(self) -> None:
        """Make the header block known, so that the next request can go the short way."""
        self.send(request(1, message(b"warm")))


def echo(request: bytes, _head: RequestHead) -> bytes:
    return request


def response(number: int, data: bytes) -> list[Sent]:
    headers = literal_block([(b":status", b"200"), (b"content-type", b"application/grpc+proto")])
    return [
        Sent(frames.HEADERS, 4, number, headers),
        Sent(frames.DATA, 0, number, message(data)),
        Sent(frames.HEADERS, 5, number, literal_block([(b"grpc-status", b"0")])),
    ]


async def test_many_requests_in_one_read_are_answered_in_one_write() -> None:
    client = Client(echo)
    numbers = range(1, 201, 2)

    sent = client.send(b"".join(request(number, message(str(number).encode())) for number in numbers))

    assert sent == [part for number in numbers for part in response(number, str(number).encode())]
    assert client.transport.writes == 1
    assert client.protocol.http2.streams == {}


async def test_headers_of_many_before_their_data_are_no_different() -> None:
    client = Client(echo)
    client.warm()
    numbers = range(3, 201, 2)

    sent = client.send(
        b"".join(frame(frames.HEADERS, 4, number, BLOCK) for number in numbers)
        + b"".join(frame(frames.DATA, 1, number, message(b"x")) for number in numbers)
    )

    assert sent == [part for number in numbers for part in response(number, b"x")]


@pytest.mark.parametrize("pieces", [2, 3, 1000])
async def test_a_request_in_pieces_is_answered_when_it_is_whole(pieces: int) -> None:
    client = Client(echo)
    client.warm()
    data = request(3, message(b"hello"))
    step = max(len(data) // pieces, 1)
    sent: list[Sent] = []
    for begin in range(0, len(data), step):
        assert sent == []
        sent = client.send(data[begin : begin + step])

    assert sent == response(3, b"hello")


@pytest.mark.parametrize("known", [False, True])
async def test_what_is_raised_becomes_a_response_of_trailers_only(known: bool) -> None:
    def fail(request: bytes, _head: RequestHead) -> bytes:
        if request == b"warm":
            return request
        raise GRPCError(Status.NOT_FOUND, "no ä")

    client = Client(fail)
    number = 1
    if known:
        client.warm()
        number = 3

    (sent,) = client.send(request(number, message(b"x")))

    assert (sent.kind, sent.flags, sent.stream_id) == (frames.HEADERS, 5, number)
    assert b"grpc-status\x015" in sent.payload
    assert b"no %C3%A4" in sent.payload
    assert client.protocol.http2.streams == {}


async def test_other_exceptions_are_hidden_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_request: bytes, _head: RequestHead) -> bytes:
        raise RuntimeError("secret")

    client = Client(fail)

    (sent,) = client.send(request(1, message(b"x")))

    assert b"grpc-status\x012" in sent.payload
    assert b"secret" not in sent.payload
    assert "secret" in caplog.text


async def test_a_mapping_of_errors_that_fails_itself_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_request: bytes, _head: RequestHead) -> bytes:
        raise RuntimeError("first")

    def on_error(_path: str, _error: Exception) -> GRPCError:
        raise RuntimeError("second")

    client = Client(fail, on_error=on_error)

    (sent,) = client.send(request(1, message(b"x")))

    assert b"grpc-status\x012" in sent.payload
    assert "second" in caplog.text


@pytest.mark.parametrize("known", [False, True])
async def test_an_answer_beyond_the_window_waits_with_its_trailers(known: bool) -> None:
    client = Client(echo, settings={4: 10})
    number = 1
    if known:
        client.warm()
        number = 3

    headers, begin = client.send(request(number, message(b"0123456789")))
    assert [headers] == response(number, b"")[:1]
    assert begin.payload == message(b"0123456789")[:10]
    rest, trailers = client.send(window_update(number, 100))

    assert begin.payload + rest.payload == message(b"0123456789")
    assert [trailers] == response(number, b"")[2:]
    assert client.protocol.http2.streams == {}
    assert client.calls == (2 if known else 1)


async def test_a_peer_with_no_dynamic_table_is_told_so_first() -> None:
    client = Client(echo, settings={1: 0})
    client.send(b"")

    headers, _, _ = client.send(request(1, message(b"x")))

    assert headers.payload == b"\x20" + response(1, b"x")[0].payload
    assert client.send(request(3, message(b"x"))) == response(3, b"x")


@pytest.mark.parametrize("known", [False, True])
async def test_a_compressed_request_is_read(known: bool) -> None:
    encoded = block((b"grpc-encoding", b"gzip"))
    client = Client(echo)
    number = 1
    if known:
        client.send(request(1, message(b"warm"), encoded))
        number = 3

    sent = client.send(request(number, message(gzip.compress(b"hello"), 1), encoded))

    assert sent == response(number, b"hello")


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", b"3"),
        (b"\0\0", b"3"),
        (message(b"abc")[:-1], b"3"),
        (message(b"abc") + b"\0", b"3"),
        (message(b"abc") * 2, b"3"),
        (message(b"x" * 101), b"8"),
        (message(b"abc", 1), b"13"),
        (message(b"abc", 7), b"13"),
    ],
    ids=["nothing", "half a prefix", "half a message", "more behind", "two", "too large", "compressed", "bad flag"],
)
async def test_what_is_not_exactly_one_message_is_refused(known: bool, body: bytes, status: bytes) -> None:
    client = Client(echo, max_message_bytes=100)
    number = 1
    if known:
        client.warm()
        number = 3
    calls = client.calls

    sent = client.send(request(number, body))

    assert sent[0].kind == frames.HEADERS
    assert b"grpc-status" + bytes([len(status)]) + status in sent[0].payload
    assert client.calls == calls
    assert client.protocol.http2.streams == {}
    assert client.protocol.borrowed_bytes == 0


async def test_a_content_length_is_held_to() -> None:
    encoded = block((b"content-length", b"6"))
    client = Client(echo)
    assert client.send(request(1, message(b"x"), encoded)) == response(1, b"x")
    assert client.send(request(3, message(b"x"), encoded)) == response(3, b"x")

    (reset,) = client.send(request(5, message(b"xy"), encoded))

    assert (reset.kind, reset.code) == (frames.RST_STREAM, 1)


@pytest.mark.parametrize("begun", [b"", b"\0\0", b"\0\0\0\0\5he"], ids=["nothing", "half a prefix", "half a message"])
async def test_a_request_that_does_not_go_on_is_given_up(begun: bytes) -> None:
    client = Client(echo)
    client.send(frame(frames.HEADERS, 4, 1, BLOCK) + frame(frames.DATA, 0, 1, begun))
    watch = Watch(client.protocol.http2, 0.0)
    limit = SERVER_LIMITS.progress_seconds
    for now in (1.0, limit, limit + 0.5):
        watch.check(now, 0)
    assert 1 in client.protocol.http2.streams

    watch.check(limit + 1.5, 0)

    (reset,) = [sent for sent in client.send(b"") if sent.kind == frames.RST_STREAM]
    assert (reset.stream_id, reset.code) == (1, 8)
    assert client.calls == 0


async def test_equal_requests_see_the_same_head() -> None:
    heads: list[RequestHead] = []

    def note(request: bytes, head: RequestHead) -> bytes:
        heads.append(head)
        return request

    client = Client(note)
    for number in (1, 3, 5):
        client.send(request(number, message(b"x")))
    client.send(request(7, message(b"x"), block((b"other", b"1"))))

    assert heads[0] is heads[1] is heads[2]
    assert heads[3] is not heads[0]
    assert heads[3].metadata["other"] == "1"


async def test_a_request_refused_by_its_headers_is_not_passed_on() -> None:
    client = Client(echo)
    for number in (1, 3):
        sent = client.send(request(number, message(b"x"), block((b"grpc-timeout", b"soon"))))
        assert b"grpc-timeout is no number" in sent[0].payload

    assert client.calls == 0
