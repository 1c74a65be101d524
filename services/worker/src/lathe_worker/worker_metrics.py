"""What a worker counts; see docs/operations.md for what each number is good for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe_shared.metrics import ServiceMetrics
    from lathe_worker.action_outcome import OutcomeKind
    from lathe_worker.file_cache import FileCache

ACTION_SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""From a no-op to an hour-long test, each about three times the one before."""


class WorkerMetrics:
    """Metrics of actions and of the file cache.

    Args:
        metrics: Where they are registered.
    """

    def __init__(self, metrics: ServiceMetrics) -> None:
        self._started = metrics.counter("actions_started", "Actions taken from the scheduler")
        self._finished = metrics.counter("actions_finished", "Actions by how they ended", ["outcome"])
        self._executing = metrics.gauge("actions_executing", "Actions under way")
        self._seconds = metrics.histogram(
            "action_seconds", "From taking an action to its result", buckets=ACTION_SECONDS_BUCKETS
        )
        self._cache_files = metrics.gauge("cache_files", "Files in the input cache")
        self._cache_bytes = metrics.gauge("cache_bytes", "Size of the input cache in bytes")
        self._metrics = metrics

    def watch_cache(self, cache: FileCache) -> None:
        """Have the cache's numbers read whenever metrics are."""
        self._cache_files.set_function(lambda: len(cache))
        self._cache_bytes.set_function(lambda: cache.size_bytes)
        counters = cache.counters
        watch = self._metrics.watched_counter
        watch("cache_hits", "Inputs found in the cache", lambda: counters.hits)
        watch("cache_downloads", "Inputs downloaded", lambda: counters.downloads)
        watch("cache_downloaded_bytes", "Bytes of inputs downloaded", lambda: counters.downloaded_bytes)
        watch("cache_evictions", "Inputs that went because of the size limit", lambda: counters.evictions)

    def started(self) -> None:
        """Count an action that begins."""
        self._started.inc()
        self._executing.inc()

    def ended(self) -> None:
        """Count an action that is under way no longer."""
        self._executing.dec()

    def finished(self, kind: OutcomeKind, seconds: float) -> None:
        """Count an action's end."""
        self._finished.labels(kind.value).inc()
        self._seconds.observe(seconds)
