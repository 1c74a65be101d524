"""The HTTP port of each service: for Prometheus, for load balancers, for people.

``/metrics`` in Prometheus's text format, ``/healthz`` with 200 or 503, ``/status`` as JSON.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from aiohttp import web

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
    """

    def __init__(
        self,
        metrics: ServiceMetrics,
        is_healthy: Callable[[], bool],
        status: StatusFunction,
        routes: Iterable[web.RouteDef] = (),
        group: GroupStatus | None = None,
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
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)

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
