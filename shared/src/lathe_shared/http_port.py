"""The HTTP port of each service: for Prometheus, for load balancers, for people.

``/metrics`` in Prometheus's text format, ``/healthz`` with 200 or 503, ``/status`` as JSON.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from typing_extensions import override

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from lathe_shared.group_member import GroupMember
    from lathe_shared.metrics import ServiceMetrics

StatusFunction: TypeAlias = "Callable[[], dict[str, Any] | Awaitable[dict[str, Any]]]"
"""Returns what ``/status`` shows, as something that JSON can express."""

CombineFunction: TypeAlias = "Callable[[Sequence[dict[str, Any]]], dict[str, Any]]"
"""Makes one status of those of several processes, the asked one's first."""

SHUTDOWN_SECONDS = 1.0
"""How long a request in flight may still take when the port closes."""

IDLE_SECONDS = 75.0
"""How long a connection may be without a request, and the head of one may take. Who scrapes metrics comes every minute
at the latest, and keeps its connection."""

MAX_CONNECTIONS = 1_000
"""Connections at the same time, each some 30 KB: more than the jobs of many builds that use the HTTP cache."""

_SHARE_OF_DESCRIPTORS = 4
"""A quarter of the process's descriptors at most: gRPC and files need the others."""


_log = logging.getLogger("aiohttp.server")


def _is_our_fault(record: logging.LogRecord) -> bool:
    """Tell errors from requests that are no HTTP: who sent them has the answer, and could else fill the log."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


_log.addFilter(_is_our_fault)


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """How a process that is one of several speaks for all of them.

    Attributes:
        member: Knows the others.
        combine: Makes one status of theirs.
    """

    member: GroupMember
    combine: CombineFunction


class HttpPort:
    """Serves HTTP on one port.

    Args:
        metrics: What ``/metrics`` shows.
        is_healthy: What ``/healthz`` says.
        status: What ``/status`` shows.
        routes: Further routes.
        group: For one of several processes, whose ``status`` must be a plain function.
        max_connections: Bound on connections, further ones are closed as they come; None for MAX_CONNECTIONS, or fewer
            if the process may not open many files.
        idle_seconds: How long a connection may be idle.
    """

    def __init__(
        self,
        metrics: ServiceMetrics,
        is_healthy: Callable[[], bool],
        status: StatusFunction,
        routes: Iterable[web.RouteDef] = (),
        group: GroupStatus | None = None,
        *,
        max_connections: int | None = None,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._group = group
        self._metrics = metrics
        self._is_healthy = is_healthy
        self._status = status
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._serve_metrics),
                web.get("/healthz", self._serve_healthz),
                web.get("/status", self._serve_status),
                *routes,
            ]
        )
        self._runner = _BoundedRunner(
            app,
            max_connections or _connections_for(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            idle_seconds,
        )

    async def start(self, host: str, port: int, sock: socket.socket | None = None) -> int:
        """Begin to serve.

        Args:
            host: Address to listen on.
            port: The port; 0 lets the kernel choose.
            sock: A bound socket that is used in place of both.

        Returns:
            The port that was bound, which the kernel chose if ``port`` is 0.

        Raises:
            OSError: The address cannot be bound.
        """
        await self._runner.setup()
        if self._group is not None:
            await self._group.member.serve_reports(self._report)
        site = web.TCPSite(self._runner, host, port) if sock is None else web.SockSite(self._runner, sock)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop serving. Closing twice, or what never started, is fine."""
        await self._runner.cleanup()

    def _report(self) -> tuple[str, dict[str, Any]]:
        """Tell the other processes what this one knows."""
        return self._metrics.exposition().decode(), cast("dict[str, Any]", self._status())

    async def _serve_metrics(self, _request: web.Request) -> web.Response:
        body = self._metrics.exposition()
        if self._group is not None:
            from lathe_shared.group_member import exposition_of  # with it Prometheus' parser, which most do without

            member = self._group.member
            reports = [(member.number, body.decode())]
            reports += [(other.number, other.metrics) for other in await member.others()]
            body = exposition_of(reports, self._metrics.common)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _serve_healthz(self, _request: web.Request) -> web.Response:
        if self._is_healthy():
            return web.Response(text="ok\n")
        return web.Response(text="not serving\n", status=503)

    async def _serve_status(self, _request: web.Request) -> web.Response:
        status = self._status()
        if inspect.isawaitable(status):
            status = await status
        if self._group is not None:
            status = self._group.combine([status, *(other.status for other in await self._group.member.others())])
        return web.json_response(status, dumps=lambda value: json.dumps(value, default=str, indent=2) + "\n")


class _BoundedRunner(web.AppRunner):
    """aiohttp's runner, with a bound on connections."""

    __slots__ = ("_max_connections",)

    def __init__(self, app: web.Application, max_connections: int, idle_seconds: float) -> None:
        # aiohttp counts what it calls keep-alive from the beginning of a connection, too, until a head is whole.
        super().__init__(
            app, access_log=None, logger=_log, shutdown_timeout=SHUTDOWN_SECONDS, keepalive_timeout=idle_seconds
        )
        self._max_connections = max_connections

    @property
    @override
    def server(self) -> web.Server | None:
        """What makes a protocol of each new connection."""
        server = super().server
        return None if server is None else cast("web.Server", lambda: self._protocol(server))

    def _protocol(self, server: web.Server) -> asyncio.Protocol:
        return server() if len(server.connections) < self._max_connections else _Closing()


class _Closing(asyncio.Protocol):
    """A connection that is one too many."""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).abort()


def _connections_for(max_open_files: int) -> int:
    """Return how many connections a process may have on this port that may open so many files; -1 means any number."""
    if max_open_files < 0:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, max_open_files // _SHARE_OF_DESCRIPTORS))
