"""The HTTP port's bounds: how many connections, and how long they may be idle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from lathe_shared.http_port import MAX_CONNECTIONS, HttpPort, _connections_for
from lathe_shared.metrics import ServiceMetrics

HOST = "127.0.0.1"
# Nothing here comes near it; it only ends a test that hangs.
DEADLINE_SECONDS = 30.0
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """Serve, and yield what makes a connection; all of them are closed at the end."""
    port = HttpPort(ServiceMetrics("test", CollectorRegistry()), lambda: True, dict, **bounds)
    number = await port.start(HOST, 0)
    connections: list[Connection] = []

    async def connect() -> Connection:
        connections.append(Connection(*await asyncio.open_connection(HOST, number)))
        return connections[-1]

    try:
        yield connect
    finally:
        for connection in connections:
            await connection.close()
        await port.close()


class Connection:
    """A connection for bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def is_answered(self) -> bool:
        """Ask how the service is; False if the connection is closed instead."""
        try:
            await self.send(REQUEST)
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await self._reader.readuntil(b"ok\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            return False
        return answer.startswith(b"HTTP/1.1 200")

    async def end(self) -> bytes:
        """Read to the end of the connection."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def test_connections_beyond_the_limit_are_closed_as_they_come() -> None:
    async with serving(max_connections=3) as connect:
        connections = [await connect() for _ in range(3)]
        assert [await connection.is_answered() for connection in connections] == [True] * 3
        for _ in range(5):
            assert await (await connect()).end() == b""
        assert [await connection.is_answered() for connection in connections] == [True] * 3, "these go on"

        await connections.pop().close()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await (await connect()).is_answered():
                pass


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n", REQUEST],
    ids=["nothing", "half a line", "half a head", "a request"],
)
async def test_a_connection_without_a_request_is_closed(sent: bytes) -> None:
    async with serving(idle_seconds=0.05) as connect:
        connection = await connect()
        await connection.send(sent)
        assert (await connection.end()).count(b"200 OK") == sent.count(REQUEST)


async def test_what_is_no_http_is_answered_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as connect:
        for sent in (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
            connection = await connect()
            await connection.send(sent)
            assert (await connection.end()).startswith(b"HTTP/1.0 400")
        assert await (await connect()).is_answered()
    assert not caplog.records


async def test_an_error_of_ours_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_request: web.Request) -> web.Response:
        raise RuntimeError("deliberate")

    async with serving(routes=[web.get("/fail", fail)]) as connect:
        connection = await connect()
        await connection.send(b"GET /fail HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await connection.end()).startswith(b"HTTP/1.1 500")
    assert "deliberate" in caplog.text


async def test_a_head_that_comes_byte_by_byte_has_no_more_time() -> None:
    async with serving(idle_seconds=0.05) as connect:
        connection = await connect()
        await connection.send(b"GET /healthz HTTP/1.1\r\nX: ")
        ended = asyncio.create_task(connection.end())
        while not (await asyncio.wait([ended], timeout=0.01))[0]:
            with contextlib.suppress(ConnectionError):
                await connection.send(b"G")
        assert await ended == b""


@pytest.mark.parametrize(
    ("max_open_files", "connections"), [(-1, MAX_CONNECTIONS), (1 << 20, MAX_CONNECTIONS), (1024, 256), (2, 1)]
)
def test_connections_leave_descriptors_to_others(max_open_files: int, connections: int) -> None:
    assert _connections_for(max_open_files) == connections
