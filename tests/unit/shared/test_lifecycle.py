"""A service's life, mostly as a process of its own: signals and exit codes are part of it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry
from tests.unit.shared import service_under_test
from tests.unit.shared.service_under_test import Settings

from lathe_shared.config_loading import ServiceSettings
from lathe_shared.lifecycle import ServiceRuntime, StartError

WAIT_SECONDS = 30


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        service_under_test.__file__,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


@asynccontextmanager
async def connected(port: object) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


async def event(running: asyncio.subprocess.Process, name: str) -> dict[str, Any]:
    """Read the log up to an event."""
    assert running.stdout is not None
    while line := await running.stdout.readline():
        record: dict[str, Any] = json.loads(line)
        if record["event"] == name:
            return record
    raise AssertionError(f"the log ended without {name}")


async def test_a_service_may_open_as_many_files_as_the_system_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        async with process() as running:
            await event(running, "ready")
            assert resource.prlimit(running.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_sigterm_drains_and_ends_with_zero() -> None:
    async with process("--drain-seconds=20") as running:
        ready = await event(running, "ready")
        async with connected(ready["grpc_port"]) as channel:
            pending = asyncio.ensure_future(channel.unary_unary("/lathe.test.Slow/Wait")(b"x"))
            await event(running, "call_begun")
            running.send_signal(signal.SIGTERM)
            await event(running, "draining")
            async with aiohttp.ClientSession() as http:
                async with http.get(f"http://127.0.0.1:{ready['http_port']}/healthz") as response:
                    assert response.status == 503
                async with http.get(f"http://127.0.0.1:{ready['http_port']}/finish") as response:
                    assert response.status == 200

            assert await pending == b"finished"
        await event(running, "closed_second")
        await event(running, "closed_first")
        assert await running.wait() == 0


async def test_what_does_not_finish_is_ended_when_the_time_is_up() -> None:
    async with process("--drain-seconds=0.1") as running:
        ready = await event(running, "ready")
        async with connected(ready["grpc_port"]) as channel:
            pending = asyncio.ensure_future(channel.unary_unary("/lathe.test.Slow/Wait")(b"x"))
            await event(running, "call_begun")
            running.send_signal(signal.SIGINT)

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pending
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await running.wait() == 0


async def test_a_second_signal_ends_at_once() -> None:
    async with process("--drain-seconds=1000") as running:
        ready = await event(running, "ready")
        async with connected(ready["grpc_port"]) as channel:
            pending = asyncio.ensure_future(channel.unary_unary("/lathe.test.Slow/Wait")(b"x"))
            await event(running, "call_begun")
            running.send_signal(signal.SIGTERM)
            await event(running, "draining")
            running.send_signal(signal.SIGTERM)

            assert await running.wait() == 128 + signal.SIGTERM
            with pytest.raises(grpc.aio.AioRpcError):
                await pending


async def test_a_port_in_use_is_one_clear_line_and_exit_code_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with process(f"--port={port}") as running:
            _, errors = await running.communicate()

    assert running.returncode == 1
    assert errors.decode() == f"lathe-cas: cannot listen on 127.0.0.1:{port} (grpc): address already in use\n"


async def test_a_failing_background_task_ends_the_service_with_one() -> None:
    async with process("--fail-in-background") as running:
        failed = await event(running, "task_failed")

        assert "deliberate" in str(failed["exception"])
        assert await running.wait() == 1


async def test_a_failing_build_ends_the_service_with_one() -> None:
    async with process("--fail-in-build") as running:
        output, errors = await running.communicate()

    assert running.returncode == 1
    assert "closed_first" in output.decode()
    assert errors.decode() == "lathe-cas: cannot use the data directory\n"


async def test_a_stop_before_the_start_is_done_is_orderly_too() -> None:
    async with process("--hang-in-build") as running:
        await event(running, "hanging")
        running.send_signal(signal.SIGTERM)
        await event(running, "closed_first")

        assert await running.wait() == 0


def runtime_of(drain_seconds: float = 0) -> ServiceRuntime:
    return ServiceRuntime(Settings(host="127.0.0.1", port=0, drain_seconds=drain_seconds), CollectorRegistry())


async def test_health_follows_the_service() -> None:
    runtime = runtime_of()
    runtime.add_http_port(lambda: {"answer": 42})
    runtime.add_grpc_port([], 0)
    await runtime.start()
    url = f"http://127.0.0.1:{runtime.ports['http']}"
    async with aiohttp.ClientSession() as http:
        async with http.get(url + "/healthz") as response:
            assert (response.status, await response.text()) == (200, "ok\n")
        async with http.get(url + "/status") as response:
            assert await response.json() == {"answer": 42}
        async with http.get(url + "/metrics") as response:
            assert "lathe_cas_rpc_seconds" in await response.text()
            assert response.headers["Content-Type"].startswith("text/plain; version=")

    assert await runtime.stop()


async def test_several_grpc_ports_serve_side_by_side() -> None:
    runtime = runtime_of()
    runtime.add_grpc_port([], 0)
    runtime.add_grpc_port([], 0, name="worker_api")
    await runtime.start()

    for name in ("grpc", "worker_api"):
        async with connected(runtime.ports[name]) as channel:
            assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
    assert await runtime.stop()


async def test_a_part_that_cannot_drain_does_not_keep_the_others_from_it() -> None:
    runtime = runtime_of(drain_seconds=20)
    drained: list[str] = []

    async def bad() -> None:
        raise RuntimeError("deliberate")

    async def good() -> None:
        drained.append("good")

    runtime.on_drain(bad)
    runtime.on_drain(good)
    await runtime.start()
    await runtime.stop()

    assert drained == ["good"]


async def test_a_port_that_cannot_be_bound_closes_what_was_opened() -> None:
    runtime = runtime_of()
    closed: list[str] = []
    runtime.on_close(lambda: closed.append("first"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        runtime.add_grpc_port([], taken.getsockname()[1])
        with pytest.raises(StartError, match="address already in use"):
            await runtime.start()
    await runtime.stop()

    assert closed == ["first"]
    assert issubclass(Settings, ServiceSettings)
