"""Clients that keep to no rule, on real sockets: bounded, told why, and without harm to the others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from tests.integration.http2.services import Service, begin, call, channel_to, served

from lathe_shared.http2 import frames
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import CLIENT_PREFACE, frame, rst_stream, unpack_frame, window_update
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.limits import SERVER_LIMITS
from lathe_shared.http2.server import Http2Server
from lathe_shared.http2.settings import settings_frame


def request(path: str, stream_id: int, flags: int = frames.END_HEADERS) -> bytes:
    block = literal_block(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        ]
    )
    return frame(frames.HEADERS, flags, stream_id, block)


def message(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


def unary(path: str, stream_id: int, data: bytes = b"x") -> bytes:
    return request(path, stream_id) + frame(frames.DATA, frames.END_STREAM, stream_id, message(data))


class Hostile:
    """A socket, after a proper handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def frame(self) -> tuple[int, int, bytes]:
        """Return type, stream and payload of the next frame."""
        head, _, stream_id = unpack_frame(await self.reader.readexactly(9))
        return head & 0xFF, stream_id, await self.reader.readexactly(head >> 8)

    async def goaway_code(self) -> int:
        """Read until the server leaves, and return why."""
        while True:
            kind, _, payload = await self.frame()
            if kind == frames.GOAWAY:
                return int.from_bytes(payload[4:8], "big")


@asynccontextmanager
async def hostile(server: Http2Server, settings: dict[int, int] | None = None) -> AsyncIterator[Hostile]:
    sock = socket.socket()
    # So that little hides in the kernel of what is not read.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(CLIENT_PREFACE + settings_frame(settings or {}) + frames.SETTINGS_ACK)
    try:
        yield Hostile(reader, writer)
    finally:
        writer.close()


