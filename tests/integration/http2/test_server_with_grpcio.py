"""The server on the HTTP/2 engine, asked by grpcio: a client that shares no code with ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.events import RecvMessage, RecvRequest, SendTrailingMetadata, listen
from grpclib.exceptions import GRPCError
from multidict import MultiMapping
from typing_extensions import override

from lathe_shared.http2.ended_by import EndedBy
from lathe_shared.http2.request_head import RequestHead
from lathe_shared.http2.server import Http2Server

WAIT_SECONDS = 20
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class BytesCodec(CodecBase):
    __content_subtype__ = "proto"

    @override
    def encode(self, message: Any, message_type: Any) -> bytes:
        assert isinstance(message, bytes)
        return message

    @override
    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


class Probe:
    """Does what each test asks for, and remembers what it saw."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: asyncio.Future[EndedBy | None] = asyncio.get_running_loop().create_future()
        self.heads: list[RequestHead] = []
        self.metadata: list[MultiMapping[Any]] = []

    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/t.Probe/Echo": Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes),
            "/t.Probe/Hang": Handler(self.hang, Cardinality.UNARY_UNARY, bytes, bytes),
            "/t.Probe/Fail": Handler(self.fail, Cardinality.UNARY_UNARY, bytes, bytes),
            "/t.Probe/Nothing": Handler(self.nothing, Cardinality.UNARY_UNARY, bytes, bytes),
            "/t.Probe/Count": Handler(self.count, Cardinality.UNARY_STREAM, bytes, bytes),
            "/t.Probe/Join": Handler(self.join, Cardinality.STREAM_UNARY, bytes, bytes),
            "/t.Probe/Chat": Handler(self.chat, Cardinality.STREAM_STREAM, bytes, bytes),
        }

    def inline(self) -> dict[str, Callable[[bytes, RequestHead], bytes]]:
        return {"/t.Probe/Inline": self.inline_echo, "/t.Probe/InlineFail": self.inline_fail}

    def inline_echo(self, request: bytes, head: RequestHead) -> bytes:
        self.heads.append(head)
        return request

    def inline_fail(self, request: bytes, _head: RequestHead) -> bytes:
        if request == b"status":
            raise GRPCError(Status.NOT_FOUND, "nö\n100%")
        raise RuntimeError("a secret")

    async def echo(self, call: Any) -> None:
        self.metadata.append(call.metadata)
        await call.send_message(await call.recv_message())

    async def hang(self, call: Any) -> None:
        await call.recv_message()
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set_result(call._stream.ended_by)

    async def fail(self, call: Any) -> None:
        if await call.recv_message() == b"status":
            raise GRPCError(Status.NOT_FOUND, "nö\n100%")
        raise RuntimeError("a secret")

    async def nothing(self, _call: Any) -> None:
        return

    async def count(self, call: Any) -> None:
        for number in range(int(await call.recv_message())):
            await call.send_message(str(number).encode())

    async def join(self, call: Any) -> None:
        await call.send_message(b"".join([message async for message in call]))

    async def chat(self, call: Any) -> None:
        async for message in call:
            await call.send_message(message.upper())


@asynccontextmanager
async def probed(probe: Probe, **options: Any) -> AsyncIterator[tuple[Http2Server, Any]]:
    server = Http2Server([probe], inline=probe.inline(), codec=BytesCodec(), **options)
    await server.start("127.0.0.1", 0)
    try:
        async with (
            asyncio.timeout(WAIT_SECONDS),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=UNLIMITED) as channel,
        ):
            yield server, channel
    finally:
        await server.shut_down()


async def call(channel: Any, name: str, request: bytes = b"x", **options: Any) -> bytes:
    response: bytes = await channel.unary_unary(f"/t.Probe/{name}")(request, **options)
    return response


async def failure(channel: Any, name: str, request: bytes = b"x", **options: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, name, request, **options)
    return caught.value


@pytest.mark.parametrize("name", ["Echo", "Inline"])
@pytest.mark.parametrize("size", [0, 1, 16_000, 70_000, 10_000_000])
async def test_unary_calls_carry_any_size(name: str, size: int) -> None:
    async with probed(Probe()) as (_, channel):
        assert await call(channel, name, b"m" * size) == b"m" * size


@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_many_calls_at_once_get_each_its_own_answer(name: str) -> None:
    async with probed(Probe()) as (_, channel):
        requests = [str(number).encode() * 100 for number in range(500)]

        assert await asyncio.gather(*[call(channel, name, request) for request in requests]) == requests


async def test_streams_carry_messages_either_way_and_both() -> None:
    async with probed(Probe()) as (_, channel):
        counted = [message async for message in channel.unary_stream("/t.Probe/Count")(b"300")]
        joined = await channel.stream_unary("/t.Probe/Join")(iter([b"a" * 200_000, b"", b"b"] * 40))
        chat = channel.stream_stream("/t.Probe/Chat")()
        for word in (b"one", b"two"):
            await chat.write(word)
            assert await chat.read() == word.upper()
        await chat.done_writing()

        assert await chat.code() is grpc.StatusCode.OK
    assert counted == [str(number).encode() for number in range(300)]
    assert joined == (b"a" * 200_000 + b"b") * 40


@pytest.mark.parametrize("name", ["Fail", "InlineFail"])
async def test_what_a_method_raises_becomes_a_status(name: str) -> None:
    async with probed(Probe()) as (_, channel):
        known = await failure(channel, name, b"status")
        unknown = await failure(channel, name, b"bug")

    assert (known.code(), known.details()) == (grpc.StatusCode.NOT_FOUND, "nö\n100%")
    assert unknown.code() is grpc.StatusCode.UNKNOWN
    assert "secret" not in unknown.details()


