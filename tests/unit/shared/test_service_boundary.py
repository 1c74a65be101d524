"""The boundary, asked by grpcio: a client that shares no code with ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry
from tests.support.google_messages import message_class
from typing_extensions import override

from lathe_protos import reapi
from lathe_shared.digest import Digest
from lathe_shared.errors import InvalidArgumentError, MissingInputsError, NotFoundError
from lathe_shared.grpc_transport import DEFAULT_MAX_MESSAGE_BYTES, Engine, GrpcServer
from lathe_shared.metrics import ServiceMetrics
from lathe_shared.request_metadata import REQUEST_METADATA_KEY
from lathe_shared.rpc_observer import RpcObserver
from lathe_shared.service_boundary import (
    EndedBy,
    PendingAnswer,
    Rpc,
    RpcContext,
    RpcKind,
    Servicer,
    bidirectional,
    client_streaming,
    current_rpc,
    make_server,
    server_streaming,
    unary,
)

WAIT_SECONDS = 20
END: Any = vars(grpc.aio)["EOF"]  # its stubs lack it

pytestmark = pytest.mark.usefixtures("engine")


class Probe(Servicer):
    """Does what each test asks for, and remembers what it saw."""

    service_name = "lathe.test.Probe"

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: asyncio.Future[EndedBy | None] = asyncio.get_running_loop().create_future()
        self.error: Exception = RuntimeError("a bug, with a secret in its text")
        self.contexts: list[RpcContext] = []

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "Echo": unary(self.echo),
            "EchoLater": unary(self.echo_later),
            "Either": unary(self.either),
            "Fail": unary(self.fail),
            "Hang": unary(self.hang),
            "HangStream": server_streaming(self.hang_stream),
            "Count": server_streaming(self.count),
            "CountThenFail": server_streaming(self.count_then_fail),
            "Join": client_streaming(self.join),
            "FirstOnly": client_streaming(self.first_only),
            "Chat": bidirectional(self.chat, long_lived=True),
            "Small": server_streaming(self.small, at_once=self.small_at_once),
            "Store": client_streaming(self.store, at_once=self.store_at_once),
        }

    def echo(self, request: bytes, context: RpcContext) -> bytes:
        self.contexts.append(context)
        return request

    async def echo_later(self, request: bytes, context: RpcContext) -> bytes:
        await asyncio.sleep(0)
        assert current_rpc.get() is context
        return request

    def either(self, request: bytes, context: RpcContext) -> bytes | Awaitable[bytes]:
        self.contexts.append(context)
        return request if request == b"now" else self.later(request, context)

    async def later(self, request: bytes, context: RpcContext) -> bytes:
        if request == b"hang":
            return await self.hang(request, context)
        if request.startswith(b"fail"):
            raise NotFoundError("not there after all")
        return await self.echo_later(request, context)

    def fail(self, _request: bytes, _context: RpcContext) -> bytes:
        raise self.error

    async def hang(self, request: bytes, context: RpcContext) -> bytes:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.ended.set_result(context.ended_by)
            raise
        return request

    async def hang_stream(self, request: bytes, context: RpcContext) -> AsyncIterator[bytes]:
        try:
            yield request
            await asyncio.Event().wait()
        finally:
            self.ended.set_result(context.ended_by)

    async def count(self, request: bytes, _context: RpcContext) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield str(number).encode()

    async def count_then_fail(self, request: bytes, context: RpcContext) -> AsyncIterator[bytes]:
        async for message in self.count(request, context):
            yield message
        raise self.error

    async def join(self, requests: AsyncIterator[bytes], _context: RpcContext) -> bytes:
        return b"".join([request async for request in requests])

    async def first_only(self, requests: AsyncIterator[bytes], _context: RpcContext) -> bytes:
        return await anext(requests)

    async def chat(self, requests: AsyncIterator[bytes], _context: RpcContext) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()

    async def small(self, request: bytes, context: RpcContext) -> AsyncIterator[bytes]:
        if request == b"absent":
            raise NotFoundError("absent is not there")
        self.contexts.append(context)
        for letter in request.decode():
            yield letter.encode()

    def small_at_once(self, request: bytes, context: RpcContext) -> bytes | None:
        assert current_rpc.get() is context
        if request == b"absent":
            raise NotFoundError("absent is not there")
        if len(request) != 1:
            return None
        self.contexts.append(context)
        return request

    async def store(self, requests: AsyncIterator[bytes], context: RpcContext) -> bytes:
        first = await anext(requests)
        if first == b"hang":
            return await self.hang(first, context)
        if first == b"fail":
            raise NotFoundError("not stored")
        return first + b"".join([request async for request in requests])

    def store_at_once(self, request: bytes, _context: RpcContext) -> PendingAnswer | None:
        if request.startswith(b"many"):
            return None
        stored = asyncio.get_running_loop().create_future()
        if request == b"hang":
            self.started.set()
        elif request == b"fail":
            stored.set_exception(NotFoundError("not stored"))
        else:
            stored.set_result(request)

        def answer(done: asyncio.Future[bytes], ended_by: EndedBy | None) -> bytes:
            if done.cancelled():
                self.ended.set_result(ended_by)
            return done.result()

        return PendingAnswer(stored, answer)


@asynccontextmanager
async def probed(
    probe: Probe, observer: RpcObserver | None = None, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
) -> AsyncIterator[tuple[GrpcServer, Any]]:
    server = make_server([probe], observer, max_message_bytes=max_message_bytes)
    await server.start("127.0.0.1", 0)
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=limits) as channel:
            yield server, channel
    finally:
        server.end_rpcs()
        await server.shut_down()


def path(name: str) -> str:
    return f"/lathe.test.Probe/{name}"


async def call(channel: Any, name: str, request: bytes = b"x", **options: Any) -> bytes:
    async with asyncio.timeout(WAIT_SECONDS):
        response: bytes = await channel.unary_unary(path(name))(request, **options)
        return response


async def failure(channel: Any, name: str, request: bytes = b"x", **options: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, name, request, **options)
    return caught.value


@pytest.mark.parametrize("name", ["Echo", "EchoLater"])
@pytest.mark.parametrize("size", [0, 1, 70_000, 10_000_000])
async def test_unary_calls_carry_any_size(name: str, size: int) -> None:
    async with probed(Probe()) as (_, channel):
        assert await call(channel, name, b"m" * size) == b"m" * size


async def test_server_streaming_gives_all_messages() -> None:
    async with probed(Probe()) as (_, channel):
        messages = [message async for message in channel.unary_stream(path("Count"))(b"300")]

    assert messages == [str(number).encode() for number in range(300)]


async def test_client_streaming_takes_all_messages() -> None:
    async with probed(Probe()) as (_, channel):
        response = await channel.stream_unary(path("Join"))(iter([b"a" * 200_000, b"", b"b"]))

    assert response == b"a" * 200_000 + b"b"


async def test_an_answer_before_the_end_of_the_requests_reaches_the_client_as_ok() -> None:
    async with probed(Probe()) as (server, channel), asyncio.timeout(WAIT_SECONDS):
        stream = channel.stream_unary(path("FirstOnly"))()
        await stream.write(b"first")

        assert await stream == b"first"
        assert await stream.code() is grpc.StatusCode.OK
        assert server.running_methods() == []
        assert await call(channel, "Echo", b"still usable") == b"still usable"


async def test_a_client_that_sends_on_after_its_answer_still_gets_it() -> None:
    async def requests() -> AsyncIterator[bytes]:
        for _ in range(500):
            yield b"p" * 100_000

    async with probed(Probe()) as (_, channel), asyncio.timeout(WAIT_SECONDS):
        for _ in range(5):
            assert await channel.stream_unary(path("FirstOnly"))(requests()) == b"p" * 100_000


async def test_bidirectional_calls_answer_while_they_listen() -> None:
    async with probed(Probe()) as (_, channel), asyncio.timeout(WAIT_SECONDS):
        stream = channel.stream_stream(path("Chat"))()
        for word in (b"one", b"two"):
            await stream.write(word)
            assert await stream.read() == word.upper()
        await stream.done_writing()

        assert await stream.read() is END
        assert await stream.code() is grpc.StatusCode.OK


async def test_errors_become_their_status_with_details_that_google_protobuf_reads() -> None:
    probe = Probe()
    digests = [Digest.of(b"one"), Digest.of(b"two")]
    probe.error = MissingInputsError(digests)
    async with probed(probe) as (_, channel):
        error = await failure(channel, "Fail")

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    trailers = dict(error.trailing_metadata())
    status: Any = message_class("google.rpc.Status").FromString(trailers["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert status.message == error.details()
    failed: Any = message_class("google.rpc.PreconditionFailure")()
    assert status.details[0].Unpack(failed)
    assert [(v.type, v.subject) for v in failed.violations] == [("MISSING", f"blobs/{digest}") for digest in digests]


async def test_details_too_large_for_a_trailer_are_cut_and_the_error_still_arrives() -> None:
    probe = Probe()
    probe.error = MissingInputsError([Digest.of(str(number).encode()) for number in range(2000)])
    async with probed(probe) as (_, channel):
        error = await failure(channel, "Fail")

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    status: Any = message_class("google.rpc.Status").FromString(
        dict(error.trailing_metadata())["grpc-status-details-bin"]
    )
    failed: Any = message_class("google.rpc.PreconditionFailure")()
    assert status.details[0].Unpack(failed)
    assert 10 < len(failed.violations) < 2000


async def test_an_endless_error_text_is_cut() -> None:
    probe = Probe()
    probe.error = NotFoundError("ä\n" * 100_000)
    async with probed(probe) as (_, channel):
        error = await failure(channel, "Fail")

    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details().startswith("ä\nä\n")


async def test_a_bug_is_internal_with_an_id_and_without_its_text() -> None:
    async with probed(Probe()) as (_, channel):
        error = await failure(channel, "Fail")

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "internal error" in error.details()
    assert "secret" not in error.details()


async def test_an_error_in_the_middle_of_a_stream_follows_what_was_sent() -> None:
    probe = Probe()
    probe.error = InvalidArgumentError("count", "enough")
    async with probed(probe) as (_, channel):
        stream = channel.unary_stream(path("CountThenFail"))(b"2")
        received = [await stream.read(), await stream.read()]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()

    assert received == [b"0", b"1"]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_method_is_unimplemented() -> None:
    async with probed(Probe()) as (_, channel):
        assert (await failure(channel, "Nothing")).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_beyond_the_limit_is_refused_and_the_connection_lives() -> None:
    async with probed(Probe(), max_message_bytes=1000) as (_, channel):
        error = await failure(channel, "Echo", b"m" * 1001)

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1001" in error.details()
        assert await call(channel, "Echo", b"m" * 1000) == b"m" * 1000


async def test_a_compressed_message_is_read_or_unimplemented(engine: Engine) -> None:
    async with probed(Probe()) as (_, channel):
        if engine is Engine.LATHE:
            assert await call(channel, "Echo", b"m" * 5000, compression=grpc.Compression.Gzip) == b"m" * 5000
            return
        error = await failure(channel, "Echo", b"m" * 5000, compression=grpc.Compression.Gzip)

    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_plain_function_may_answer_later() -> None:
    probe = Probe()
    metadata = reapi.RequestMetadata(action_id="abc")
    async with probed(probe) as (_, channel):
        assert await call(channel, "Either", b"now") == b"now"
        assert await call(channel, "Either", b"later", metadata=[(REQUEST_METADATA_KEY, bytes(metadata))]) == b"later"
        error = await failure(channel, "Either", b"fail later")

    assert probe.contexts[1].request_metadata.action_id == "abc"
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_plain_function_that_answers_later_is_cancelled_with_its_call() -> None:
    probe = Probe()
    async with probed(probe) as (_, channel), asyncio.timeout(WAIT_SECONDS):
        pending = channel.unary_unary(path("Either"))(b"hang")
        await probe.started.wait()
        pending.cancel()
        await probe.ended


async def test_no_rpc_is_current_when_a_plain_function_has_returned() -> None:
    async with probed(Probe()) as (_, channel):
        await call(channel, "Echo", metadata=[(REQUEST_METADATA_KEY, bytes(reapi.RequestMetadata(action_id="abc")))])

        assert current_rpc.get() is None


async def test_a_deadline_cancels_the_handler() -> None:
    probe = Probe()
    async with probed(probe) as (_, channel), asyncio.timeout(WAIT_SECONDS):
        error = await failure(channel, "Hang", timeout=0.2)

        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # grpcio also resets the stream at its deadline; either may be first.
        assert await probe.ended in {EndedBy.DEADLINE, EndedBy.CLIENT_CANCEL}


async def test_a_cancelled_call_is_told_from_a_lost_connection() -> None:
    probe = Probe()
    async with probed(probe) as (_, channel), asyncio.timeout(WAIT_SECONDS):
        pending = channel.unary_unary(path("Hang"))(b"x")
        await probe.started.wait()
        pending.cancel()

        assert await probe.ended is EndedBy.CLIENT_CANCEL


async def test_a_cancelled_stream_ends_its_generator() -> None:
    probe = Probe()
    async with probed(probe) as (_, channel), asyncio.timeout(WAIT_SECONDS):
        stream = channel.unary_stream(path("HangStream"))(b"x")
        assert await stream.read() == b"x"
        stream.cancel()

        assert await probe.ended is EndedBy.CLIENT_CANCEL


async def test_a_lost_connection_is_told_from_a_cancelled_call() -> None:
    probe = Probe()
    server = make_server([probe])
    await server.start("127.0.0.1", 0)
    relay, port = await relay_to(server.port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(WAIT_SECONDS):
        pending = asyncio.ensure_future(failure(channel, "Hang"))
        await probe.started.wait()
        for transport in relay.transports:
            transport.abort()

        assert await probe.ended is EndedBy.CONNECTION_LOST
        assert (await pending).code() is grpc.StatusCode.UNAVAILABLE
    await relay.close()
    await server.shut_down()


class Relay:
    """Passes bytes on between two sockets until a test cuts them."""

    def __init__(self, server: asyncio.Server) -> None:
        self.server = server
        self.transports: list[asyncio.WriteTransport] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def close(self) -> None:
        self.server.close()
        for transport in self.transports:
            transport.abort()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()


async def relay_to(port: int) -> tuple[Relay, int]:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        relay.transports += [writer.transport, far_writer.transport]
        relay.tasks += [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]

    relay = Relay(await asyncio.start_server(accept, "127.0.0.1", 0))
    return relay, relay.server.sockets[0].getsockname()[1]


async def test_a_stopping_server_answers_unavailable_in_place_of_the_handler() -> None:
    probe = Probe()
    async with probed(probe) as (server, channel), asyncio.timeout(WAIT_SECONDS):
        pending = asyncio.ensure_future(failure(channel, "Hang"))
        await probe.started.wait()
        server.end_rpcs()

        assert (await pending).code() is grpc.StatusCode.UNAVAILABLE
        assert await probe.ended is EndedBy.SHUTDOWN


async def test_a_draining_server_finishes_what_runs_and_takes_nothing_new() -> None:
    probe = Probe()
    async with probed(probe) as (server, channel), asyncio.timeout(WAIT_SECONDS):
        chat = channel.stream_stream(path("Chat"))()
        await chat.write(b"one")
        assert await chat.read() == b"ONE"

        server.begin_drain()
        await chat.write(b"two")

        assert await chat.read() == b"TWO"
        await server.wait_idle({path("Chat")})
        assert (await failure(channel, "Echo")).code() is grpc.StatusCode.UNAVAILABLE
        await chat.done_writing()
        assert await chat.read() is END
        await server.wait_idle()


async def test_handlers_see_who_calls_and_for_what() -> None:
    probe = Probe()
    metadata = reapi.RequestMetadata(
        tool_details=reapi.ToolDetails(tool_name="bazel", tool_version="4.2.3"),
        action_id="abc",
        tool_invocation_id="invocation",
        correlated_invocations_id="build",
        action_mnemonic="CppCompile",
        target_id="//a:b",
        configuration_id="k8",
    )
    async with probed(probe) as (_, channel):
        await call(channel, "Echo", metadata=[(REQUEST_METADATA_KEY, bytes(metadata)), ("plain", "text")], timeout=10)
        await call(channel, "Echo", metadata=[(REQUEST_METADATA_KEY, b"\xff\xff broken")])
        await call(channel, "Echo")

    first, broken, absent = probe.contexts
    assert first.method == path("Echo")
    assert first.peer.startswith("127.0.0.1:")
    assert first.metadata["plain"] == "text"
    assert first.deadline is not None
    assert first.request_metadata_wire == bytes(metadata)
    seen = first.request_metadata
    assert (seen.tool_name, seen.tool_version, seen.action_id, seen.target_id) == ("bazel", "4.2.3", "abc", "//a:b")
    assert (seen.tool_invocation_id, seen.correlated_invocations_id) == ("invocation", "build")
    assert (seen.action_mnemonic, seen.configuration_id) == ("CppCompile", "k8")
    assert broken.request_metadata.target_id == absent.request_metadata.target_id == ""
    assert absent.deadline is None


async def test_rpcs_are_counted_and_timed() -> None:
    registry = CollectorRegistry()
    probe = Probe()
    probe.error = NotFoundError("nothing")
    async with probed(probe, RpcObserver(ServiceMetrics("cas", registry))) as (_, channel):
        await call(channel, "Echo")
        await call(channel, "Echo")
        await failure(channel, "Fail")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("lathe_cas_rpcs_total", method="lathe.test.Probe/Echo", code="OK") == 2
    assert value("lathe_cas_rpcs_total", method="lathe.test.Probe/Fail", code="NOT_FOUND") == 1
    assert value("lathe_cas_rpc_seconds_count", method="lathe.test.Probe/Echo") == 2


def counted(registry: CollectorRegistry, method: str) -> dict[str, float]:
    """Return how many calls of a method were counted, by their status, and how many were timed."""
    (codes,) = (metric for metric in registry.collect() if metric.name == "lathe_cas_rpcs")
    found = {
        sample.labels["code"]: sample.value
        for sample in codes.samples
        if sample.name == "lathe_cas_rpcs_total" and sample.labels["method"] == f"lathe.test.Probe/{method}"
    }
    timed = registry.get_sample_value("lathe_cas_rpc_seconds_count", {"method": f"lathe.test.Probe/{method}"})
    return {**found, "timed": timed or 0}


async def test_a_read_is_the_same_whether_or_not_it_is_answered_at_once() -> None:
    registry = CollectorRegistry()
    probe = Probe()
    metadata = [(REQUEST_METADATA_KEY, bytes(reapi.RequestMetadata(action_id="abc")))]
    async with probed(probe, RpcObserver(ServiceMetrics("cas", registry))) as (_, channel):

        async def ask(request: bytes) -> list[bytes]:
            async with asyncio.timeout(WAIT_SECONDS):
                return [part async for part in channel.unary_stream(path("Small"))(request, metadata=metadata)]

        # Twice, since the second one finds the headers known.
        assert [await ask(b"x"), await ask(b"y")] == [[b"x"], [b"y"]]
        assert [await ask(b"xyz"), await ask(b"")] == [[b"x", b"y", b"z"], []]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(b"absent")

    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "absent is not there")
    assert [context.request_metadata.action_id for context in probe.contexts] == ["abc"] * 4
    assert counted(registry, "Small") == {"OK": 4, "NOT_FOUND": 1, "timed": 5}


async def test_a_write_is_the_same_whether_or_not_it_is_answered_at_once() -> None:
    registry = CollectorRegistry()
    async with probed(Probe(), RpcObserver(ServiceMetrics("cas", registry))) as (_, channel):

        async def ask(*requests: bytes) -> bytes:
            async with asyncio.timeout(WAIT_SECONDS):
                answer: bytes = await channel.stream_unary(path("Store"))(iter(requests))
                return answer

        assert [await ask(b"one"), await ask(b"two")] == [b"one", b"two"]
        assert await ask(b"many", b"more") == b"manymore"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(b"fail")

    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "not stored")
    assert counted(registry, "Store") == {"OK": 3, "NOT_FOUND": 1, "timed": 4}


async def test_a_write_that_waits_ends_with_its_call() -> None:
    registry = CollectorRegistry()
    probe = Probe()
    async with (
        probed(probe, RpcObserver(ServiceMetrics("cas", registry))) as (server, channel),
        asyncio.timeout(WAIT_SECONDS),
    ):
        pending = channel.stream_unary(path("Store"))(iter([b"hang"]))
        await probe.started.wait()
        pending.cancel()
        assert await probe.ended is EndedBy.CLIENT_CANCEL
        await server.wait_idle()

    assert counted(registry, "Store") == {"CANCELLED": 1, "timed": 1}


async def test_a_write_that_waits_for_too_long_is_told_so() -> None:
    probe = Probe()
    async with probed(probe) as (_, channel), asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.stream_unary(path("Store"))(iter([b"hang"]), timeout=0.2)

        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await probe.ended in {EndedBy.DEADLINE, EndedBy.CLIENT_CANCEL}


async def test_a_stopping_server_answers_a_write_that_waits() -> None:
    registry = CollectorRegistry()
    probe = Probe()
    async with (
        probed(probe, RpcObserver(ServiceMetrics("cas", registry))) as (server, channel),
        asyncio.timeout(WAIT_SECONDS),
    ):
        pending = channel.stream_unary(path("Store"))(iter([b"hang"]))
        await probe.started.wait()
        server.end_rpcs()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pending

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert counted(registry, "Store") == {"UNAVAILABLE": 1, "timed": 1}


async def test_rpcs_tell_a_transport_how_to_call_them() -> None:
    rpcs = Probe().rpcs()

    assert rpcs["Echo"].is_plain_function
    assert not rpcs["EchoLater"].is_plain_function
    assert rpcs["Echo"].kind is RpcKind.UNARY
    assert rpcs["Chat"].kind is RpcKind.BIDIRECTIONAL
    assert rpcs["Chat"].long_lived
