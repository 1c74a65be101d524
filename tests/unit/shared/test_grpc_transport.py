"""The transport against a peer that speaks raw HTTP/2, and our client against servers that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import h2.config
import h2.connection
import h2.events
import pytest
from hyperframe.frame import DataFrame, Frame, GoAwayFrame
from typing_extensions import override

from lathe_shared.clients.rpc_client import NO_RETRY, RpcClient
from lathe_shared.endpoint import Endpoint
from lathe_shared.errors import NotFoundError, ResourceExhaustedError, UnavailableError
from lathe_shared.grpc_transport import DEFAULT_MAX_MESSAGE_BYTES, GrpcServer
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, bidirectional, make_server, server_streaming, unary
from lathe_shared.testing.serving import connect, serving

WAIT_SECONDS = 20
HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/lathe.test.Echo/Echo",
    ":authority": "x",
    "te": "trailers",
    "content-type": "application/grpc",
}

pytestmark = pytest.mark.usefixtures("engine")


class Echo(Servicer):
    service_name = "lathe.test.Echo"

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "Echo": unary(self.echo),
            "Twice": server_streaming(self.twice),
            "Chat": bidirectional(self.chat),
            "Refuse": bidirectional(self.refuse),
        }

    def echo(self, request: bytes, _context: RpcContext) -> bytes:
        return request

    async def twice(self, request: bytes, _context: RpcContext) -> AsyncIterator[bytes]:
        yield request
        await self.go_on.wait()
        yield request

    async def chat(self, requests: AsyncIterator[bytes], _context: RpcContext) -> AsyncIterator[bytes]:
        async for request in requests:
            if request == b"bye":
                return
            yield request

    async def refuse(self, requests: AsyncIterator[bytes], _context: RpcContext) -> AsyncIterator[bytes]:
        yield await anext(requests)
        raise NotFoundError("no more")


class RawPeer:
    """An HTTP/2 client without a rule that h2 does not force on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
        )
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def begin(self, headers: Mapping[str, str]) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, list(headers.items()))
        self.flush()
        return stream_id

    def send(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream_id, data, end_stream=end)
        self.flush()

    def send_frame(self, frame: Frame) -> None:
        self.flush()
        self.writer.write(frame.serialize())

    async def result(self, stream_id: int) -> tuple[bytes, dict[str, str]]:
        """Return data and last headers of a stream once the server has ended it."""
        data = b""
        headers: dict[str, str] = {}
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                received = await self.reader.read(65536)
                assert received, "the server closed the connection"
                for event in self.h2.receive_data(received):
                    if getattr(event, "stream_id", None) != stream_id:
                        continue
                    if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                        headers.update((k.decode(), v.decode()) for k, v in event.headers)
                    elif isinstance(event, h2.events.DataReceived):
                        data += event.data
                    elif isinstance(event, h2.events.StreamEnded):
                        return data, headers
                self.flush()


@asynccontextmanager
async def raw_peer(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> AsyncIterator[RawPeer]:
    server = make_server([Echo()], max_message_bytes=max_message_bytes)
    await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield RawPeer(reader, writer)
    finally:
        writer.close()
        await server.shut_down()


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


async def test_a_message_in_many_frames_with_empty_ones_between_is_read() -> None:
    async with raw_peer() as peer:
        stream_id = peer.begin(HEADERS)
        for byte in framed(b"hello"):
            peer.send(stream_id, bytes([byte]))
            peer.send(stream_id, b"")
        peer.send(stream_id, b"", end=True)

        data, headers = await peer.result(stream_id)

    assert (data, headers["grpc-status"]) == (framed(b"hello"), "0")


async def test_a_header_that_is_no_base64_is_left_out_and_the_call_answered() -> None:
    async with raw_peer() as peer:
        stream_id = peer.begin({**HEADERS, "some-bin": "a", "other-bin": "!!!!!"})
        peer.send(stream_id, framed(b"x"), end=True)

        data, headers = await peer.result(stream_id)

    assert (data, headers["grpc-status"]) == (framed(b"x"), "0")


async def test_frames_of_unknown_types_are_ignored() -> None:
    async with raw_peer() as peer:
        stream_id = peer.begin(HEADERS)
        peer.flush()
        peer.writer.write(b"\x00\x00\x03\xee\x00\x00\x00\x00\x00abc")
        peer.send(stream_id, framed(b"x"), end=True)

        data, _ = await peer.result(stream_id)

    assert data == framed(b"x")


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0", framed(b"hello")[:-1]], ids=["nothing", "half a prefix", "half a message"]
)
async def test_a_request_that_is_cut_off_is_the_clients_fault(sent: bytes) -> None:
    async with raw_peer() as peer:
        stream_id = peer.begin(HEADERS)
        peer.send(stream_id, sent, end=True)

        _, headers = await peer.result(stream_id)

    assert headers["grpc-status"] == "3"


async def test_an_announced_size_beyond_the_limit_is_refused_before_the_bytes_come() -> None:
    async with raw_peer(max_message_bytes=1000) as peer:
        stream_id = peer.begin(HEADERS)
        peer.send(stream_id, b"\0" + (2**32 - 1).to_bytes(4, "big"))

        _, headers = await peer.result(stream_id)

    assert headers["grpc-status"] == "8"


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"content-type": "text/plain"}, "415"),
        ({":method": "GET"}, "405"),
        ({"te": ""}, "400"),
        ({"grpc-timeout": "soon"}, "200"),
    ],
    ids=str,
)
async def test_what_is_no_grpc_request_is_refused(changed: dict[str, str], status: str) -> None:
    async with raw_peer() as peer:
        stream_id = peer.begin({**HEADERS, **changed})

        _, headers = await peer.result(stream_id)

    assert headers[":status"] == status