async def test_an_unary_method_without_an_answer_is_unknown() -> None:
    async with probed(Probe()) as (_, channel):
        assert (await failure(channel, "Nothing")).code() is grpc.StatusCode.UNKNOWN


async def test_an_unknown_method_is_unimplemented() -> None:
    async with probed(Probe()) as (_, channel):
        assert (await failure(channel, "Missing")).code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_a_message_beyond_the_limit_is_refused_and_the_connection_lives(name: str) -> None:
    async with probed(Probe(), max_message_bytes=1000) as (_, channel):
        error = await failure(channel, name, b"m" * 1001)

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1001" in error.details()
        assert await call(channel, name, b"m" * 1000) == b"m" * 1000


@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_gzip_is_read_and_deflate_is_not(name: str) -> None:
    async with probed(Probe()) as (_, channel):
        assert await call(channel, name, b"m" * 100_000, compression=grpc.Compression.Gzip) == b"m" * 100_000
        error = await failure(channel, name, b"m" * 100_000, compression=grpc.Compression.Deflate)

    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_a_small_message_that_grows_beyond_the_limit_is_refused(name: str) -> None:
    async with probed(Probe(), max_message_bytes=100_000) as (_, channel):
        error = await failure(channel, name, b"m" * 10_000_000, compression=grpc.Compression.Gzip)

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_handlers_see_metadata() -> None:
    probe = Probe()
    sent = (("text", "value"), ("data-bin", b"\x00\xff"), ("twice", "1"), ("twice", "2"))
    async with probed(probe) as (_, channel):
        await call(channel, "Echo", metadata=sent)
        await call(channel, "Inline", metadata=sent, timeout=100)

    head = probe.heads[0]
    for metadata in (probe.metadata[0], head.metadata):
        assert metadata["text"] == "value"
        assert metadata["data-bin"] == b"\x00\xff"
        assert metadata.getall("twice") == ["1", "2"]
    assert head.path == "/t.Probe/Inline"
    assert head.peer.startswith("127.0.0.1:")
    assert head.timeout_seconds is not None
    assert 90 < head.timeout_seconds < 110  # grpcio rounds up


async def test_a_deadline_cancels_the_handler() -> None:
    probe = Probe()
    async with probed(probe) as (_, channel):
        error = await failure(channel, "Hang", timeout=0.2)

        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # grpcio also resets the stream at its deadline; either may be first.
        assert await probe.ended in {EndedBy.DEADLINE, EndedBy.CLIENT_CANCEL}


@pytest.mark.parametrize("reaction", ["swallow", "raise", "answer"])
async def test_a_handler_that_bends_its_cancellation_ends_with_the_deadline_all_the_same(
    reaction: str, caplog: pytest.LogCaptureFixture
) -> None:
    probe = Probe()

    async def bend(call: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if reaction == "raise":
                raise TimeoutError from None
            if reaction == "answer":
                await call.send_message(b"late")

    vars(probe)["hang"] = bend
    async with probed(probe) as (server, channel):
        error = await failure(channel, "Hang", timeout=0.1)
        await server.wait_idle()

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "Application error" not in caplog.text


async def test_a_cancelled_call_cancels_its_handler() -> None:
    probe = Probe()
    async with probed(probe) as (server, channel):
        pending = channel.unary_unary("/t.Probe/Hang")(b"x")
        await probe.started.wait()
        assert server.running_methods() == ["/t.Probe/Hang"]
        pending.cancel()

        assert await probe.ended is EndedBy.CLIENT_CANCEL
        await server.wait_idle()


async def test_a_stopping_server_answers_unavailable() -> None:
    probe = Probe()
    async with probed(probe) as (server, channel):
        pending = asyncio.ensure_future(failure(channel, "Hang"))
        await probe.started.wait()
        server.end_rpcs()

        assert (await pending).code() is grpc.StatusCode.UNAVAILABLE
        assert await probe.ended is EndedBy.SHUTDOWN


async def test_a_draining_server_finishes_what_runs_and_takes_nothing_new() -> None:
    async with probed(Probe()) as (server, channel):
        chat = channel.stream_stream("/t.Probe/Chat")()
        await chat.write(b"one")
        assert await chat.read() == b"ONE"

        server.begin_drain()
        await chat.write(b"two")

        assert await chat.read() == b"TWO"
        await server.wait_idle({"/t.Probe/Chat"})
        for name in ("Echo", "Inline"):
            assert (await failure(channel, name)).code() is grpc.StatusCode.UNAVAILABLE
        await chat.done_writing()
        assert await chat.code() is grpc.StatusCode.OK
        await server.wait_idle()


@pytest.mark.parametrize("name", ["Echo", "Inline"])
async def test_listeners_to_events_see_every_call_and_may_change_it(name: str) -> None:
    seen: list[Any] = []

    async def on_request(event: RecvRequest) -> None:
        seen.append(event.metadata["text"])

    async def on_message(event: RecvMessage) -> None:
        event.message = event.message + b"!"

    async def on_trailers(event: SendTrailingMetadata) -> None:
        event.metadata["extra"] = "trailer"

    async with probed(Probe()) as (server, channel):
        listen(server, RecvRequest, on_request)
        listen(server, RecvMessage, on_message)
        listen(server, SendTrailingMetadata, on_trailers)
        pending = channel.unary_unary(f"/t.Probe/{name}")(b"x", metadata=(("text", "value"),))

        assert await pending == b"x!"
        assert ("extra", "trailer") in tuple(await pending.trailing_metadata())
    assert seen == ["value"]
