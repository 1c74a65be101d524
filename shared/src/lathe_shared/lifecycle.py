"""The life of a service process: start, serve, drain, close.

A service's ``app.py`` builds its parts onto a ``ServiceRuntime``, in the order in which they depend on each other;
everything stops in reverse. A stop is orderly and bounded:

1. health says NOT_SERVING, the ports accept no more connections, clients get GOAWAY, new RPCs are refused;
2. what drains by itself (``on_drain``) and RPCs that run may finish, within ``drain_seconds``;
3. RPCs that still run end with UNAVAILABLE, background tasks are cancelled;
4. what was opened (``enter``, ``on_close``) is closed, the last first.

A second signal ends the process at once; whatever a service stores must survive that anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import structlog
import uvloop

from lathe_shared.grpc_transport import DEFAULT_MAX_MESSAGE_BYTES, Engine, GrpcServer
from lathe_shared.health import HealthServicer, ServingStatus
from lathe_shared.http_port import CombineFunction, GroupStatus, HttpPort, StatusFunction
from lathe_shared.log_config import configure_logging
from lathe_shared.metrics import ServiceMetrics
from lathe_shared.rpc_observer import RpcObserver
from lathe_shared.service_boundary import Servicer, make_server, methods

if TYPE_CHECKING:
    import socket
    import ssl

    from aiohttp import web
    from prometheus_client import CollectorRegistry

    from lathe_shared.config_loading import ServiceSettings
    from lathe_shared.group_member import GroupMember

T = TypeVar("T")

BACKLOG = 1024
"""Connections that may wait to be accepted: a build farm reconnecting at once."""

LAST_RESPONSE_SECONDS = 1.0
"""How long RPCs that were ended may take to say so to their clients."""

CANCEL_SECONDS = 5.0
"""How long cancelled background tasks may take to clean up."""

_log = structlog.get_logger("lathe.lifecycle")


class StartError(Exception):
    """The service cannot start, for a reason that the operator can mend; the message is all that they are shown."""


@dataclass(slots=True)
class _GrpcPort:
    name: str
    host: str
    port: int
    server: GrpcServer
    long_lived: frozenset[str]
    ssl: ssl.SSLContext | None


@dataclass(slots=True)
class _HttpPort:
    host: str
    port: int
    http: HttpPort


class ServiceRuntime:
    """What a service is built onto.

    Args:
        settings: The service's settings.
        registry: Where its metrics are collected; tests give their own.
        member: Its place among several processes that serve as one; None for a process that serves alone.

    Attributes:
        settings: As given.
        member: As given.
        metrics: For metrics of the service's own.
        health: For services that know better than the process how they are.
        ports: The bound ports by name, once started.
        stopping: Set when the service begins to stop.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        registry: CollectorRegistry | None = None,
        member: GroupMember | None = None,
    ) -> None:
        self.settings = settings
        self.member = member
        self.metrics = ServiceMetrics(settings.service, registry)
        self.health = HealthServicer()
        self.ports: dict[str, int] = {}
        self.stopping = asyncio.Event()
        self._observer = RpcObserver(self.metrics)
        self._resources = AsyncExitStack()
        self._grpc_ports: list[_GrpcPort] = []
        self._http_port: _HttpPort | None = None
        self._drains: list[Callable[[], Awaitable[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    # Building

    async def enter(self, resource: AbstractAsyncContextManager[T]) -> T:
        """Open something now, and have it closed when the service stops, after everything that was added later."""
        return await self._resources.enter_async_context(resource)

    def on_close(self, close: Callable[[], Awaitable[None] | None]) -> None:
        """Have a function called, and awaited if need be, when the service stops; the one added last comes first."""

        async def call() -> None:
            result = close()
            if result is not None:
                await result

        self._resources.push_async_callback(call)

    def on_drain(self, drain: Callable[[], Awaitable[None]]) -> None:
        """Have a coroutine function run when the stop begins, beside the RPCs that finish.

        It is cancelled when ``drain_seconds`` are over.
        """
        self._drains.append(drain)

    def add_task(self, name: str, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something in the background until the service stops, when it is cancelled.

        If it fails, the service stops with exit code 1; it may return when it is done.
        """
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def add_grpc_port(
        self,
        servicers: Iterable[Servicer],
        port: int,
        *,
        name: str = "grpc",
        host: str | None = None,
        ssl: ssl.SSLContext | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """Serve services, and the health service beside them, on a port that opens when everything is built.

        Args:
            servicers: The services of this port.
            port: The port; 0 lets the kernel choose.
            name: For logs and ``ports``.
            host: Address to listen on; the settings' if absent.
            ssl: What TLS needs; None for a plain port.
            max_message_bytes: Bound on one received message.
        """
        _raise_descriptor_limit()
        served = [*servicers, self.health]
        for servicer in served:
            self.health.add(servicer.service_name)
        long_lived = frozenset(path for path, rpc in methods(served).items() if rpc.long_lived)
        server = make_server(
            served,
            self._observer,
            max_message_bytes=max_message_bytes,
            engine=Engine(self.settings.grpc_engine),
        )
        self._grpc_ports.append(_GrpcPort(name, host or self.settings.host, port, server, long_lived, ssl))

    def add_http_port(
        self,
        status: StatusFunction,
        *,
        routes: Iterable[web.RouteDef] = (),
        is_healthy: Callable[[], bool] = lambda: True,
        combine: CombineFunction | None = None,
    ) -> None:
        """Serve /metrics, /healthz and /status on the settings' ``http_port``, from before the gRPC ports open.

        Args:
            status: What ``/status`` shows.
            routes: Further routes.
            is_healthy: What ``/healthz`` needs beside a service that is started and not stopping.
            combine: Makes one status of those of several processes; for services that can be several.
        """
        group = None
        if self.member is not None and combine is not None:
            group = GroupStatus(self.member, combine)
        http = HttpPort(self.metrics, lambda: self.health.is_serving and is_healthy(), status, routes, group)
        self._http_port = _HttpPort(self.settings.host, self.settings.http_port, http)

    # Running

    async def start(self) -> None:
        """Open the ports and say that the service is ready.

        Raises:
            StartError: A port cannot be bound.
        """
        if self._http_port is not None:
            entry = self._http_port
            sock = self._inherited("http")
            self.ports["http"] = await _bind(
                "http", entry.host, entry.port, entry.http.start(entry.host, entry.port, sock)
            )
        for port in self._grpc_ports:
            sock = self._inherited(port.name)
            self.ports[port.name] = await _bind(port.name, port.host, port.port, _start_server(port, sock))
        self.health.set_all(ServingStatus(ServingStatus.SERVING))
        if self.member is None:
            _log.info("ready", host=self.settings.host, **{f"{name}_port": port for name, port in self.ports.items()})
        else:
            _log.info("process_ready", pid=os.getpid())
            self.member.on_ready()

    def _inherited(self, name: str) -> socket.socket | None:
        return None if self.member is None else self.member.sockets[name]

    async def wait_stopped(self) -> None:
        """Wait until somebody asks for a stop, or a background task has failed."""
        await self.stopping.wait()

    async def stop(self) -> bool:
        """Drain and close everything, as the module says.

        Returns:
            Whether the service was well: no background task failed and everything closed.
        """
        self.stopping.set()
        try:
            self.health.set_all(ServingStatus(ServingStatus.NOT_SERVING))
            _log.info("draining", seconds=self.settings.drain_seconds)
            await self._drain()
            await self._end_rpcs()
            await self._cancel_tasks()
            if self._http_port is not None:
                await self._http_port.http.close()
            if self.member is not None:
                await self.member.aclose()
        finally:
            await self._resources.aclose()
        _log.info("stopped")
        return self._failure is None

    async def _drain(self) -> None:
        for port in self._grpc_ports:
            port.server.begin_drain()
        try:
            async with asyncio.timeout(self.settings.drain_seconds), asyncio.TaskGroup() as group:
                for drain in self._drains:
                    group.create_task(_run_drain(drain))
                for port in self._grpc_ports:
                    group.create_task(port.server.wait_idle(port.long_lived))
        except TimeoutError:
            running = sorted(method for port in self._grpc_ports for method in port.server.running_methods())
            _log.warning("drain_timed_out", seconds=self.settings.drain_seconds, running=running[:20])

    async def _end_rpcs(self) -> None:
        for port in self._grpc_ports:
            port.server.end_rpcs()
        try:
            async with asyncio.timeout(LAST_RESPONSE_SECONDS):
                for port in self._grpc_ports:
                    await port.server.wait_idle()
        except TimeoutError:
            running = sorted(method for port in self._grpc_ports for method in port.server.running_methods())
            _log.warning("rpcs_abandoned", running=running[:20])
        for port in self._grpc_ports:
            await port.server.shut_down()

    async def _cancel_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
            for task in late:
                _log.warning("task_abandoned", task=task.get_name())

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            _log.error("task_failed", task=task.get_name(), exc_info=error)
            self._failure = self._failure or error
            self.stopping.set()


def _raise_descriptor_limit() -> None:
    """Let the process open as many files as it may: each connection is one, and 1,024 are usual.

    Only where connections are served. Programs that a worker runs inherit what it has, and some of them walk through
    all descriptors that they might have.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _run_drain(drain: Callable[[], Awaitable[None]]) -> None:
    try:
        await drain()
    except Exception as error:  # noqa: BLE001 -- one part that cannot drain must not keep the others from it
        _log.error("drain_failed", exc_info=error)


async def _bind(name: str, host: str, port: int, start: Awaitable[int]) -> int:
    try:
        return await start
    except OSError as error:
        reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        raise StartError(f"cannot listen on {host}:{port} ({name}): {reason}") from None


async def _start_server(port: _GrpcPort, sock: socket.socket | None) -> int:
    if sock is None:
        await port.server.start(port.host, port.port, ssl=port.ssl, backlog=BACKLOG)
    else:
        await port.server.start(sock=sock, ssl=port.ssl, backlog=BACKLOG)
    return port.server.port


BuildFunction: TypeAlias = Callable[[ServiceRuntime], Awaitable[None]]
"""A service's composition root: puts its parts onto the runtime."""


def run_service(settings: ServiceSettings, build: BuildFunction, member: GroupMember | None = None) -> int:
    """Run a service until SIGTERM or SIGINT; what a service's ``main`` returns to the operating system.

    Args:
        settings: The service's settings.
        build: Its composition root.
        member: Its place among several processes that serve as one. Such a process leaves SIGINT, and a second signal,
            to whoever keeps them.

    Returns:
        The exit code: 0 after an orderly stop, 1 if it could not start or a part of it failed.
    """
    configure_logging(settings.service, settings.log_level, None if member is None else member.number)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, build, member))


async def _run(settings: ServiceSettings, build: BuildFunction, member: GroupMember | None) -> int:
    runtime = ServiceRuntime(settings, member=member)
    starting = asyncio.create_task(_build_and_start(runtime, build), name="start")
    _handle_signals(runtime, starting)
    try:
        await starting
        await runtime.wait_stopped()
    except asyncio.CancelledError:
        if not runtime.stopping.is_set():
            raise
    except StartError as error:
        await runtime.stop()
        sys.stderr.write(f"{settings.program()}: {error}\n")
        return 1
    except Exception as error:  # noqa: BLE001 -- the log is where an operator looks for it
        _log.error("start_failed", exc_info=error)
        await runtime.stop()
        return 1
    return 0 if await runtime.stop() else 1


async def _build_and_start(runtime: ServiceRuntime, build: BuildFunction) -> None:
    await build(runtime)
    await runtime.start()
    # What is there now stays to the end: classes, settings, generated messages, some 75,000 objects. A full collection
    # need not look through them again and again, which took 30 ms and more in the middle of requests.
    gc.collect()
    gc.freeze()


def _handle_signals(runtime: ServiceRuntime, starting: asyncio.Task[None]) -> None:
    def on_signal(number: signal.Signals) -> None:
        if runtime.stopping.is_set():
            if runtime.member is not None:
                return  # a signal to all processes is followed by the keeper's
            _log.warning("killed", signal=number.name)
            sys.stdout.flush()
            os._exit(128 + number)
        _log.info("stopping", signal=number.name)
        runtime.stopping.set()
        starting.cancel()  # if it is still under way

    for number in (signal.SIGTERM,) if runtime.member is not None else (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
