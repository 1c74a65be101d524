"""Bring waiting tasks and free workers together.

Tasks wait in one queue per platform key, and each worker keeps the set of queues that it can serve, so the work per
decision depends on the number of distinct keys, never on how many actions wait or how many workers there are. Two
things can make a match: a task comes (``enqueue``: is a worker of its queue ready?) and a worker gets room
(``serve_worker``: which head among its queues goes first?).

Large actions are not starved: when the first head in order does not fit what a worker has left, and it has waited
``reservation_after_seconds``, the worker is reserved for that queue. It takes nothing else until it has room for the
head, or the head went elsewhere. A queue reserves one worker at most, so the others keep serving everybody.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from lathe_scheduler.platform_queue import PlatformQueue
from lathe_scheduler.task import Task, TaskState
from lathe_scheduler.timers import TimerKind
from lathe_scheduler.worker import Lease, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lathe_scheduler.platform_key import PlatformKey
    from lathe_scheduler.queue_settings import QueueSettings
    from lathe_scheduler.timers import Timers

MAX_IDLE_QUEUES = 256
"""Queues beyond which empty ones are dropped: clients choose the keys, so their number must have a bound."""


class Matchmaker:
    """All platform queues and all known workers.

    Args:
        settings: Timeouts and promised platforms.
        timers: Where to ask for ``QUEUE_UNSERVED`` deadlines.
        new_lease: Makes the lease of a task that was just matched with a worker.
        now: When the queue began, on its clock.

    Attributes:
        queues: By platform key.
        workers: Known workers by id: connected, disconnected a moment ago, and gone but remembered.
    """

    def __init__(
        self, settings: QueueSettings, timers: Timers, new_lease: Callable[[Task, Worker], Lease], now: float
    ) -> None:
        self._settings = settings
        self._timers = timers
        self._new_lease = new_lease
        self._patient_until = now + settings.start_grace_seconds
        self._had_worker = False
        self.queues: dict[PlatformKey, PlatformQueue] = {}
        self.workers: dict[str, Worker] = {}
        # Workers that lost their reservation meanwhile and may serve others again.
        self._released: deque[Worker] = deque()

    # ---- tasks

    def enqueue(self, task: Task, now: float) -> None:
        """Let a task, which must be QUEUED, wait; or match it at once."""
        queue = self._queue(task.platform, now)
        queue.push(task)
        if queue.unserved_since is not None:
            self._watch_unserved(queue, now)
        self._serve_queue(queue)
        self._serve_released(now)

    def serve_queue(self, key: PlatformKey, now: float) -> None:
        """Look again at a queue in which a task waits that workers may take from now on."""
        self._serve_queue(self.queues[key])
        self._serve_released(now)

    def withdraw(self, task: Task, now: float) -> None:
        """Take out a task that waited until its state was changed just now."""
        queue = self.queues[task.platform]
        queue.remove(task)
        if not queue:
            self._end_reservation(queue)
        self._serve_released(now)

    def unserved_tasks(self, key: PlatformKey, now: float) -> list[Task]:
        """Return the tasks of one queue that have waited long enough without any worker in sight."""
        queue = self.queues.get(key)
        if queue is None or queue.unserved_since is None:
            return []
        if not self._had_worker and now < self._patient_until:
            return []
        since = queue.unserved_since
        timeout = self._settings.unmatched_timeout_seconds
        return [task for task in queue if max(task.enqueued_at, since) + timeout <= now]

    # ---- workers

    def add_worker(self, worker: Worker, now: float) -> None:
        """Take in a worker, or a known one whose offer changed, and give it what it can do."""
        self.workers[worker.id] = worker
        self._had_worker = True
        for queue in list(worker.queues.values()):
            if not worker.offer.serves(queue.key):
                self._part(worker, queue, now)
        for queue in self.queues.values():
            if worker.offer.serves(queue.key):
                queue.workers[worker.id] = worker
                queue.unserved_since = None
                worker.queues[queue.key] = queue
        self.serve_worker(worker, now)

    def serve_worker(self, worker: Worker, now: float) -> None:
        """Give a worker that may have room what it should do next."""
        self._serve(worker, now)
        self._serve_released(now)

    def stop_serving(self, worker: Worker, now: float) -> None:
        """Note that a worker accepts nothing more; tasks that avoided others for its sake need not any longer."""
        if worker.reserved_for is not None:
            self._end_reservation(worker.reserved_for)
        self._refresh(worker)
        for queue in list(worker.queues.values()):
            self._serve_queue(queue)
        self._serve_released(now)

    def forget_worker(self, worker: Worker, now: float) -> None:
        """Drop a worker for good."""
        del self.workers[worker.id]
        for queue in list(worker.queues.values()):
            self._part(worker, queue, now)

    # ---- the parts

    def _queue(self, key: PlatformKey, now: float) -> PlatformQueue:
        queue = self.queues.get(key)
        if queue is None:
            if len(self.queues) >= MAX_IDLE_QUEUES:
                self._drop_idle_queues()
            configured = any(offer.serves(key) for offer in self._settings.configured_platforms)
            queue = self.queues[key] = PlatformQueue(key, is_configured=configured)
            for worker in self.workers.values():
                if worker.offer.serves(key):
                    queue.workers[worker.id] = worker
                    worker.queues[key] = queue
                    queue.set_ready(worker, self._is_ready(worker, queue))
                    worker.may_be_ready = True
            if not queue.workers and not configured:
                queue.unserved_since = now
        return queue

    def _drop_idle_queues(self) -> None:
        for queue in [queue for queue in self.queues.values() if not queue]:
            del self.queues[queue.key]
            for worker in queue.workers.values():
                del worker.queues[queue.key]

    def _part(self, worker: Worker, queue: PlatformQueue, now: float) -> None:
        if queue.reserved is worker:
            self._end_reservation(queue)
        queue.forget_worker(worker)
        del worker.queues[queue.key]
        if not queue.workers and not queue.is_configured:
            queue.unserved_since = now
            if queue:
                self._watch_unserved(queue, now)

    def _watch_unserved(self, queue: PlatformQueue, now: float) -> None:
        when = now + self._settings.unmatched_timeout_seconds
        if not self._had_worker:
            when = max(when, self._patient_until)
        self._timers.set(when, TimerKind.QUEUE_UNSERVED, queue.key)

    def _serve_queue(self, queue: PlatformQueue) -> None:
        """Hand out tasks of one queue while workers are ready for them."""
        if not queue or not queue.ready_count():
            return
        for task in queue.retries():
            worker = queue.ready_worker_for(task)
            if worker is not None:
                self._assign(task, queue, worker)
                self._refresh(worker)
        while (head := queue.head()) is not None and (worker := queue.ready_worker_for(head)) is not None:
            self._assign(head, queue, worker)
            self._refresh(worker)

    def _serve(self, worker: Worker, now: float) -> None:
        """Hand out tasks to one worker while it has room for them, then bring up to date what it is ready for."""
        while worker.accepts and worker.free_slots > 0:
            match = self._best_head(worker, now)
            if match is None:
                break
            self._assign(*match, worker)
        self._refresh(worker)

    def _serve_released(self, now: float) -> None:
        while self._released:
            self._serve(self._released.popleft(), now)

    def _best_head(self, worker: Worker, now: float) -> tuple[Task, PlatformQueue] | None:
        """Return the task that goes first among those that fit; reserve the worker if the rule says so."""
        heads = sorted(self._heads(worker), key=lambda head: head[0].order)
        if not heads and worker.reserved_for is not None:
            # What waits there avoids this very worker.
            self._end_reservation(worker.reserved_for)
        for task, queue in heads:
            if worker.fits(queue.key):
                return task, queue
            overdue = now - task.enqueued_at >= self._settings.reservation_after_seconds
            if overdue and queue.reserved is None and worker.reserved_for is None:
                queue.reserved = worker
                worker.reserved_for = queue
                return None
        return None

    def _heads(self, worker: Worker) -> Iterable[tuple[Task, PlatformQueue]]:
        if worker.reserved_for is not None:
            queues: Iterable[PlatformQueue] = (worker.reserved_for,)
        else:
            queues = worker.queues.values()
        for queue in queues:
            if queue:
                task = queue.head_for(worker)
                if task is not None:
                    yield task, queue

    def _assign(self, task: Task, queue: PlatformQueue, worker: Worker) -> None:
        task.state = TaskState.ASSIGNED
        queue.remove(task)
        self._end_reservation(queue)
        lease = self._new_lease(task, worker)
        task.lease = lease
        worker.take(lease)

    def _end_reservation(self, queue: PlatformQueue) -> None:
        worker = queue.reserved
        if worker is not None:
            queue.reserved = None
            worker.reserved_for = None
            self._released.append(worker)

    def _refresh(self, worker: Worker) -> None:
        """Bring up to date for which queues a worker is ready."""
        has_room = worker.accepts and worker.free_slots > 0
        if not has_room and not worker.may_be_ready:
            return  # The common case under load: one action ended, and another one took its place at once.
        worker.may_be_ready = has_room
        for queue in worker.queues.values():
            queue.set_ready(worker, has_room and self._is_ready(worker, queue))

    @staticmethod
    def _is_ready(worker: Worker, queue: PlatformQueue) -> bool:
        if worker.reserved_for is not None and worker.reserved_for is not queue:
            return False
        return worker.accepts and worker.fits(queue.key)
