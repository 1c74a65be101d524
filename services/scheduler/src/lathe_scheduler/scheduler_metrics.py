"""What the scheduler counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_scheduler.task import OutcomeKind

if TYPE_CHECKING:
    from lathe_scheduler.action_queue import ActionQueue
    from lathe_shared.metrics import ServiceMetrics


class SchedulerMetrics:
    """The scheduler's own metrics; each name begins with ``lathe_scheduler_``."""

    def __init__(self, metrics: ServiceMetrics) -> None:
        self.queued = metrics.gauge("actions_queued", "Actions that wait for a worker")
        self.executing = metrics.gauge("actions_executing", "Actions that a worker has")
        self.workers = metrics.gauge("workers", "Workers connected")
        self.dispatched = metrics.counter("actions_dispatched", "Actions given to a worker, each attempt counted")
        self.requeued = metrics.counter("actions_requeued", "Attempts lost with their worker")
        self.completed = metrics.counter(
            "actions_completed", "Executions that are over, by how they ended", ["outcome"]
        )
        self.merged = metrics.counter("executions_merged", "Requests that joined an execution under way")
        self.cache_hits = metrics.counter("cache_hits", "Requests answered from the action cache")
        self.workers_lost = metrics.counter("workers_lost", "Workers given up")
        for kind in OutcomeKind:
            self.completed.labels(kind.value)

    def observe(self, queue: ActionQueue, connected_workers: int) -> None:
        """Let the gauges show a queue as it is."""
        self.queued.set(queue.queued_count)
        self.executing.set(queue.executing_count)
        self.workers.set(connected_workers)
