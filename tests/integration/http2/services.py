"""A small gRPC service, and servers and channels of both makes around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpclib.client
import grpclib.server
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from typing_extensions import override

from lathe_shared.http2.channel import Http2Channel
from lathe_shared.http2.request_head import RequestHead
from lathe_shared.http2.server import Http2Server

WAIT_SECONDS = 20

KINDS = {
    "Echo": Cardinality.UNARY_UNARY,
    "Inline": Cardinality.UNARY_UNARY,
    "Fail": Cardinality.UNARY_UNARY,
    "Hang": Cardinality.UNARY_UNARY,
    "Count": Cardinality.UNARY_STREAM,
    "CountThenFail": Cardinality.UNARY_STREAM,
    "Pour": Cardinality.UNARY_STREAM,
    "Join": Cardinality.STREAM_UNARY,
    "FirstOnly": Cardinality.STREAM_UNARY,
    "Ignore": Cardinality.STREAM_UNARY,
    "Chat": Cardinality.STREAM_STREAM,
}


class BytesCodec(CodecBase):
    """Messages are bytes."""

    __content_subtype__ = "proto"

    @override
    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    @override
    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


class Service:
    """Does what the names of its methods say."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.poured = 0
        self.received = 0

    def __mapping__(self) -> dict[str, Handler]:
        functions: dict[str, Callable[[Any], Any]] = {
            "Echo": self.echo,
            "Inline": self.echo,
            "Fail": self.fail,
            "Hang": self.hang,
            "Count": self.count,
            "CountThenFail": self.count_then_fail,
            "Pour": self.pour,
            "Join": self.join,
            "FirstOnly": self.first_only,
            "Ignore": self.ignore,
            "Chat": self.chat,
        }
        return {f"/t.S/{name}": Handler(func, KINDS[name], bytes, bytes) for name, func in functions.items()}

    def inline(self) -> dict[str, Callable[[bytes, RequestHead], bytes]]:
        return {"/t.S/Inline": lambda request, _head: request}

    async def echo(self, call: Any) -> None:
        await call.send_message(await call.recv_message())

    async def fail(self, call: Any) -> None:
        await call.recv_message()
        raise GRPCError(Status.NOT_FOUND, "nothing of that name")

    async def hang(self, call: Any) -> None:
        await call.recv_message()
        self.started.set()
        await self.go_on.wait()
        await call.send_message(b"went on")

    async def count(self, call: Any) -> None:
        for number in range(int(await call.recv_message())):
            await call.send_message(str(number).encode())

    async def count_then_fail(self, call: Any) -> None:
        await self.count(call)
        raise GRPCError(Status.DATA_LOSS, "enough")

    async def pour(self, call: Any) -> None:
        """Send without end, in messages of the size that is asked for."""
        message = b"x" * int(await call.recv_message())
        while True:
            await call.send_message(message)
            self.poured += len(message)

    async def join(self, call: Any) -> None:
        await call.send_message(b"".join([message async for message in call]))

    async def first_only(self, call: Any) -> None:
        await call.send_message(await call.recv_message())
        await call.send_trailing_metadata()

    async def ignore(self, call: Any) -> None:
        """Take the first message, and no more until told."""
        await call.recv_message()
        self.started.set()
        await self.go_on.wait()
        total = 0
        while (message := await call.recv_message()) is not None:
            total += len(message)
        await call.send_message(str(total).encode())

    async def chat(self, call: Any) -> None:
        async for message in call:
            await call.send_message(message.upper())


@asynccontextmanager
async def served(service: Service, **options: Any) -> AsyncIterator[Http2Server]:
    """Serve with our server."""
    start = {key: options.pop(key) for key in ("ssl", "path") if key in options}
    options.setdefault("codec", BytesCodec())
    server = Http2Server([service], inline=service.inline(), **options)
    await server.start(*(() if "path" in start else ("127.0.0.1", 0)), **start)
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            yield server
    finally:
        await server.shut_down()


@asynccontextmanager
async def served_by_grpclib(service: Service) -> AsyncIterator[int]:
    """Serve with grpclib's own server, and give its port."""
    server = grpclib.server.Server([service], codec=BytesCodec())
    await server.start("127.0.0.1", 0)
    assert server._server is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            yield server._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def channel_to(port: int, **options: Any) -> AsyncIterator[Http2Channel]:
    """Give our channel."""
    channel = Http2Channel("127.0.0.1", port, codec=BytesCodec(), **options)
    try:
        yield channel
    finally:
        channel.close()


@asynccontextmanager
async def grpclib_channel_to(port: int) -> AsyncIterator[grpclib.client.Channel]:
    """Give grpclib's own channel."""
    channel = grpclib.client.Channel("127.0.0.1", port, codec=BytesCodec())
    try:
        yield channel
    finally:
        channel.close()


async def until(condition: Callable[[], object]) -> None:
    """Give way to others until something holds; whoever calls bounds the time."""
    while not condition():  # noqa: ASYNC110 -- what is waited for is deep inside, and has no event
        await asyncio.sleep(0)


def begin(channel: grpclib.client.Channel, name: str, **options: Any) -> Any:
    """Return a call that is not begun."""
    return channel.request(f"/t.S/{name}", KINDS[name], bytes, bytes, **options)


async def call(channel: grpclib.client.Channel, name: str, request: bytes = b"x", **options: Any) -> bytes:
    """Make a unary call."""
    async with begin(channel, name, **options) as stream:
        await stream.send_message(request, end=True)
        response: bytes = await stream.recv_message()
    return response
