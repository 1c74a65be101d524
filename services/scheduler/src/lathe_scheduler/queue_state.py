"""What the queue's transitions share: its tables, its deadlines, and the effects gathered so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_scheduler.matchmaker import Matchmaker
from lathe_scheduler.operation_table import OperationTable
from lathe_scheduler.queue_effects import StartAction
from lathe_scheduler.timers import Timers
from lathe_scheduler.worker import Lease, Worker

if TYPE_CHECKING:
    from lathe_scheduler.queue_effects import QueueEffect
    from lathe_scheduler.queue_settings import QueueSettings
    from lathe_scheduler.task import ActionKey, Task


class QueueState:
    """The queue's state.

    Attributes:
        settings: How patient the queue is.
        timers: All deadlines.
        operations: All operations, done ones included.
        tasks: All tasks that are not completed, by id.
        checking: Tasks under check that others may join, by key and by whether they skip the cache.
        mergeable: Tasks past their check that others may join, by key.
        matchmaker: Waiting tasks and workers.
        queued_count: Number of QUEUED tasks.
        executing_count: Number of ASSIGNED and EXECUTING tasks.
    """

    def __init__(self, settings: QueueSettings, lease_prefix: str, now: float) -> None:
        self.settings = settings
        self.timers = Timers()
        self.operations = OperationTable(settings, self.timers)
        self.tasks: dict[int, Task] = {}
        self.checking: dict[tuple[ActionKey, bool], Task] = {}
        self.mergeable: dict[ActionKey, Task] = {}
        self.matchmaker = Matchmaker(settings, self.timers, self._new_lease, now)
        self.queued_count = 0
        self.executing_count = 0
        self._lease_prefix = lease_prefix
        self._last_number = 0
        self._effects: list[QueueEffect] = []

    def add_effect(self, effect: QueueEffect) -> None:
        """Ask the runner for something."""
        self._effects.append(effect)

    def take_effects(self) -> list[QueueEffect]:
        """Return what was asked for since the last call."""
        effects = self._effects
        self._effects = []
        return effects

    def next_number(self) -> int:
        """Return a number that was never returned before, larger than all that were."""
        self._last_number += 1
        return self._last_number

    def _new_lease(self, task: Task, worker: Worker) -> Lease:
        """Make a lease for a match that was just made, and have the worker told."""
        if task.spec is None:
            raise RuntimeError(f"task {task.id} has nothing to execute")
        lease = Lease(f"{self._lease_prefix}-{self.next_number()}", task, worker, task.spec.platform)
        self.queued_count -= 1
        self.executing_count += 1
        self.add_effect(StartAction(worker.id, worker.connection_id, lease.id, task, task.spec))
        return lease
