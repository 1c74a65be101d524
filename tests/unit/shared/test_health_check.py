"""``lathe-health-check`` against the health service, and against what is none."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from lathe_shared import health_check
from lathe_shared.endpoint import Endpoint
from lathe_shared.grpc_transport import Engine
from lathe_shared.health import HealthServicer, ServingStatus
from lathe_shared.testing.serving import LOOPBACK, serve

SHORT_SECONDS = 0.2
"""For peers that never answer."""


async def check(target: object, *options: str) -> int:
    return await asyncio.to_thread(health_check.main, [*options, str(target)])


async def test_it_follows_the_health_service(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    health = HealthServicer()
    async with serve([health]) as endpoint:
        assert await check(endpoint) == 1
        assert capsys.readouterr().out.endswith(f"{endpoint}: NOT_SERVING\n")
        health.set_all(ServingStatus(ServingStatus.SERVING))
        assert await check(endpoint) == 0
        assert capsys.readouterr().out.endswith(f"{endpoint}: SERVING\n")
        health.set_all(ServingStatus(ServingStatus.UNKNOWN))
        assert await check(endpoint) == 1
        assert capsys.readouterr().out.endswith(f"{endpoint}: UNKNOWN\n")


async def test_a_server_without_the_service_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    async with serve([]) as endpoint:
        assert await check(endpoint) == 1
    assert "gRPC status 12" in capsys.readouterr().out


async def test_it_reads_healthz(capsys: pytest.CaptureFixture[str]) -> None:
    healthy = False

    async def healthz(_request: web.Request) -> web.Response:
        return web.Response(status=200 if healthy else 503)

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, 0).start()
    url = f"http://{LOOPBACK}:{runner.addresses[0][1]}/healthz"
    try:
        assert await check(url) == 1
        healthy = True
        assert await check(url) == 0
        assert capsys.readouterr().out == f"{url}: NOT_SERVING\n{url}: SERVING\n"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def answering(answer: Callable[[asyncio.StreamWriter], None]) -> AsyncIterator[Endpoint]:
    """Serve whatever a peer that is no health service says."""
    writers: list[asyncio.StreamWriter] = []

    async def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        answer(writer)

    server = await asyncio.start_server(connected, LOOPBACK, 0)
    try:
        yield Endpoint(LOOPBACK, server.sockets[0].getsockname()[1])
    finally:
        for writer in writers:
            writer.close()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("scheme", ["", "http://"])
async def test_a_peer_that_says_nothing_is_given_up(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with answering(lambda _writer: None) as endpoint:
        assert await check(f"{scheme}{endpoint}", f"--timeout={SHORT_SECONDS}") == 1
    assert "no answer in time" in capsys.readouterr().out


async def test_a_peer_that_hangs_up_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    async with answering(lambda writer: writer.close()) as endpoint:
        assert await check(endpoint) == 1
    assert str(endpoint) in capsys.readouterr().out


async def test_a_peer_that_speaks_http_1_is_not_healthy() -> None:
    async with answering(lambda writer: writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as endpoint:
        assert await check(endpoint) == 1


async def test_nobody_there_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind((LOOPBACK, 0))  # bound and not listening: nobody else can take it
        for scheme in ("", "http://"):
            assert await check(f"{scheme}{LOOPBACK}:{unused.getsockname()[1]}") == 1
    assert capsys.readouterr().out.count("connection refused") == 2


def test_wrong_usage_has_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["host:port"], ["--timeout=soon", "localhost"]):
        with pytest.raises(SystemExit) as caught:
            health_check.main(arguments)
        assert caught.value.code == 2
    assert "usage: lathe-health-check" in capsys.readouterr().err


def test_it_loads_none_of_the_libraries_that_take_long() -> None:
    script = "import sys, lathe_shared.health_check; print([n for n in sys.argv[1:] if n in sys.modules])"
    slow = ("pydantic", "aiohttp", "grpclib", "betterproto", "uvloop", "cryptography", "structlog")
    said = subprocess.run([sys.executable, "-c", script, *slow], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
