"""What clients do to the queue: request, follow, cancel and delete executions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_scheduler.queue_effects import CheckAction, ExecutionMerged, OperationForgotten
from lathe_scheduler.task import Outcome, OutcomeKind, Task, TaskState
from lathe_scheduler.timers import TimerKind
from lathe_shared.errors import ExecutionCancelledError

if TYPE_CHECKING:
    from lathe_scheduler import queue_events as events
    from lathe_scheduler.operation import Operation
    from lathe_scheduler.queue_state import QueueState
    from lathe_scheduler.task_transitions import TaskTransitions


class ClientTransitions:
    """Transitions that a client's call sets off, and the ends of checks."""

    def __init__(self, state: QueueState, tasks: TaskTransitions) -> None:
        self._state = state
        self._tasks = tasks

    def execute_requested(self, event: events.ExecuteRequested, _now: float) -> None:
        """Join an execution that is under way, or a check, or begin a check.

        A request that skips the cache look-up may join a task past its check: REAPI allows it to be merged with an
        execution in flight, since it only forbids results that were visible before the request, and a running task has
        none yet. It must not join a check that looks into the cache, which is such a result. The other way round,
        a request that would take a cached result gets a check of its own rather than wait for a forced execution.

        Spec: REAPI, ExecuteRequest.skip_cache_lookup.
        """
        state = self._state
        task = state.mergeable.get(event.key)
        if task is not None:
            state.operations.add(event.operation_name, task)
            self._tasks.raise_priority(task, event.priority)
            state.add_effect(ExecutionMerged(event.operation_name))
            return
        slot = (event.key, event.skip_cache_lookup)
        task = state.checking.get(slot)
        if task is not None:
            state.operations.add(event.operation_name, task)
            self._tasks.raise_priority(task, event.priority)
            return
        task = Task(
            state.next_number(),
            event.key,
            event.skip_cache_lookup,
            event.priority,
            event.request_metadata,
            event.inline_output_files,
        )
        state.tasks[task.id] = task
        state.checking[slot] = task
        state.operations.add(event.operation_name, task)
        state.add_effect(CheckAction(task))

    def check_passed(self, event: events.CheckPassed, now: float) -> None:
        """Queue what was checked: once for all who asked, unless the action forbids to share its result."""
        state = self._state
        task = state.tasks.get(event.task_id)
        if task is None or task.state is not TaskState.CHECKING:
            return
        self._tasks.end_check(task)
        if event.spec.do_not_cache:
            for single in [task, *self._split(task)]:
                self._tasks.enqueue(single, event.spec, now)
            return
        running = state.mergeable.get(task.key)
        if running is None:
            joined = list(task.operations)[1:]
            state.mergeable[task.key] = task
            self._tasks.enqueue(task, event.spec, now)
        else:
            joined = list(task.operations)
            self._move_operations(task, running)
        for name in joined:
            state.add_effect(ExecutionMerged(name))

    def check_ended(self, event: events.CheckEnded, now: float) -> None:
        """Answer all who asked."""
        task = self._state.tasks.get(event.task_id)
        if task is not None and task.state is TaskState.CHECKING:
            self._tasks.complete(task, event.outcome, now)

    def listener_added(self, event: events.ListenerAdded, _now: float) -> None:
        """Count a stream that follows an operation."""
        operation = self._state.operations.get(event.operation_name)
        if operation is not None:
            operation.listeners += 1
            operation.abandoned_at = None

    def listener_removed(self, event: events.ListenerRemoved, now: float) -> None:
        """Cancel an operation that nobody follows any more: at once if its client said so, else after a while."""
        operation = self._state.operations.get(event.operation_name)
        if operation is None:
            return
        operation.listeners -= 1
        if operation.listeners > 0 or operation.is_done:
            return
        if event.is_cancelled:
            self._cancel(operation, "the client cancelled its call", now)
            return
        operation.abandoned_at = now
        grace = self._state.settings.abandoned_grace_seconds
        self._state.timers.set(now + grace, TimerKind.OPERATION_ABANDONED, operation.name)

    def abandoned_due(self, name: str, now: float) -> None:
        """Cancel an operation whose client did not come back."""
        operation = self._state.operations.get(name)
        if operation is None or operation.is_done or operation.abandoned_at is None:
            return
        # An older deadline may find a newer absence.
        if operation.abandoned_at + self._state.settings.abandoned_grace_seconds <= now:
            self._cancel(operation, "the client lost its connection and did not come back", now)

    def operation_cancelled(self, event: events.OperationCancelled, now: float) -> None:
        """End one client's operation, and the execution with it if nobody else wants it."""
        operation = self._state.operations.get(event.operation_name)
        if operation is not None and not operation.is_done:
            self._cancel(operation, "a client called CancelOperation", now)

    def operation_deleted(self, event: events.OperationDeleted, _now: float) -> None:
        """Forget a done operation."""
        if self._state.operations.forget(event.operation_name):
            self._state.add_effect(OperationForgotten(event.operation_name))

    def retention_due(self, name: str, _now: float) -> None:
        """Forget an operation that has been done for long enough."""
        operation = self._state.operations.get(name)
        if operation is None or not operation.is_done:
            return
        if self._state.operations.forget(name):
            self._state.add_effect(OperationForgotten(name))

    def _cancel(self, operation: Operation, reason: str, now: float) -> None:
        task = operation.task
        outcome = Outcome(OutcomeKind.CANCELLED, error=ExecutionCancelledError(f"execution cancelled: {reason}"))
        self._tasks.finish_operation(operation, outcome, now)
        if task is not None and not task.operations:
            self._tasks.complete(task, outcome, now, cancel_reason=reason)

    def _split(self, task: Task) -> list[Task]:
        """Give each operation but the first a task of its own."""
        siblings = []
        for operation in list(task.operations.values())[1:]:
            del task.operations[operation.name]
            sibling = Task(
                self._state.next_number(),
                task.key,
                task.skip_cache_lookup,
                task.priority,
                task.request_metadata,
                task.inline_output_files,
            )
            sibling.operations[operation.name] = operation
            operation.task = sibling
            self._state.tasks[sibling.id] = sibling
            siblings.append(sibling)
        return siblings

    def _move_operations(self, task: Task, target: Task) -> None:
        """Let the clients of one task share another one, which makes the first superfluous."""
        for operation in task.operations.values():
            operation.task = target
            target.operations[operation.name] = operation
        task.operations.clear()
        task.state = TaskState.COMPLETED
        del self._state.tasks[task.id]
        self._tasks.raise_priority(target, task.priority)
        self._tasks.tell_operations(target)
