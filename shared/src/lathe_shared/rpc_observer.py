"""What is known of RPCs that are over: how many, how long they took, and a log line for those worth one.

Counting is adding to integers, a microsecond at most, since there may be a hundred thousand RPCs a second. Prometheus'
own objects, which take a lock for each change, are made when somebody looks.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from typing import TYPE_CHECKING

import structlog
from grpclib.const import Status
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from lathe_shared.metrics import RPC_SECONDS_BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from lathe_shared.metrics import ServiceMetrics
    from lathe_shared.rpc_context import RpcContext

_log = structlog.get_logger("lathe.rpc")

_ROUTINE = frozenset({Status.OK, Status.NOT_FOUND})
"""NOT_FOUND is how a cache says that it has to be filled: as common as OK."""

_OURS = frozenset({Status.INTERNAL, Status.UNKNOWN, Status.DATA_LOSS})
_STRAINED = frozenset({Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED, Status.DEADLINE_EXCEEDED, Status.ABORTED})


class MethodFigures:
    """The figures of one method.

    Attributes:
        counts: RPCs by how they ended.
        buckets: RPCs by how long they took; the last one has those that exceed all of RPC_SECONDS_BUCKETS.
        seconds: Time of all together.
    """

    __slots__ = ("buckets", "counts", "seconds")

    def __init__(self) -> None:
        self.counts: dict[Status, int] = {}
        self.buckets = [0] * (len(RPC_SECONDS_BUCKETS) + 1)
        self.seconds = 0.0

    def add(self, status: Status, seconds: float) -> None:
        """Count one RPC."""
        counts = self.counts
        counts[status] = counts.get(status, 0) + 1
        self.buckets[bisect_left(RPC_SECONDS_BUCKETS, seconds)] += 1
        self.seconds += seconds


class RpcObserver:
    """Observes the RPCs of one service.

    Args:
        metrics: Where Prometheus reads the figures; None for nowhere.
    """

    def __init__(self, metrics: ServiceMetrics | None) -> None:
        self._figures: dict[str, MethodFigures] = {}
        self._logs_routine: bool | None = None
        self._prefix = ""
        if metrics is not None:
            self._prefix = metrics.prefix
            metrics.registry.register(self)

    def figures(self, method: str) -> MethodFigures:
        """Return the figures of a method, by its path."""
        found = self._figures.get(method)
        if found is None:
            found = self._figures[method] = MethodFigures()
        return found

    def finished(self, method: str, status: Status, message: str | None, seconds: float, context: RpcContext) -> None:
        """Take note of an RPC that is over.

        Args:
            method: Its path.
            status: How it ended.
            message: The error's text, if any.
            seconds: How long it took.
            context: The RPC itself.
        """
        self.figures(method).add(status, seconds)
        if status in _ROUTINE:
            if self._logs_routine is None:
                # Asked once, when logging has been set up: a call that logs nothing costs as much as all the rest here.
                self._logs_routine = _log.is_enabled_for(logging.DEBUG)
            if self._logs_routine:
                _log.debug("rpc_finished", method=method, code=status.name, seconds=_round(seconds), peer=context.peer)
            return
        level = "error" if status in _OURS else "warning" if status in _STRAINED else "info"
        getattr(_log, level)(
            "rpc_finished", method=method, code=status.name, error=message, seconds=_round(seconds), peer=context.peer
        )

    def collect(self) -> Iterator[Metric]:
        """Yield the figures as they are now; called by Prometheus' registry."""
        rpcs = CounterMetricFamily(
            self._prefix + "rpcs", "RPCs served, by method and status code", labels=["method", "code"]
        )
        times = HistogramMetricFamily(
            self._prefix + "rpc_seconds", "Time to serve an RPC to its end", labels=["method"]
        )
        for path, figures in list(self._figures.items()):
            method = path.removeprefix("/")
            for status, count in list(figures.counts.items()):
                rpcs.add_metric([method, status.name], count)
            times.add_metric([method], _cumulated(figures.buckets), figures.seconds)
        yield rpcs
        yield times


def _cumulated(buckets: list[int]) -> list[tuple[str, float]]:
    total = 0
    result: list[tuple[str, float]] = []
    for bound, count in zip((*RPC_SECONDS_BUCKETS, float("inf")), buckets, strict=True):
        total += count
        result.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
    return result


def _round(seconds: float) -> float:
    return round(seconds, 6)
