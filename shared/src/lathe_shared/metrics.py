"""Prometheus metrics of one service, all named ``lathe_<service>_…``.

Labels only ever have values from a fixed set (a method that exists, a status code, an outcome): what clients choose
never becomes a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.core import Metric

RPC_SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""From the quickest unary call to a long action; each step about a factor of two and a half."""


class ServiceMetrics:
    """Makes the metrics of one service.

    Args:
        service: ``cas``, ``scheduler`` or ``worker``.
        registry: Where they are collected. Tests give their own, since a name can be registered only once.

    Attributes:
        registry: As given, or the process's own.
        prefix: What every name begins with.
        common: Full names of metrics that are about what several processes share, and so the same in each.
    """

    def __init__(self, service: str, registry: CollectorRegistry | None = None) -> None:
        self.service = service
        self.registry = REGISTRY if registry is None else registry
        self.prefix = f"lathe_{service}_"
        self.common: set[str] = set()

    def counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        """Make a counter; ``_total`` is appended to its name."""
        return Counter(self.prefix + name, documentation, labels, registry=self.registry)

    def gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        """Make a gauge."""
        return Gauge(self.prefix + name, documentation, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = RPC_SECONDS_BUCKETS,
    ) -> Histogram:
        """Make a histogram; the default buckets are for seconds."""
        return Histogram(self.prefix + name, documentation, labels, registry=self.registry, buckets=buckets)

    def watched_counter(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Make a counter that somebody else counts: ``value`` is asked whenever metrics are read."""
        self.registry.register(_WatchedCounter(self.prefix + name, documentation, value))

    def exposition(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


class _WatchedCounter(Collector):
    def __init__(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        self._name = name
        self._documentation = documentation
        self._value = value

    @override
    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._documentation, value=self._value())