STREAM_IDS = range(3, 1_000_000, 2)
FLOODS: dict[str, Callable[[int], bytes]] = {
    "ping": lambda _: frame(frames.PING, 0, 0, b"12345678"),
    "settings": lambda _: settings_frame({4: 65_535}),
    "empty data": lambda _: frame(frames.DATA, 0, 1),
    "window updates": lambda _: window_update(1, 1),
    "priority": lambda number: frame(frames.PRIORITY, 0, number, b"\0" * 5),
    "unknown frames": lambda _: frame(0xEE, 0, 0, b"x" * 50),
    "rapid reset": lambda number: request("/t.S/Hang", number) + rst_stream(number, ErrorCode.CANCEL),
    "malformed requests": lambda number: frame(frames.HEADERS, 4, number, b"\x83"),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_ends_and_others_are_served_meanwhile(name: str) -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as friend, hostile(server) as peer:
        peer.writer.write(request("/t.S/Join", 1))
        flood = b"".join(FLOODS[name](number) for number in STREAM_IDS[:10_000])
        ended = asyncio.create_task(peer.goaway_code())
        for start in range(0, len(flood), 20_000):
            peer.writer.write(flood[start : start + 20_000])
            assert await call(friend, "Echo") == b"x"
            assert await call(friend, "Inline") == b"x"
            if ended.done():
                break

        assert await ended == ErrorCode.ENHANCE_YOUR_CALM
        await server.wait_idle()
        assert await call(friend, "Echo") == b"x"


async def test_a_reader_that_is_slow_gets_no_more_than_its_windows_and_the_buffers() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as friend, hostile(server) as peer:
        peer.writer.write(unary("/t.S/Pour", 1, b"10000"))
        for _ in range(50):
            await call(friend, "Echo")

        # The peer has opened its windows to 64 KiB and never more.
        assert service.poured <= 65_535


async def test_a_peer_that_opens_its_windows_and_does_not_read_is_not_buffered_for() -> None:
    service = Service()
    windows = {4: 0x7FFFFFFF}
    async with served(service) as server, channel_to(server.port) as friend, hostile(server, windows) as peer:
        peer.writer.write(window_update(0, 0x7FFF0000) + unary("/t.S/Pour", 1, b"100000"))
        before = -1
        while service.poured != before:
            before = service.poured
            for _ in range(20):
                await call(friend, "Echo")

        # What the kernel takes on both sides, and the transport up to its high mark.
        assert service.poured < 20 << 20
        (protocol,) = [p for p in server.protocols if p.http2.streams]
        assert protocol.transport is not None
        assert protocol.transport.get_write_buffer_size() < 2 << 20


async def test_inline_calls_of_a_peer_that_does_not_read_wait_before_they_are_answered() -> None:
    service = Service()
    answered = 0

    def large(_request: bytes, _head: object) -> bytes:
        nonlocal answered
        answered += 1
        return b"x" * 100_000

    limits = replace(SERVER_LIMITS, max_unsent_bytes=1 << 20)
    vars(service)["inline"] = lambda: {"/t.S/Large": large, **Service.inline(service)}
    async with (
        served(service, limits=limits) as server,
        channel_to(server.port) as friend,
        hostile(server) as peer,
    ):
        peer.writer.write(b"".join(unary("/t.S/Large", number) for number in range(1, 1001, 2)))
        for _ in range(50):
            await call(friend, "Inline")
        assert answered <= 15, "about as many as may wait unsent"

        peer.writer.write(settings_frame({4: 1 << 20}) + window_update(0, 0x7FFF0000))
        ends = 0
        while ends < 500:
            kind, _, payload = await peer.frame()
            ends += kind == frames.HEADERS and b"grpc-status" in payload
    assert answered == 500


async def test_calls_whose_answers_the_peer_never_takes_stop_the_reading_of_more() -> None:
    """Even what needs no window is bounded: header blocks, trailers, answers to PING."""
    service = Service()
    limits = replace(SERVER_LIMITS, max_unsent_bytes=1 << 20, control_frames_burst=10**9)
    async with served(service, limits=limits) as server, channel_to(server.port) as friend, hostile(server) as peer:
        ping = frame(frames.PING, 0, 0, b"12345678") * 10_000
        protocol = next(p for p in server.protocols if p.http2.peer.initial_window_bytes == 65_535)
        sent = 0
        while peer.writer.transport.get_write_buffer_size() < 1 << 20 and sent < 1000:
            peer.writer.write(ping)
            sent += 1
            await call(friend, "Echo")

        assert sent < 1000, "the server went on reading"
        assert protocol.transport is not None
        assert all(p.transport.get_write_buffer_size() < 4 << 20 for p in server.protocols if p.transport)
        # Once the peer reads, all is answered.
        answers = 0
        while answers < sent * 10_000:
            answers += (await peer.frame())[0] == frames.PING


async def test_a_writer_is_held_to_the_windows_of_a_handler_that_does_not_read() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as channel, begin(channel, "Ignore") as stream:
        await stream.send_message(b"first")
        await service.started.wait()
        sent = 0
        writing = asyncio.ensure_future(stream.send_message(b"x" * 1_000_000))
        while True:
            done, _ = await asyncio.wait([writing], timeout=0.2)
            if not done:
                break
            sent += 1_000_000
            writing = asyncio.ensure_future(stream.send_message(b"x" * 1_000_000))
        assert sent <= SERVER_LIMITS.stream_window_bytes

        service.go_on.set()
        await writing
        await stream.end()
        assert await stream.recv_message() == str(sent + 1_000_000).encode()


async def test_more_streams_than_allowed_are_refused() -> None:
    service = Service()
    limits = replace(SERVER_LIMITS, max_concurrent_streams=5)
    async with served(service, limits=limits) as server, hostile(server) as peer:
        peer.writer.write(b"".join(request("/t.S/Hang", number) for number in range(1, 21, 2)))
        refused: set[int] = set()
        while len(refused) < 5:
            kind, stream_id, payload = await peer.frame()
            if kind == frames.RST_STREAM:
                assert int.from_bytes(payload, "big") == ErrorCode.REFUSED_STREAM
                refused.add(stream_id)

        assert refused == {11, 13, 15, 17, 19}
        assert len(server.running_methods()) == 5


async def test_tiny_frames_take_little_more_memory_than_their_bytes() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as friend, hostile(server) as peer:
        peer.writer.write(request("/t.S/Ignore", 1) + frame(frames.DATA, 0, 1, message(b"first")))
        await service.started.wait()
        peer.writer.write(frame(frames.DATA, 0, 1, b"ab") * 50_000)
        (stream,) = (stream for p in server.protocols for stream in p.http2.streams.values() if stream.id == 1)
        while stream.held_bytes < 100_000:
            await call(friend, "Echo")

        assert len(stream.messages._parts) < 100  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]
)
async def test_other_protocols_are_refused(sent: bytes) -> None:
    async with served(Service()) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        while await reader.read(65_536):
            pass
        writer.close()


