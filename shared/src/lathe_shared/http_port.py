"""The HTTP port of each service: for Prometheus, for load balancers, for people.

``/metrics`` in Prometheus's text format, ``/healthz`` with 200 or 503, ``/status`` as JSON.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, TypeAlias

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from lathe_shared.metrics import ServiceMetrics

StatusFunction: TypeAlias = "Callable[[], dict[str, Any] | Awaitable[dict[str, Any]]]"
"""Returns what ``/status`` shows, as something that JSON can express."""

SHUTDOWN_SECONDS = 1.0
"""How long a request in flight may still take when the port closes."""


class HttpPort:
    """Serves HTTP on one port.

    Args:
        metrics: What ``/metrics`` shows.
        is_healthy: What ``/healthz`` says.
        status: What ``/status`` shows.
        routes: Further routes.
    """

    def __init__(
        self,
        metrics: ServiceMetrics,
        is_healthy: Callable[[], bool],
        status: StatusFunction,
        routes: Iterable[web.RouteDef] = (),
    ) -> None:
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

    async def start(self, host: str, port: int) -> int:
        """Begin to serve.

        Returns:
            The port that was bound, which the kernel chose if ``port`` is 0.

        Raises:
            OSError: The address cannot be bound.
        """
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop serving. Closing twice, or what never started, is fine."""
        await self._runner.cleanup()

    async def _serve_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _serve_healthz(self, _request: web.Request) -> web.Response:
        if self._is_healthy():
            return web.Response(text="ok\n")
        return web.Response(text="not serving\n", status=503)

    async def _serve_status(self, _request: web.Request) -> web.Response:
        status = self._status()
        if inspect.isawaitable(status):
            status = await status
        return web.json_response(status, dumps=lambda value: json.dumps(value, default=str, indent=2) + "\n")
