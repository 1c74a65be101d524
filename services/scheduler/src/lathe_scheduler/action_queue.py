"""ActionQueue: the transitions of tasks, operations and workers, without I/O.

``handle(event, now)`` changes the state and returns what its runner must do. It never waits, reads no clock and knows
no transport; so each ordering of events can be replayed in a test. This file is the door: what clients do is in
``client_transitions``, what workers do in ``worker_transitions``, how a task moves on in ``task_transitions``, and who
gets what in ``matchmaker``.

Invariants:
    A task is leased to one worker at most; it has a lease exactly while ASSIGNED or EXECUTING.
    A worker's leases never take more slots or amounts than it has, unless it came back with fewer.
    A task that is not COMPLETED has an operation that is not done; an operation is done exactly when it has an outcome.
    No worker is ready for a queue in which a task waits that may run on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_scheduler import queue_events as events
from lathe_scheduler.client_transitions import ClientTransitions
from lathe_scheduler.queue_state import QueueState
from lathe_scheduler.task_transitions import TaskTransitions
from lathe_scheduler.timers import TimerKind
from lathe_scheduler.worker_transitions import WorkerTransitions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lathe_scheduler.operation import Operation
    from lathe_scheduler.platform_key import PlatformKey
    from lathe_scheduler.platform_queue import PlatformQueue
    from lathe_scheduler.queue_effects import QueueEffect
    from lathe_scheduler.queue_settings import QueueSettings
    from lathe_scheduler.task import Task
    from lathe_scheduler.worker import Worker


class ActionQueue:
    """The queue's state machine; see the module's text.

    Args:
        settings: How patient it is.
        lease_prefix: Begins every lease id; unique among all schedulers that a worker ever talks to.
        now: Monotonic time in seconds.
    """

    def __init__(self, settings: QueueSettings, lease_prefix: str, now: float) -> None:
        self._state = QueueState(settings, lease_prefix, now)
        tasks = TaskTransitions(self._state)
        clients = ClientTransitions(self._state, tasks)
        workers = WorkerTransitions(self._state, tasks)
        self._transitions: dict[type, Callable[..., None]] = {
            events.ExecuteRequested: clients.execute_requested,
            events.CheckPassed: clients.check_passed,
            events.CheckEnded: clients.check_ended,
            events.ListenerAdded: clients.listener_added,
            events.ListenerRemoved: clients.listener_removed,
            events.OperationCancelled: clients.operation_cancelled,
            events.OperationDeleted: clients.operation_deleted,
            events.WorkerConnected: workers.worker_connected,
            events.WorkerHeartbeat: workers.heartbeat,
            events.WorkerDraining: workers.draining,
            events.WorkerDisconnected: workers.disconnected,
            events.ActionStarted: workers.action_started,
            events.ActionFinished: workers.action_finished,
            events.StoodStill: workers.stood_still,
        }
        self._timer_transitions: dict[TimerKind, Callable[..., None]] = {
            TimerKind.WORKER_SILENT: workers.silence_due,
            TimerKind.WORKER_DISCONNECTED: workers.reconnect_due,
            TimerKind.WORKER_FORGOTTEN: workers.memory_due,
            TimerKind.QUEUE_UNSERVED: tasks.unserved_due,
            TimerKind.RETRY_WAITED: tasks.retry_waited,
            TimerKind.OPERATION_ABANDONED: clients.abandoned_due,
            TimerKind.OPERATION_EXPIRED: clients.retention_due,
        }

    def handle(self, event: events.QueueEvent, now: float) -> list[QueueEffect]:
        """Take in one event.

        Events about what is unknown or over are ignored: they crossed something on the way.

        Args:
            event: What happened.
            now: Monotonic time in seconds; must not go back.

        Returns:
            What to do about it, in order.
        """
        if type(event) is events.TimePassed:
            for kind, subject in self._state.timers.due(now):
                self._timer_transitions[kind](subject, now)
        else:
            self._transitions[type(event)](event, now)
        return self._state.take_effects()

    def next_deadline(self) -> float | None:
        """Return when ``TimePassed`` should be handled; None if nothing is pending."""
        return self._state.timers.next_time()

    def operation(self, name: str) -> Operation | None:
        """Look up an operation, to be read only."""
        return self._state.operations.get(name)

    def operations(self) -> Iterable[Operation]:
        """Return all operations, to be read only, in the order of their creation."""
        return self._state.operations

    @property
    def workers(self) -> Mapping[str, Worker]:
        """All known workers by id, to be read only."""
        return self._state.matchmaker.workers

    @property
    def platform_queues(self) -> Mapping[PlatformKey, PlatformQueue]:
        """All platform queues, to be read only."""
        return self._state.matchmaker.queues

    @property
    def tasks(self) -> Mapping[int, Task]:
        """All tasks that are not completed, to be read only."""
        return self._state.tasks

    @property
    def queued_count(self) -> int:
        """Number of tasks that wait for a worker."""
        return self._state.queued_count

    @property
    def executing_count(self) -> int:
        """Number of tasks that a worker has."""
        return self._state.executing_count
