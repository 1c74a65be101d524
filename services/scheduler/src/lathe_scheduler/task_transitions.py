"""How a task moves on: queued, lost with its worker and queued again, completed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lathe_scheduler.queue_effects import (
    AbandonCheck,
    CancelAction,
    OperationChanged,
    OperationForgotten,
    TaskCompleted,
    TaskRequeued,
)
from lathe_scheduler.task import Outcome, OutcomeKind, QueueOrder, Task, TaskState
from lathe_scheduler.timers import TimerKind
from lathe_scheduler.unmatched import unmatched_error
from lathe_shared.errors import FailedPreconditionError

if TYPE_CHECKING:
    from lathe_scheduler.operation import Operation
    from lathe_scheduler.platform_key import PlatformKey
    from lathe_scheduler.queue_state import QueueState
    from lathe_scheduler.task import ActionSpec
    from lathe_scheduler.worker import Lease

MAX_UNSTARTED_LOSSES = 5
"""How often an action may be lost before its worker said that it runs, without that being an attempt. Mostly the
message was lost with its connection, or the worker went for another reason. But inputs alone can take a worker down,
and what does that every time must come to an end; so what is beyond this counts."""

AVOIDANCE_SECONDS = 30.0
"""How long an action waits for another worker than those that it was lost on, for each attempt that was lost. The
others may be busy for hours, and what was wrong with a worker is often over by then."""


class TaskTransitions:
    """Moves tasks between states and keeps the tables true."""

    def __init__(self, state: QueueState) -> None:
        self._state = state

    def enqueue(self, task: Task, spec: ActionSpec, now: float) -> None:
        """Queue a task that passed its check."""
        task.spec = spec
        task.enqueued_at = now
        task.order = self._order(task)
        task.state = TaskState.QUEUED
        self._state.queued_count += 1
        self.tell_operations(task)
        self._state.matchmaker.enqueue(task, now)

    def raise_priority(self, task: Task, priority: int) -> None:
        """Make a task as urgent as its most urgent request; never less than it was."""
        if priority >= task.priority:
            return
        task.priority = priority
        if task.state is TaskState.QUEUED:
            self._state.matchmaker.queues[task.platform].reorder(task, self._order(task))
        elif task.state is not TaskState.CHECKING:
            # Where it would go if its worker were lost.
            task.order = self._order(task)

    def attempt_lost(self, task: Task, worker_id: str, reason: str, now: float, response: bytes = b"") -> None:
        """Queue a task again whose worker was lost or at fault, in its old place; or give it up.

        The lease must have been given back already.

        Args:
            task: The task, ASSIGNED or EXECUTING until now.
            worker_id: The worker.
            reason: What happened to it.
            now: Monotonic seconds.
            response: What a worker at fault had to say, as an ExecuteResponse: the client's answer if it was the last
                attempt.
        """
        task.lost_on.append(worker_id)
        task.lease = None
        if len(task.lost_on) >= self._state.settings.max_attempts:
            error = None if response else _workers_lost_error(task, reason)
            self.complete(task, Outcome(OutcomeKind.WORKERS_LOST, response or None, error), now)
            return
        task.avoids_workers = True
        lost_count = len(task.lost_on)
        self._state.timers.set(now + AVOIDANCE_SECONDS * lost_count, TimerKind.RETRY_WAITED, (task.id, lost_count))
        self.requeue(task, worker_id, reason, now)

    def retry_waited(self, subject: tuple[int, int], now: float) -> None:
        """Let a task that waited for another worker run on any."""
        task_id, lost_count = subject
        task = self._state.tasks.get(task_id)
        # A later loss has a deadline of its own.
        if task is None or len(task.lost_on) != lost_count:
            return
        task.avoids_workers = False
        if task.state is TaskState.QUEUED:
            self._state.matchmaker.serve_queue(task.platform, now)

    def lease_lost(self, task: Task, worker_id: str, reason: str, now: float) -> None:
        """Queue a task again whose worker went, or does not have it; or give it up.

        Only what began is an attempt; see ``MAX_UNSTARTED_LOSSES``. The lease must have been given back already.

        Args:
            task: The task, ASSIGNED or EXECUTING until now.
            worker_id: The worker.
            reason: What happened to it.
            now: Monotonic seconds.
        """
        if task.state is TaskState.ASSIGNED and task.unstarted_losses < MAX_UNSTARTED_LOSSES:
            task.unstarted_losses += 1
            self.requeue(task, worker_id, reason, now)
        else:
            self.attempt_lost(task, worker_id, reason, now)

    def requeue(self, task: Task, worker_id: str, reason: str, now: float) -> None:
        """Queue a task again that its worker gave back or lost; its lease must have been given back already."""
        task.lease = None
        self._state.executing_count -= 1
        self._state.queued_count += 1
        task.state = TaskState.QUEUED
        self._state.add_effect(TaskRequeued(task, worker_id, reason))
        self.tell_operations(task)
        self._state.matchmaker.enqueue(task, now)

    def complete(self, task: Task, outcome: Outcome, now: float, cancel_reason: str = "") -> None:
        """End a task, wherever it stands, and all its operations.

        Args:
            task: Any task that is not COMPLETED.
            outcome: What its operations end with.
            now: Monotonic seconds.
            cancel_reason: What a worker that still runs it is told.
        """
        state = self._state
        spec = task.spec
        was = task.state
        task.state = TaskState.COMPLETED
        task.outcome = outcome
        del state.tasks[task.id]
        if state.mergeable.get(task.key) is task:
            del state.mergeable[task.key]
        for operation in list(task.operations.values()):
            self.finish_operation(operation, outcome, now)
        state.add_effect(TaskCompleted(task, spec, outcome))
        if was is TaskState.CHECKING:
            self.end_check(task)
            state.add_effect(AbandonCheck(task.id))
        elif was is TaskState.QUEUED:
            state.queued_count -= 1
            state.matchmaker.withdraw(task, now)
        else:
            state.executing_count -= 1
            if task.lease is not None:
                self._cancel_lease(task.lease, cancel_reason)
                task.lease = None
        task.spec = None

    def finish_operation(self, operation: Operation, outcome: Outcome, now: float) -> None:
        """End one operation and tell its listeners."""
        forgotten = self._state.operations.finish(operation, outcome, now)
        self._state.add_effect(OperationChanged(operation.name))
        for name in forgotten:
            self._state.add_effect(OperationForgotten(name))

    def end_check(self, task: Task) -> None:
        """Let nobody join a check any more."""
        slot = (task.key, task.skip_cache_lookup)
        if self._state.checking.get(slot) is task:
            del self._state.checking[slot]

    def tell_operations(self, task: Task) -> None:
        """Tell all listeners of a task's operations that its state changed."""
        for name in task.operations:
            self._state.add_effect(OperationChanged(name))

    def unserved_due(self, key: PlatformKey, now: float) -> None:
        """Fail the tasks of a queue that no worker could ever run, as far as is known."""
        matchmaker = self._state.matchmaker
        tasks = matchmaker.unserved_tasks(key, now)
        if tasks:
            offers = [worker.offer for worker in matchmaker.workers.values()]
            outcome = Outcome(
                OutcomeKind.UNMATCHED,
                error=unmatched_error(key, [*offers, *self._state.settings.configured_platforms]),
            )
            for task in tasks:
                self.complete(task, outcome, now)

    def _order(self, task: Task) -> QueueOrder:
        ageing = self._state.settings.priority_ageing_seconds
        return QueueOrder(task.enqueued_at + task.priority * ageing, task.id)

    def _cancel_lease(self, lease: Lease, reason: str) -> None:
        # The worker's slot stays taken until it says that the processes are gone.
        lease.task = None
        worker = lease.worker
        if worker.connection_id:
            self._state.add_effect(CancelAction(worker.id, worker.connection_id, lease.id, reason))


def _workers_lost_error(task: Task, reason: str) -> FailedPreconditionError:
    """Say that an action took its workers down.

    FAILED_PRECONDITION without details is the one fitting status that Bazel does not try again: it repeats ABORTED,
    INTERNAL, UNAVAILABLE, UNKNOWN, DEADLINE_EXCEEDED and RESOURCE_EXHAUSTED five times by default
    (RemoteRetrier.RETRIABLE_GRPC_ERRORS), and an action that kills workers would take eighteen of them.
    """
    names = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in Counter(task.lost_on).items())
    return FailedPreconditionError(
        f"gave up after {len(task.lost_on)} attempts: each time the worker was lost or failed while it had action "
        f"{task.key.digest} (workers: {names}; last reason: {reason}); the action itself may be what takes workers down"
    )
