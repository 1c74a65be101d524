"""One queue per platform key: the tasks that wait for it, and the workers that can serve it.

The queue knows its order and who could take its head at this moment; it decides nothing (``matchmaker`` does). How it
orders tasks is nobody else's business: fairness between invocations has its place here.
"""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING

from lathe_scheduler.task import Task, TaskState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lathe_scheduler.platform_key import PlatformKey
    from lathe_scheduler.task import QueueOrder
    from lathe_scheduler.worker import Worker

_STALE_ENTRIES_KEPT = 64
"""Entries of tasks that left out of turn which a heap may hold beside as many as are alive: keeps removal cheap."""


class PlatformQueue:
    """Tasks with one platform key, and the workers for them.

    Attributes:
        key: The platform key.
        workers: All known workers that serve the key, those that are gone but remembered, too.
        is_configured: Whether the configuration promises a worker that serves the key.
        reserved: The worker that is kept free for the head, if any.
        unserved_since: Since when no worker is known that could ever run these tasks; None while there is one.
    """

    def __init__(self, key: PlatformKey, *, is_configured: bool) -> None:
        self.key = key
        self.is_configured = is_configured
        self.workers: dict[str, Worker] = {}
        self.reserved: Worker | None = None
        self.unserved_since: float | None = None
        # Ready workers by how many of the key's preferences they meet. Within one tier, the one that was given nothing
        # for the longest time is first, which spreads a burst evenly.
        self._ready: list[OrderedDict[str, Worker]] = [OrderedDict() for _ in range(len(key.preferences) + 1)]
        self._heap: list[tuple[float, int, int, Task]] = []
        self._pushes = 0
        # Tasks whose worker was lost. Few; they go first and may avoid workers, so they are looked through one by one.
        self._retries: list[Task] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Task]:
        """Yield the waiting tasks, in no particular order."""
        yield from self._retries
        # A task whose priority was raised has two entries, of which one says the order that it has.
        yield from (entry[3] for entry in self._heap if self._is_live(entry))

    # ---- tasks

    def push(self, task: Task) -> None:
        """Add a task, which must be QUEUED with its order set."""
        self._length += 1
        if task.lost_on:
            bisect.insort(self._retries, task, key=_order)
        else:
            self._push_entry(task)

    def reorder(self, task: Task, order: QueueOrder) -> None:
        """Move a waiting task forward."""
        if order == task.order:
            return  # a second entry with the same order would be as alive as the first
        if task.lost_on:
            self._retries.remove(task)
            task.order = order
            bisect.insort(self._retries, task, key=_order)
        else:
            task.order = order
            self._push_entry(task)

    def remove(self, task: Task) -> None:
        """Take a task out; its state must have changed already, since that is how its entry is known to be stale."""
        self._length -= 1
        if task.lost_on:
            self._retries.remove(task)
        elif self._heap and self._heap[0][3] is task:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * self._length + _STALE_ENTRIES_KEPT:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def head(self) -> Task | None:
        """Return the first task that is no retry."""
        while self._heap:
            entry = self._heap[0]
            if self._is_live(entry):
                return entry[3]
            heapq.heappop(self._heap)
        return None

    def head_for(self, worker: Worker) -> Task | None:
        """Return the task that a worker should take next from this queue."""
        for task in self._retries:
            if not self.avoids(task, worker):
                return task
        return self.head()

    def retries(self) -> list[Task]:
        """Return the tasks that were lost on a worker before, in order."""
        return list(self._retries)

    def _push_entry(self, task: Task) -> None:
        self._pushes += 1
        heapq.heappush(self._heap, (task.order.time, task.order.number, self._pushes, task))

    @staticmethod
    def _is_live(entry: tuple[float, int, int, Task]) -> bool:
        task = entry[3]
        # Tasks that were lost once come back into the retries, never into the heap.
        return task.state is TaskState.QUEUED and not task.lost_on and task.order.time == entry[0]

    # ---- workers

    def avoids(self, task: Task, worker: Worker) -> bool:
        """Tell whether a task should go elsewhere: it was lost on this worker, and another one serves the queue.

        Not any more once it has waited for that other one for long enough.
        """
        if not task.avoids_workers or worker.id not in task.lost_on:
            return False
        return any(other.accepts and other.id not in task.lost_on for other in self.workers.values())

    def ready_worker_for(self, task: Task) -> Worker | None:
        """Return the worker that should take a task now; None if none can."""
        for tier in reversed(self._ready):
            for worker in tier.values():
                if not task.lost_on or not self.avoids(task, worker):
                    return worker
        return None

    def set_ready(self, worker: Worker, ready: bool) -> None:
        """Note whether a worker, one of ``workers``, could take a task now; a ready one goes to the end of its tier."""
        for tier in self._ready:
            tier.pop(worker.id, None)
        if ready:
            self._ready[worker.offer.preference_count(self.key) if self.key.preferences else 0][worker.id] = worker

    def forget_worker(self, worker: Worker) -> None:
        """Drop a worker that does not serve this key any more, or is unknown from now on."""
        self.workers.pop(worker.id, None)
        for tier in self._ready:
            tier.pop(worker.id, None)

    def ready_count(self) -> int:
        """Count the workers that could take a task now."""
        return sum(map(len, self._ready))


def _order(task: Task) -> QueueOrder:
    return task.order
