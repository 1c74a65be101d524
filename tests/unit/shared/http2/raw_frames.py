"""A connection under test, and a peer that sends it whatever a test wants, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from typing_extensions import override

from lathe_shared.http2 import frames
from lathe_shared.http2.connection import Connection
from lathe_shared.http2.connection_state import ConnectionOwner
from lathe_shared.http2.frames import CLIENT_PREFACE, frame
from lathe_shared.http2.header_rules import CheckedHeaders
from lathe_shared.http2.hpack import HeaderBlock, HeaderEncoder, literal_block
from lathe_shared.http2.limits import SERVER_LIMITS, Limits
from lathe_shared.http2.settings import settings_frame
from lathe_shared.http2.stream import Bytes, Stream

REQUEST = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/t.S/m"),
    (b":authority", b"x"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)
RESPONSE = ((b":status", b"200"), (b"content-type", b"application/grpc"))
TRAILERS = ((b"grpc-status", b"0"),)


class RecordingStream(Stream):
    """Writes down what happens to it."""

    __slots__ = ("code", "data", "drained", "ended", "headers", "trailers")

    def __init__(self, http2: Connection, stream_id: int = 0, headers: CheckedHeaders | None = None) -> None:
        super().__init__(http2, stream_id)
        self.headers = headers
        self.data = b""
        self.trailers: CheckedHeaders | None = None
        self.ended = 0
        self.drained = 0
        self.code: int | None = None

    @override
    def on_headers(self, headers: CheckedHeaders) -> None:
        self.headers = headers

    @override
    def on_data(self, data: Bytes) -> None:
        self.data += data

    @override
    def on_trailers(self, headers: CheckedHeaders) -> None:
        self.trailers = headers

    @override
    def on_end(self) -> None:
        self.ended += 1

    @override
    def on_reset(self, code: int, reason: str, *, by_peer: bool) -> None:
        self.code = code

    @override
    def on_drained(self) -> None:
        self.drained += 1


class Recorder(ConnectionOwner):
    """Writes down what a connection tells."""

    def __init__(self) -> None:
        self.http2: Connection | None = None
        self.accepted: dict[int, RecordingStream] = {}
        self.goaways: list[tuple[int, int, bytes]] = []
        self.ping_acks = 0
        self.closed: list[int] = []
        self.settings = 0

    @override
    def accept(self, stream_id: int, block: HeaderBlock, headers: CheckedHeaders) -> Stream:
        assert self.http2 is not None
        assert stream_id not in self.accepted
        stream = self.accepted[stream_id] = RecordingStream(self.http2, stream_id, headers)
        return stream

    @override
    def on_stream_closed(self, stream: Stream) -> None:
        self.closed.append(stream.id)

    @override
    def on_goaway(self, last_stream_id: int, code: int, debug: bytes) -> None:
        self.goaways.append((last_stream_id, code, debug))

    @override
    def on_ping_ack(self) -> None:
        self.ping_acks += 1

    @override
    def on_settings(self) -> None:
        self.settings += 1


@dataclass
class Sent:
    """A frame that the connection under test has sent."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def code(self) -> int:
        """The error code of RST_STREAM or GOAWAY."""
        start = 4 if self.kind == frames.GOAWAY else 0
        return int.from_bytes(self.payload[start : start + 4], "big")


def parse(data: bytes) -> list[Sent]:
    """Return the frames in some bytes, which must be whole."""
    found = []
    position = 0
    while position < len(data):
        head, flags, stream_id = frames.unpack_frame(data, position)
        begin = position + frames.FRAME_HEADER_BYTES
        position = begin + (head >> 8)
        assert position <= len(data)
        found.append(Sent(head & 0xFF, flags, stream_id, data[begin:position]))
    return found


@dataclass
class Peer:
    """The other side of a connection under test, whose handshake is done.

    Attributes:
        limits: Bounds of the connection under test.
        is_client: Whether the connection under test is the client.
    """

    limits: Limits = SERVER_LIMITS
    is_client: bool = False
    shake_hands: bool = True
    settings: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owner = Recorder()
        self.http2 = Connection(self.owner, self.limits, is_client=self.is_client)
        self.owner.http2 = self.http2
        self.encoder = HeaderEncoder()
        self.first_output = b"".join(self.http2.out)
        self.http2.out.clear()
        if self.shake_hands:
            preface = b"" if self.is_client else CLIENT_PREFACE
            self.send(preface + settings_frame(self.settings) + frames.SETTINGS_ACK)
            assert [sent.kind for sent in self.sent()] == [frames.SETTINGS]

    def send(self, data: bytes) -> None:
        self.http2.receive(data)

    def sent(self) -> list[Sent]:
        """Return what the connection has sent since the last time."""
        data = b"".join(self.http2.out)
        self.http2.out.clear()
        return parse(data)

    def send_frame(self, kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> None:
        self.send(frame(kind, flags, stream_id, payload))

    def headers(self, stream_id: int, fields: Any = REQUEST, *, end: bool = False, flags: int = 0) -> bytes:
        flags |= frames.END_HEADERS | (frames.END_STREAM if end else 0)
        return frame(frames.HEADERS, flags, stream_id, self.block(fields))

    def block(self, fields: Any = REQUEST) -> bytes:
        return self.encoder.encode(tuple(fields))

    def data(self, stream_id: int, payload: bytes = b"", *, end: bool = False) -> bytes:
        return frame(frames.DATA, frames.END_STREAM if end else 0, stream_id, payload)

    def open(self, stream_id: int = 1, *, end: bool = False) -> RecordingStream:
        """Open a stream as a client does."""
        self.send(self.headers(stream_id, end=end))
        return self.owner.accepted[stream_id]

    def call(self, *, end: bool = True) -> RecordingStream:
        """Have the connection under test, a client, open a stream."""
        stream = RecordingStream(self.http2)
        self.http2.open(stream, literal_block(REQUEST), end=end)
        self.sent()
        return stream

    def expect_goaway(self, code: int) -> None:
        """Check that the connection has ended with this code, and said so last."""
        sent = self.sent()
        assert self.http2.is_closed
        assert sent
        assert (sent[-1].kind, sent[-1].code) == (frames.GOAWAY, code), sent[-1]
        assert self.http2.close_code == code
        assert not self.http2.streams

    def expect_reset(self, stream_id: int, code: int) -> None:
        """Check that a stream has ended with this code, and the connection has not."""
        resets = [sent for sent in self.sent() if sent.kind == frames.RST_STREAM]
        assert not self.http2.is_closed, self.http2.close_reason
        assert [(sent.stream_id, sent.code) for sent in resets] == [(stream_id, code)]
        assert stream_id not in self.http2.streams
        self.expect_alive()

    def expect_alive(self) -> None:
        """Check that the connection answers a PING, and has nothing else to say."""
        self.send_frame(frames.PING, payload=b"12345678")
        answers = self.sent()
        assert [(sent.kind, sent.flags, sent.payload) for sent in answers] == [(frames.PING, frames.ACK, b"12345678")]


def server(**limits: Any) -> Peer:
    """Return the peer of a server under test."""
    return Peer(limits=replace(SERVER_LIMITS, **limits))


def client(**limits: Any) -> Peer:
    """Return the peer of a client under test."""
    return Peer(limits=replace(SERVER_LIMITS, **limits), is_client=True)
