"""One log line and two measurements for each RPC that is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from grpclib.const import Status

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

    from lathe_shared.metrics import ServiceMetrics
    from lathe_shared.rpc_context import RpcContext

_log = structlog.get_logger("lathe.rpc")

_ROUTINE = frozenset({Status.OK, Status.NOT_FOUND})
"""NOT_FOUND is how a cache says that it has to be filled: as common as OK."""

_OURS = frozenset({Status.INTERNAL, Status.UNKNOWN, Status.DATA_LOSS})
_STRAINED = frozenset({Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED, Status.DEADLINE_EXCEEDED, Status.ABORTED})


class RpcObserver:
    """Observes the RPCs of one service.

    Args:
        metrics: Where they are counted and timed; None for nowhere.
    """

    def __init__(self, metrics: ServiceMetrics | None) -> None:
        self._children: dict[tuple[str, Status], tuple[Counter, Histogram]] = {}
        self._rpcs: Counter | None = None
        self._seconds: Histogram | None = None
        if metrics is not None:
            self._rpcs = metrics.counter("rpcs", "RPCs served, by method and status code", ["method", "code"])
            self._seconds = metrics.histogram("rpc_seconds", "Time to serve an RPC to its end", ["method"])

    def finished(self, method: str, status: Status, message: str | None, seconds: float, context: RpcContext) -> None:
        """Take note of an RPC that is over.

        Args:
            method: Its path.
            status: How it ended.
            message: The error's text, if any.
            seconds: How long it took.
            context: The RPC itself.
        """
        if self._rpcs is not None and self._seconds is not None:
            key = (method, status)
            children = self._children.get(key)
            if children is None:
                name = method.removeprefix("/")
                children = self._rpcs.labels(name, status.name), self._seconds.labels(name)
                self._children[key] = children
            children[0].inc()
            children[1].observe(seconds)
        if status in _ROUTINE:
            _log.debug("rpc_finished", method=method, code=status.name, seconds=round(seconds, 6), peer=context.peer)
            return
        level = "error" if status in _OURS else "warning" if status in _STRAINED else "info"
        getattr(_log, level)(
            "rpc_finished", method=method, code=status.name, error=message, seconds=round(seconds, 6), peer=context.peer
        )