async def test_a_protocol_error_ends_one_connection_and_not_the_server() -> None:
    async with raw_peer() as peer, asyncio.timeout(WAIT_SECONDS):
        peer.flush()
        frame = DataFrame(stream_id=7)
        frame.data = b"on a stream that was never opened"
        peer.send_frame(frame)
        while await peer.reader.read(65536):
            pass

        port = peer.writer.get_extra_info("peername")[1]
        async with connect(Endpoint("127.0.0.1", port)) as channel:
            assert await RpcClient(channel).unary("/lathe.test.Echo/Echo", b"x") == b"x"


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Echo, GrpcServer]]:
    echo = Echo()
    server = make_server([echo])
    await server.start("127.0.0.1", 0)
    try:
        yield echo, server
    finally:
        server.end_rpcs()
        await server.shut_down()


async def test_our_client_finishes_its_calls_on_a_server_that_leaves_and_calls_the_next_one() -> None:
    async with (
        asyncio.timeout(WAIT_SECONDS),
        running() as (echo, server),
        connect(Endpoint("127.0.0.1", server.port)) as channel,
    ):
        client = RpcClient(channel, retry=NO_RETRY)
        stream = client.server_stream("/lathe.test.Echo/Twice", b"x")
        assert await anext(stream) == b"x"
        port = server.port
        server.begin_drain()
        next_server = make_server([Echo()])
        await next_server.start("127.0.0.1", port)
        try:
            # A call that was sent before the GOAWAY was read is refused, and the one after it is not.
            for _ in range(2):
                try:
                    assert await client.unary("/lathe.test.Echo/Echo", b"y") == b"y"
                except UnavailableError:
                    continue
            assert await client.unary("/lathe.test.Echo/Echo", b"y") == b"y"
            echo.go_on.set()
            assert await anext(stream) == b"x"
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        finally:
            await next_server.shut_down()


async def test_a_call_that_a_leaving_server_did_not_begin_is_unavailable_at_once() -> None:
    """Some servers only say up to which call they go on, and never answer those beyond."""
    left = asyncio.Event()

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        server.initiate_connection()
        events: list[h2.events.Event] = []
        while not any(isinstance(event, h2.events.StreamEnded) for event in events):
            writer.write(server.data_to_send())
            events = server.receive_data(await reader.read(65536))
        writer.write(GoAwayFrame(stream_id=0, last_stream_id=0).serialize())
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    async with asyncio.timeout(WAIT_SECONDS), await asyncio.start_server(leave, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with connect(Endpoint("127.0.0.1", port)) as channel:
            with pytest.raises(UnavailableError, match="has not begun this call"):
                await RpcClient(channel, retry=NO_RETRY).unary("/lathe.test.Echo/Echo", b"x")
        await left.wait()


async def test_a_lost_connection_is_unavailable_to_our_client() -> None:
    async with (
        asyncio.timeout(WAIT_SECONDS),
        running() as (_, server),
        connect(Endpoint("127.0.0.1", server.port)) as channel,
    ):
        client = RpcClient(channel, retry=NO_RETRY)
        stream = client.server_stream("/lathe.test.Echo/Twice", b"x")
        assert await anext(stream) == b"x"
        await server.shut_down()

        with pytest.raises(UnavailableError, match="was lost"):
            await anext(stream)
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await client.unary("/lathe.test.Echo/Echo", b"x")


async def test_bidirectional_calls_end_from_either_side() -> None:
    async with asyncio.timeout(WAIT_SECONDS), serving([Echo()]) as channel:
        client = RpcClient(channel)
        async with client.bidirectional("/lathe.test.Echo/Chat") as call:
            await call.send(b"one")
            assert await call.receive() == b"one"
            await call.send(b"bye")
            assert await call.receive() is None
        async with client.bidirectional("/lathe.test.Echo/Chat") as call:
            await call.end()
            assert await call.receive() is None
        async with client.bidirectional("/lathe.test.Echo/Chat") as call:
            await call.send(b"one")
        async with client.bidirectional("/lathe.test.Echo/Refuse") as call:
            await call.send(b"one")
            assert await call.receive() == b"one"
            with pytest.raises(NotFoundError, match="no more"):
                await call.receive()

        assert await client.unary("/lathe.test.Echo/Echo", b"x") == b"x"


async def test_what_the_caller_raises_inside_a_call_stays_what_it_is() -> None:
    async with asyncio.timeout(WAIT_SECONDS), serving([Echo()]) as channel:
        with pytest.raises(FileNotFoundError):
            async with RpcClient(channel).bidirectional("/lathe.test.Echo/Chat"):
                raise FileNotFoundError("deliberate")


async def test_a_large_answer_is_bounded_at_the_client_too() -> None:
    async with serving([Echo()]) as channel:
        channel._max_message_bytes = 100
        with pytest.raises(ResourceExhaustedError, match="larger than the 100 bytes"):
            await RpcClient(channel).unary("/lathe.test.Echo/Echo", b"x" * 101)
