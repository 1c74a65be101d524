"""Any frames through a whole server and a whole client: nothing raised, nothing logged, nothing left behind."""

from __future__ import annotations

import asyncio
import gzip
import logging
from typing import Any

import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, StreamTerminatedError
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.shared.http2.memory_transport import MemoryTransport
from tests.unit.shared.http2.raw_frames import parse
from tests.unit.shared.http2.test_any_input import LIMITS, any_frame, split
from typing_extensions import override

from lathe_shared.http2 import frames
from lathe_shared.http2.channel import ClientProtocol
from lathe_shared.http2.client_call import ClientStream
from lathe_shared.http2.frames import CLIENT_PREFACE, frame
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.server import Http2Server, ServerProtocol

REQUESTS = [
    literal_block(
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *more,
        ]
    )
    for path in (b"/t.S/Echo", b"/t.S/Chat", b"/t.S/Inline", b"/t.S/Missing")
    for more in ([], [(b"grpc-encoding", b"gzip")], [(b"grpc-timeout", b"1n")], [(b"x-bin", b"!")], [(b"te", b"x")])
]
RESPONSES = [
    literal_block([(b":status", status), (b"content-type", b"application/grpc"), *more])
    for status in (b"200", b"503", b"100")
    for more in ([], [(b"grpc-status", b"5")], [(b"grpc-status", b"x")], [(b"grpc-encoding", b"gzip")])
] + [literal_block([(b"grpc-status", b"0")]), literal_block([(b"grpc-status", b"99")]), literal_block([])]

messages = st.sampled_from(
    [
        b"\0\0\0\0\5hello",
        b"\0\0\0\0\0",
        b"\0\0\0\0\5hel",
        b"lo",
        b"\0\xff\xff\xff\xff",
        b"\2\0\0\0\1x",
        b"\1\0\0\0\1x",
        b"\1\0\0\0" + bytes([len(gzip.compress(b"x"))]) + gzip.compress(b"x"),
        b"\0\0\0\0\1a\0\0\0\0\1b",
        b"",
    ]
)
numbers = st.sampled_from([1, 3, 5, 7])
data = st.builds(
    lambda number, end, payload: frame(frames.DATA, end, number, payload), numbers, st.integers(0, 1), messages
)


def headers(blocks: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda number, end, block: frame(frames.HEADERS, 4 | end, number, block),
        numbers,
        st.integers(0, 1),
        st.sampled_from(blocks),
    )


class BytesCodec(CodecBase):
    __content_subtype__ = "proto"

    @override
    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    @override
    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


class Service:
    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/t.S/Echo": Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes),
            "/t.S/Chat": Handler(self.chat, Cardinality.STREAM_STREAM, bytes, bytes),
        }

    async def echo(self, call: Any) -> None:
        message = await call.recv_message()
        if message is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "nothing")
        await call.send_message(message)

    async def chat(self, call: Any) -> None:
        async for message in call:
            await call.send_message(message)
            await asyncio.sleep(0)


class Problems(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


async def give_way(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


def run(scenario: Any) -> None:
    """Run a scenario, and check that nothing was logged and nothing escaped to the loop."""
    problems = Problems()
    logger = logging.getLogger()
    logger.addHandler(problems)

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.records.append(str(context)))
        async with asyncio.timeout(20):
            await scenario()

    try:
        asyncio.run(watched())
    finally:
        logger.removeHandler(problems)
    assert problems.records == []


@given(
    input_=st.lists(headers(REQUESTS) | data | any_frame, max_size=25).map(b"".join),
    cuts=st.lists(st.integers(1, 300), max_size=10),
)
@settings(max_examples=150)
def test_no_frames_harm_a_server(input_: bytes, cuts: list[int]) -> None:
    async def scenario() -> None:
        server = Http2Server(
            [Service()],
            inline={"/t.S/Inline": lambda m, _: m},
            codec=BytesCodec(),
            limits=LIMITS,
            max_message_bytes=1000,
        )
        protocol = ServerProtocol(server)
        transport = MemoryTransport(protocol)
        protocol.data_received(CLIENT_PREFACE + frame(frames.SETTINGS) + frames.SETTINGS_ACK)
        for piece in split(input_, cuts):
            if not transport.closed:
                protocol.data_received(piece)
            await give_way(3)
        parse(transport.written)
        transport.close()
        await give_way(5)
        await server.wait_idle()
        assert protocol.borrowed_bytes == 0
        assert server.protocols == set()
        assert server.serving.running == {}

    run(scenario)


@given(
    input_=st.lists(headers(RESPONSES) | data | any_frame, max_size=25).map(b"".join),
    cuts=st.lists(st.integers(1, 300), max_size=10),
)
@settings(max_examples=150)
def test_no_frames_harm_a_client(input_: bytes, cuts: list[int]) -> None:
    async def scenario() -> None:
        protocol = ClientProtocol(LIMITS)
        transport = MemoryTransport(protocol)
        protocol.data_received(frame(frames.SETTINGS) + frames.SETTINGS_ACK)
        calls = [asyncio.create_task(use(protocol)) for _ in range(3)]
        await give_way(3)
        for piece in split(input_, cuts):
            if not transport.closed:
                protocol.data_received(piece)
            await give_way(3)
        transport.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            assert outcome is None or isinstance(outcome, (StreamTerminatedError, GRPCError)), outcome
        assert protocol.borrowed_bytes == 0

    run(scenario)


async def use(protocol: ClientProtocol) -> None:
    """Make a call as grpclib's does."""
    stream = ClientStream(protocol)
    release = await stream.send_request([(":method", "POST"), (":path", "/t.S/Chat")])
    try:
        await stream.send_message(b"x", end=True)
        await stream.recv_headers()
        while await stream.receive_message() is not None:
            pass
        await stream.recv_trailers()
    finally:
        if stream.closable:
            stream.reset_nowait()
        release()


@pytest.mark.parametrize("has_started", [False, True])
async def test_a_call_that_is_ended_is_told_whether_it_had_begun(has_started: bool) -> None:
    server = Http2Server([Service()], codec=BytesCodec(), limits=LIMITS)
    protocol = ServerProtocol(server)
    transport = MemoryTransport(protocol)
    protocol.data_received(CLIENT_PREFACE + frame(frames.SETTINGS) + frames.SETTINGS_ACK)
    protocol.data_received(frame(frames.HEADERS, 4, 1, REQUESTS[0]))
    if has_started:
        await asyncio.sleep(0)
    server.end_rpcs()
    await server.wait_idle()
    await give_way(3)

    last = parse(transport.written)[-2:] if has_started else parse(transport.written)[-1:]
    if has_started:
        assert b"grpc-status\x0214" in last[0].payload
    assert (last[-1].kind, last[-1].code) == (frames.RST_STREAM, 0 if has_started else 7)


async def test_a_bug_of_ours_ends_one_connection(caplog: pytest.LogCaptureFixture) -> None:
    server = Http2Server([Service()], codec=BytesCodec(), limits=LIMITS)
    protocol = ServerProtocol(server)
    transport = MemoryTransport(protocol)
    protocol.data_received(CLIENT_PREFACE + frame(frames.SETTINGS) + frames.SETTINGS_ACK)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    vars(server.serving)["start"] = fail
    protocol.data_received(frame(frames.HEADERS, 4, 1, REQUESTS[0]))

    last = parse(transport.written)[-1]
    assert (last.kind, last.code) == (frames.GOAWAY, 2)
    assert transport.closed
    assert "ZeroDivisionError" in caplog.text