async def test_connections_that_come_and_go_leave_nothing_behind() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as friend:
        for number in range(50):
            async with hostile(server) as peer:
                peer.writer.write(request("/t.S/Hang", 1) + unary("/t.S/Inline", 3) + frame(frames.DATA, 0, 1, b"\0"))
                if number % 2:
                    await peer.frame()
                peer.writer.transport.abort()
        while len(server.protocols) > 1 or server.running_methods():
            await call(friend, "Echo")


async def test_a_request_that_nobody_reads_to_its_end_is_cut_off_with_its_answer() -> None:
    service = Service()
    async with served(service) as server, hostile(server) as peer:
        peer.writer.write(request("/t.S/FirstOnly", 1) + frame(frames.DATA, 0, 1, message(b"first") + b"more"))
        kinds = [(await peer.frame())[0] for _ in range(4)]

        assert kinds == [frames.SETTINGS, frames.WINDOW_UPDATE, frames.SETTINGS, frames.HEADERS]
        rest = [await peer.frame() for _ in range(3)]
        assert [kind for kind, _, _ in rest] == [frames.DATA, frames.HEADERS, frames.RST_STREAM]
        assert rest[2][2] == ErrorCode.NO_ERROR.to_bytes(4, "big")
        assert all(not p.http2.streams for p in server.protocols)


@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_incomplete_messages_take_no_more_memory_than_is_allowed(name: str) -> None:
    service = Service()
    limits = replace(SERVER_LIMITS, max_incomplete_bytes=1 << 20)
    large = b"\0" + (10 << 20).to_bytes(4, "big")
    async with served(service, limits=limits) as server, channel_to(server.port) as friend, hostile(server) as peer:
        for number in range(1, 21, 2):
            peer.writer.write(request(f"/t.S/{name}", number))
            peer.writer.write(frame(frames.DATA, 0, number, large + b"x" * 200_000))
        refused = 0
        while refused < 5:
            kind, _, payload = await peer.frame()
            refused += kind == frames.HEADERS and b"grpc-status\x018" in payload

        # Five of them hold a megabyte; a whole message is not in their way.
        assert await call(friend, name, b"x" * 900_000) == b"x" * 900_000
        (protocol,) = [p for p in server.protocols if p.http2.streams]
        assert protocol.borrowed_bytes <= 1 << 20
        assert len(protocol.http2.streams) == 5
    assert protocol.borrowed_bytes == 0


async def test_connections_beyond_the_limit_are_closed_as_they_come() -> None:
    service = Service()
    async with served(service, max_connections=2) as server, channel_to(server.port) as friend, hostile(server):
        assert await call(friend, "Echo") == b"x"
        async with hostile(server) as third:
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await third.frame()
        assert await call(friend, "Echo") == b"x"


async def test_a_client_that_never_finishes_its_handshake_is_closed() -> None:
    limits = replace(SERVER_LIMITS, handshake_seconds=0.05)
    async with served(Service(), limits=limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        peer = Hostile(reader, writer)

        assert await peer.goaway_code() == ErrorCode.SETTINGS_TIMEOUT
        assert await reader.read() == b""
        writer.close()


async def test_a_silent_client_is_asked_by_ping_and_closed() -> None:
    limits = replace(SERVER_LIMITS, keepalive_seconds=0.05, keepalive_timeout_seconds=0.05)
    async with served(Service(), limits=limits) as server, hostile(server) as peer:
        while (await peer.frame())[0] != frames.PING:
            pass
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await peer.frame()
