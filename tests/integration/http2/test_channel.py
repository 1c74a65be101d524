"""Our channel: one connection for all, remade with growing distance, and calls that end when their server goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from grpclib.events import RecvMessage, SendMessage, SendRequest, listen
from grpclib.exceptions import GRPCError, StreamTerminatedError
from tests.integration.http2.services import BytesCodec, Service, begin, call, channel_to, served, until

from lathe_shared.http2.channel import Backoff, Http2Channel
from lathe_shared.http2.limits import SERVER_LIMITS


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_the_distance_between_attempts_grows_to_its_limit_with_chance_in_it() -> None:
    backoff = Backoff(first_seconds=1, factor=2, limit_seconds=10, jitter=0.5)

    assert [backoff.wait_seconds(failures, 0) for failures in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert [backoff.wait_seconds(failures, 1) for failures in (1, 2, 10_000)] == [0.5, 1, 5]


class Waits:
    """Takes the place of sleeping, and remembers for how long."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@asynccontextmanager
async def to_nobody() -> AsyncIterator[tuple[Http2Channel, Waits]]:
    waits = Waits()
    backoff = Backoff(first_seconds=1000, factor=2, limit_seconds=8000)
    channel = Http2Channel("127.0.0.1", free_port(), codec=BytesCodec(), sleep=waits, draw=lambda: 0.0, backoff=backoff)
    yield channel, waits
    channel.close()


async def test_each_call_makes_one_attempt_and_the_attempts_keep_their_distance() -> None:
    async with to_nobody() as (channel, waits):
        for _ in range(5):
            with pytest.raises(ConnectionRefusedError):
                await call(channel, "Echo")

    assert [round(seconds, -3) for seconds in waits.seconds] == [1000, 2000, 4000, 8000]


async def test_calls_that_come_together_share_an_attempt() -> None:
    async with to_nobody() as (channel, waits):
        for _ in range(3):
            outcomes = await asyncio.gather(*[call(channel, "Echo") for _ in range(20)], return_exceptions=True)
            assert all(isinstance(outcome, ConnectionRefusedError) for outcome in outcomes)

    assert len(waits.seconds) == 2


async def test_a_lost_connection_is_remade_at_once_and_a_good_one_resets_the_distance() -> None:
    waits = Waits()
    service = Service()
    async with served(service) as server, channel_to(server.port, sleep=waits) as channel:
        for _ in range(5):
            assert await call(channel, "Echo") == b"x"
            for protocol in list(server.protocols):
                protocol.close()
            await until(lambda: not server.protocols and not channel._connected)
        assert await call(channel, "Echo") == b"x"

    assert waits.seconds == []


async def test_a_caller_that_gives_up_leaves_the_attempt_to_the_others() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as channel:
        first = asyncio.create_task(call(channel, "Echo"))
        second = asyncio.create_task(call(channel, "Echo"))
        await asyncio.sleep(0)
        first.cancel()

        assert await second == b"x"


async def test_calls_wait_for_the_streams_that_the_server_allows() -> None:
    service = Service()
    limits = replace(SERVER_LIMITS, max_concurrent_streams=3)
    async with served(service, limits=limits) as server, channel_to(server.port) as channel:
        assert await call(channel, "Echo") == b"x"
        answers = await asyncio.gather(*[call(channel, "Echo", str(n).encode()) for n in range(100)])
        assert answers == [str(n).encode() for n in range(100)]

        hanging = [asyncio.create_task(call(channel, "Hang")) for _ in range(3)]
        await service.started.wait()
        waiting = asyncio.create_task(call(channel, "Echo"))
        given_up = asyncio.create_task(call(channel, "Echo"))
        await asyncio.sleep(0)
        given_up.cancel()
        service.go_on.set()

        assert await waiting == b"x"
        assert await asyncio.gather(*hanging) == [b"went on"] * 3


async def test_a_call_goes_on_while_its_server_drains_and_the_next_finds_another() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as channel:
        hanging = asyncio.create_task(call(channel, "Hang"))
        await service.started.wait()
        server.begin_drain()
        await until(lambda: not channel._connected)
        with pytest.raises(ConnectionRefusedError):
            await call(channel, "Echo")
        service.go_on.set()

        assert await hanging == b"went on"
        await until(lambda: not server.protocols)


async def test_a_call_ends_with_its_connection() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as channel:
        hanging = asyncio.create_task(call(channel, "Hang"))
        async with begin(channel, "Chat") as chat:
            await chat.send_message(b"x")
            assert await chat.recv_message() == b"X"
            await service.started.wait()
            for protocol in list(server.protocols):
                assert protocol.transport is not None
                protocol.transport.abort()
            with pytest.raises(StreamTerminatedError):
                await chat.recv_message()
            with pytest.raises(StreamTerminatedError):
                await chat.send_message(b"x")
            await chat.cancel()
        with pytest.raises(StreamTerminatedError):
            await hanging


async def test_closing_the_channel_ends_its_calls_and_a_new_call_opens_it_again() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as channel:
        hanging = asyncio.create_task(call(channel, "Hang"))
        await service.started.wait()
        channel.close()
        with pytest.raises(StreamTerminatedError, match="Connection closed"):
            await hanging

        assert await call(channel, "Echo") == b"x"


async def test_closing_the_channel_ends_the_calls_that_wait_for_a_connection() -> None:
    forever = asyncio.Event()

    async def sleep(_seconds: float) -> None:
        await forever.wait()

    channel = Http2Channel("127.0.0.1", free_port(), codec=BytesCodec(), sleep=sleep)
    with pytest.raises(ConnectionRefusedError):
        await call(channel, "Echo")
    waiting = asyncio.create_task(call(channel, "Echo"))
    await until(lambda: channel._attempt is not None)
    channel.close()

    with pytest.raises(StreamTerminatedError, match="closed"):
        await waiting


async def test_a_large_answer_is_refused_and_the_connection_lives() -> None:
    async with served(Service()) as server, channel_to(server.port, max_message_bytes=100) as channel:
        with pytest.raises(GRPCError, match="larger than the 100 bytes"):
            await call(channel, "Echo", b"x" * 101)
        assert await call(channel, "Echo", b"x" * 100) == b"x" * 100


async def test_a_receiver_that_is_slow_holds_its_server_to_the_windows() -> None:
    service = Service()
    async with served(service) as server, channel_to(server.port) as channel:
        with pytest.raises(asyncio.CancelledError):
            await read_slowly(channel, service)


async def read_slowly(channel: Http2Channel, service: Service) -> None:
    async with begin(channel, "Pour") as stream:
        await stream.send_message(b"100000", end=True)
        for _ in range(100):
            assert await stream.recv_message() == b"x" * 100_000
            for _ in range(10):
                await call(channel, "Echo")
            assert service.poured <= 100 * 100_000 + channel.limits.stream_window_bytes
        raise asyncio.CancelledError


async def test_listeners_to_events_see_every_call() -> None:
    seen: list[Any] = []

    async def note(event: Any) -> None:
        seen.append(type(event).__name__)
        if isinstance(event, SendRequest):
            event.metadata["text"] = "t"

    async with served(Service()) as server, channel_to(server.port) as channel:
        for kind in (SendRequest, SendMessage, RecvMessage):
            listen(channel, kind, note)
        assert await call(channel, "Echo") == b"x"

    assert seen == ["SendRequest", "SendMessage", "RecvMessage"]
