"""Deadlines of the queue in one heap.

Nothing is ever taken out early: whoever is called looks whether the deadline still means anything. So setting one costs
a push, and dropping one costs nothing.
"""

from __future__ import annotations

import enum
import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class TimerKind(enum.Enum):
    """What a deadline is for, and what its subject names."""

    WORKER_SILENT = "worker"
    WORKER_DISCONNECTED = "worker whose stream broke"
    WORKER_FORGOTTEN = "worker that is gone"
    QUEUE_UNSERVED = "platform key"
    RETRY_WAITED = "task id and number of attempts lost"
    OPERATION_ABANDONED = "operation name"
    OPERATION_EXPIRED = "operation name, done"


class Timers:
    """A heap of deadlines, each with a kind and a subject."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TimerKind, object]] = []
        self._pushes = 0

    def set(self, when: float, kind: TimerKind, subject: object) -> None:
        """Ask to be told at a time."""
        self._pushes += 1
        heapq.heappush(self._heap, (when, self._pushes, kind, subject))

    def next_time(self) -> float | None:
        """Return the earliest deadline."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[tuple[TimerKind, object]]:
        """Take out and yield what is due, also what is set meanwhile."""
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, subject = heapq.heappop(self._heap)
            yield kind, subject
