"""What the CAS counts, and how Prometheus reads it.

Counting is adding to an integer: these numbers change with every RPC. Prometheus' own objects, which take a lock for
each change, are made when somebody looks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from lathe_cas.blob_store import StoreStatus
    from lathe_shared.metrics import ServiceMetrics

COUNTER_TEXTS = {
    "digests_asked_for": "Digests in FindMissingBlobs requests",
    "digests_missing": "Those of them that were missing",
    "action_result_hits": "GetActionResult requests that were answered with a result",
    "action_result_misses": "GetActionResult requests for which there was no complete result",
    "received_bytes": "Bytes of blobs that clients sent",
    "sent_bytes": "Bytes of blobs that were sent to clients",
    "split_blobs": "Blobs that were cut into chunks",
    "spliced_blobs": "Blobs that were put together, or verified, from chunks",
    "asset_hits": "Fetch requests that were answered with remembered content",
    "asset_downloads": "Assets that were downloaded",
    "asset_downloaded_bytes": "Their bytes",
    "asset_failures": "Downloads that failed, for whatever reason",
    "written_blobs": "Blobs that became visible",
    "written_bytes": "Their bytes",
    "compressed_blobs": "Those of them that were stored compressed",
    "compression_saved_bytes": "Bytes on disk that this saved",
    "evicted_blobs": "Blobs that went because of the size limit or their age",
    "evicted_bytes": "Their bytes",
    "evicted_action_results": "Action results that went because of the size limit or their age",
    "refused_writes": "Writes that found no room, since all that the store held was leased or unfinished",
    "refused_bytes": "Bytes on disk that they would have taken",
    "expired_uploads": "Unfinished uploads that were forgotten",
    "damaged_blobs": "Blobs that were found damaged, and dropped",
    "damaged_action_results": "Action results that were found damaged, and dropped",
    "commits": "Transactions that were made durable",
    "failed_commits": "Transactions that failed, for want of disk space for example",
}

GAUGE_TEXTS = {
    "blobs": "Blobs held",
    "blob_bytes": "Their bytes, as clients see them",
    "stored_bytes": "Bytes on disk of everything kept; what the limit is about",
    "staged_bytes": "Bytes on disk of unfinished uploads",
    "garbage_bytes": "Bytes on disk that wait to be freed",
    "action_results": "Action results held, and layouts of split blobs",
    "limit_bytes": "The limit of stored_bytes",
    "file_bytes": "Size of the store's files",
    "oldest_evicted_age_seconds": "For how long, at least, that was not used which was evicted last",
    "least_evicted_age_seconds": "The least of these since the start: the worst retention given",
}


_OF_ONE_PROCESS = ("oldest_evicted_age_seconds", "least_evicted_age_seconds")
"""Gauges that tell what one process did; the others are of the store."""


@dataclass(slots=True)
class CasCounters:
    """What servicers count; see ``COUNTER_TEXTS``."""

    digests_asked_for: int = 0
    digests_missing: int = 0
    action_result_hits: int = 0
    action_result_misses: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    split_blobs: int = 0
    spliced_blobs: int = 0
    asset_hits: int = 0
    asset_downloads: int = 0
    asset_downloaded_bytes: int = 0
    asset_failures: int = 0


class HttpCacheCounts:
    """Counts the HTTP cache's requests.

    Kinds are ``cas``, ``ac``, ``cache``, and ``none`` for a request that was refused before its path was looked at.
    Methods are ``GET``, ``HEAD``, ``PUT`` and ``other``. Outcomes are ``hit``, ``miss``, ``stored``, ``refused`` (the
    client is to blame), ``failed`` (the service is), and ``broken_off`` (the transfer did not come to its end).

    Args:
        metrics: Where Prometheus reads them.
    """

    def __init__(self, metrics: ServiceMetrics) -> None:
        self._prefix = metrics.prefix
        self._counts: dict[tuple[str, str, str], int] = {}
        metrics.registry.register(self)

    def add(self, kind: str, method: str, outcome: str) -> None:
        """Count one request."""
        key = kind, method, outcome
        self._counts[key] = self._counts.get(key, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """Yield everything as it is now; called by Prometheus' registry."""
        requests = CounterMetricFamily(
            self._prefix + "http_cache_requests",
            "Requests to the HTTP cache that are over",
            labels=("kind", "method", "outcome"),
        )
        for key, count in self._counts.items():
            requests.add_metric(key, count)
        yield requests


class CasMetrics:
    """The CAS's own metrics; each name begins with ``lathe_cas_``.

    Args:
        metrics: Where they are registered.
        counters: What servicers count.
        status: Returns the store's figures.
    """

    def __init__(self, metrics: ServiceMetrics, counters: CasCounters, status: Callable[[], StoreStatus]) -> None:
        self._prefix = metrics.prefix
        self._counters = counters
        self._status = status
        metrics.common |= {metrics.prefix + name for name in GAUGE_TEXTS if name not in _OF_ONE_PROCESS}
        metrics.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield everything as it is now; called by Prometheus' registry."""
        status = self._status()
        counts = {field.name: getattr(self._counters, field.name) for field in fields(self._counters)}
        for name, value in {**counts, **status.counters}.items():
            yield CounterMetricFamily(self._prefix + name, COUNTER_TEXTS[name], value=value)
        for name, text in GAUGE_TEXTS.items():
            # A value that there is not yet has no sample.
            yield GaugeMetricFamily(self._prefix + name, text, value=getattr(status, name))
