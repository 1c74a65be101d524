"""The stream of messages under grpclib's calls, on both sides, without sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import StreamClosedError
from tests.unit.shared.http2.memory_transport import MemoryTransport
from tests.unit.shared.http2.raw_frames import RESPONSE, TRAILERS, parse

from lathe_shared.http2 import frames
from lathe_shared.http2.channel import ClientProtocol
from lathe_shared.http2.client_call import ClientStream
from lathe_shared.http2.frames import frame, goaway, rst_stream, window_update
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.limits import CLIENT_LIMITS, Limits
from lathe_shared.http2.settings import settings_frame

HEADERS = [(":method", "POST"), (":path", "/t.S/m")]


class Calling:
    """A client's stream that is open, and the server's side of it."""

    def __init__(self, settings: dict[int, int] | None = None) -> None:
        self.protocol = ClientProtocol(CLIENT_LIMITS)
        self.transport = MemoryTransport(self.protocol)
        self.send(settings_frame(settings or {}) + frames.SETTINGS_ACK)
        self.stream = ClientStream(self.protocol)

    def send(self, data: bytes) -> None:
        self.protocol.data_received(data)

    def respond(self, *bodies: bytes) -> None:
        self.send(frame(frames.HEADERS, 4, 1, literal_block(RESPONSE)))
        for body in bodies:
            self.send(frame(frames.DATA, 0, 1, body))

    def end(self) -> None:
        self.send(frame(frames.HEADERS, 5, 1, literal_block(TRAILERS)))


async def calling(settings: dict[int, int] | None = None) -> Calling:
    call = Calling(settings)
    await call.stream.send_request(HEADERS)
    return call


async def test_bytes_are_read_without_regard_to_messages() -> None:
    call = await calling()
    reading = asyncio.create_task(call.stream.recv_data(5))
    await asyncio.sleep(0)
    call.respond(b"ab", b"cdefg")
    assert await reading == b"abcde"
    assert await call.stream.recv_data(2) == b"fg"
    call.end()

    assert await call.stream.recv_data(3) == b""


async def test_only_one_may_receive() -> None:
    call = await calling()
    first = asyncio.create_task(call.stream.receive_message())
    await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="two coroutines"):
        await call.stream.receive_message()
    first.cancel()


async def test_a_response_that_is_cut_off_is_an_error() -> None:
    call = await calling()
    call.respond(b"\0\0\0\0\5hel")
    call.end()

    with pytest.raises(GRPCError, match="ended in the middle"):
        await call.stream.receive_message()


async def test_sending_waits_for_the_window_and_ends_with_the_stream() -> None:
    call = await calling({4: 10})
    sending = asyncio.create_task(call.stream.send_message(b"x" * 10))
    await asyncio.sleep(0)
    assert not sending.done()
    call.send(window_update(1, 5))
    await sending

    sending = asyncio.create_task(call.stream.send_message(b"x" * 10))
    await asyncio.sleep(0)
    call.send(rst_stream(1, 8))
    with pytest.raises(StreamTerminatedError, match="CANCEL"):
        await sending
    for receive in (call.stream.receive_message, call.stream.recv_headers, call.stream.recv_trailers):
        with pytest.raises(StreamTerminatedError, match="CANCEL"):
            await receive()
    with pytest.raises(StreamTerminatedError, match="CANCEL"):
        await call.stream.recv_data(1)


async def test_sending_waits_for_the_transport() -> None:
    call = await calling()
    call.protocol.pause_writing()
    sending = asyncio.create_task(call.stream.send_message(b"x"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not sending.done()
    call.protocol.resume_writing()

    await sending


async def test_nothing_is_sent_after_the_end() -> None:
    call = await calling()
    await call.stream.end()

    with pytest.raises(StreamClosedError):
        await call.stream.send_message(b"x")
    with pytest.raises(StreamClosedError):
        await call.stream.end()


async def test_an_end_that_waits_for_the_window_is_an_end() -> None:
    call = await calling({4: 0})
    sending = asyncio.create_task(call.stream.send_message(b"x", end=True))
    await asyncio.sleep(0)

    with pytest.raises(StreamClosedError):
        await call.stream.send_message(b"y")
    sending.cancel()


async def test_a_whole_answer_stands_though_its_server_wants_no_more() -> None:
    call = await calling({4: 10})
    sending = asyncio.create_task(call.stream.send_message(b"x" * 100))
    await asyncio.sleep(0)
    call.respond(b"\0\0\0\0\2ok")
    call.end()
    call.send(rst_stream(1, 0))

    await sending
    assert await call.stream.receive_message() == b"ok"
    assert await call.stream.receive_message() is None
    assert await call.stream.recv_trailers() == [("grpc-status", "0")]
    assert not call.stream.closable


async def test_trailers_are_waited_for_past_messages_that_nobody_reads() -> None:
    call = await calling()
    waiting = asyncio.create_task(call.stream.recv_trailers())
    await asyncio.sleep(0)
    call.respond(*[frames_of(b"x" * 100_000) for _ in range(100)])
    call.end()

    assert await waiting == [("grpc-status", "0")]
    given = sum(
        int.from_bytes(sent.payload, "big")
        for sent in parse(call.transport.written.removeprefix(frames.CLIENT_PREFACE))
        if sent.kind == frames.WINDOW_UPDATE and sent.stream_id == 0
    )
    assert given > 10_000_000


def frames_of(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


async def test_a_goaway_with_an_error_tells_calls_what_it_was() -> None:
    call = await calling()
    receiving = asyncio.create_task(call.stream.receive_message())
    await asyncio.sleep(0)
    call.send(goaway(0, 11, b"too many pings"))

    with pytest.raises(StreamTerminatedError, match="ENHANCE_YOUR_CALM too many pings"):
        await receiving
    with pytest.raises(StreamTerminatedError, match="ENHANCE_YOUR_CALM"):
        await ClientStream(call.protocol).send_request(HEADERS)


async def test_a_reset_from_this_side_wakes_whoever_waits() -> None:
    call = await calling()
    receiving = asyncio.create_task(call.stream.receive_message())
    headers = asyncio.create_task(call.stream.recv_headers())
    await asyncio.sleep(0)
    await call.stream.reset()

    for waiting in (receiving, headers):
        with pytest.raises(StreamTerminatedError):
            await waiting


async def test_a_message_under_way_holds_a_stream_up_only_while_the_peer_may_send() -> None:
    call = await calling()
    call.respond(b"\0\0\0\0\5he")
    assert call.stream.progress_mark() is None
    receiving = asyncio.create_task(call.stream.receive_message())
    await asyncio.sleep(0)
    assert call.stream.progress_mark() == 2
    call.protocol.http2.receive_window = 0
    assert call.stream.progress_mark() is None
    receiving.cancel()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_frame_bytes": 16_383},
        {"max_frame_bytes": 1 << 24},
        {"stream_window_bytes": 65_534},
        {"connection_window_bytes": 1 << 31},
        {"max_concurrent_streams": 0},
    ],
    ids=str,
)
def test_limits_that_http2_does_not_allow_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)
