"""What workers do to the queue: come, report, fall silent and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_scheduler.queue_effects import CancelAction, CloseConnection, FinishIgnored, WorkerLost
from lathe_scheduler.task import Outcome, OutcomeKind, TaskState
from lathe_scheduler.timers import TimerKind
from lathe_scheduler.worker import Lease, Worker, WorkerState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lathe_scheduler import queue_events as events
    from lathe_scheduler.queue_state import QueueState
    from lathe_scheduler.task_transitions import TaskTransitions

MAX_UNSEEN_HEARTBEATS = 3
"""Heartbeats in a row without a lease after which the worker does not have it. One may cross StartAction on the way,
and a worker may be slow to take it up; a third one means that the message or the action was dropped."""


class WorkerTransitions:
    """Transitions that a worker's message, its silence or the end of its stream sets off."""

    def __init__(self, state: QueueState, tasks: TaskTransitions) -> None:
        self._state = state
        self._tasks = tasks

    def worker_connected(self, event: events.WorkerConnected, now: float) -> None:
        """Take in a worker, new or known; what it ran and still holds stays its own."""
        state = self._state
        worker = state.matchmaker.workers.get(event.worker_id)
        if worker is None:
            worker = Worker(event.worker_id, event.offer, event.slots)
        else:
            if worker.connection_id:
                reason = f"another connection registered as worker {worker.id}"
                state.add_effect(CloseConnection(worker.connection_id, reason))
            # Nothing goes to it until its offer and its leases are known again.
            worker.state = WorkerState.DISCONNECTED
            state.matchmaker.stop_serving(worker, now)
        worker.connection_id = event.connection_id
        worker.draining = False
        worker.last_seen = now
        worker.version = event.version
        _set_capacity(worker, event)
        self._reconcile_held(worker, {held.lease_id for held in event.held}, now)
        worker.state = WorkerState.CONNECTED
        self._watch(worker)
        state.matchmaker.add_worker(worker, now)

    def heartbeat(self, event: events.WorkerHeartbeat, now: float) -> None:
        """Note that a worker lives, and set right what the two sides believe about leases."""
        worker = self._connected(event.worker_id, event.connection_id, now)
        if worker is None:
            return
        listed = set(event.lease_ids)
        dropped = []
        for lease in worker.leases.values():
            if lease.id in listed:
                lease.unseen_heartbeats = 0
            else:
                lease.unseen_heartbeats += 1
                if lease.unseen_heartbeats >= MAX_UNSEEN_HEARTBEATS:
                    dropped.append(lease)
        self._cancel_unwanted(worker, listed)
        self._lose_leases(worker, dropped, "the worker dropped the action", now)
        if dropped:
            self._state.matchmaker.serve_worker(worker, now)

    def draining(self, event: events.WorkerDraining, now: float) -> None:
        """Give a worker nothing more; it finishes what it has."""
        worker = self._connected(event.worker_id, event.connection_id, now)
        if worker is not None:
            worker.draining = True
            self._state.matchmaker.stop_serving(worker, now)

    def disconnected(self, event: events.WorkerDisconnected, now: float) -> None:
        """Wait a moment for a worker whose stream broke."""
        worker = self._connected(event.worker_id, event.connection_id, now)
        if worker is None:
            return
        worker.state = WorkerState.DISCONNECTED
        worker.connection_id = 0
        worker.left_at = now
        self._state.matchmaker.stop_serving(worker, now)
        self._wait_for_return(worker)

    def stood_still(self, _event: events.StoodStill, now: float) -> None:
        """Give every worker its time anew: what they sent meanwhile waits to be read, or they stood still as well."""
        for worker in self._state.matchmaker.workers.values():
            if worker.connection_id:
                worker.last_seen = now
            elif worker.state is WorkerState.DISCONNECTED:
                worker.left_at = now
                self._wait_for_return(worker)

    def action_started(self, event: events.ActionStarted, now: float) -> None:
        """Note that an action runs."""
        worker = self._connected(event.worker_id, event.connection_id, now)
        lease = worker.leases.get(event.lease_id) if worker is not None else None
        if lease is None or lease.task is None:
            return
        lease.started_at = event.started
        if lease.task.state is TaskState.ASSIGNED:
            lease.task.state = TaskState.EXECUTING
            self._tasks.tell_operations(lease.task)

    def action_finished(self, event: events.ActionFinished, now: float) -> None:
        """Pass on a result, or try elsewhere if the worker was at fault; and give the worker something new."""
        worker = self._connected(event.worker_id, event.connection_id, now)
        lease = worker.leases.get(event.lease_id) if worker is not None else None
        if worker is None or lease is None:
            self._state.add_effect(FinishIgnored(event.worker_id, event.lease_id))
            return
        worker.give_back(lease)
        task = lease.task
        if task is not None:
            task.lease = None
            if event.worker_fault and worker.draining and task.state is TaskState.ASSIGNED:
                # The assignment crossed with Draining: nobody's fault, and no attempt.
                self._tasks.requeue(task, worker.id, "the worker is draining", now)
            elif event.worker_fault:
                reason = f"the worker reported a fault: {event.fault_message}"
                self._tasks.attempt_lost(task, worker.id, reason, now, event.execute_response)
            else:
                self._tasks.complete(task, Outcome(OutcomeKind.FINISHED, event.execute_response), now)
        self._state.matchmaker.serve_worker(worker, now)

    def silence_due(self, subject: tuple[str, int], now: float) -> None:
        """Give up a worker that says nothing; or look again when it could have been silent for long enough."""
        worker_id, connection_id = subject
        worker = self._state.matchmaker.workers.get(worker_id)
        if worker is None or worker.connection_id != connection_id:
            return
        if worker.last_seen + self._state.settings.lost_after_seconds > now:
            self._watch(worker)
            return
        reason = f"silent for {now - worker.last_seen:.1f} seconds"
        self._state.add_effect(CloseConnection(connection_id, reason))
        self._lose(worker, reason, now)

    def reconnect_due(self, subject: tuple[str, float], now: float) -> None:
        """Give up a worker that did not come back."""
        worker_id, left_at = subject
        worker = self._state.matchmaker.workers.get(worker_id)
        if worker is not None and worker.state is WorkerState.DISCONNECTED and worker.left_at == left_at:
            self._lose(worker, "its connection broke and it did not come back", now)

    def memory_due(self, subject: tuple[str, float], now: float) -> None:
        """Forget a worker that was lost long ago."""
        worker_id, left_at = subject
        worker = self._state.matchmaker.workers.get(worker_id)
        if worker is not None and worker.state is WorkerState.GONE and worker.left_at == left_at:
            self._state.matchmaker.forget_worker(worker, now)

    def _connected(self, worker_id: str, connection_id: int, now: float) -> Worker | None:
        """Return a worker if this is its present stream, and note that it lives."""
        worker = self._state.matchmaker.workers.get(worker_id)
        if worker is None or worker.connection_id != connection_id:
            return None
        worker.last_seen = now
        return worker

    def _wait_for_return(self, worker: Worker) -> None:
        when = worker.left_at + self._state.settings.worker_reconnect_grace_seconds
        self._state.timers.set(when, TimerKind.WORKER_DISCONNECTED, (worker.id, worker.left_at))

    def _watch(self, worker: Worker) -> None:
        when = worker.last_seen + self._state.settings.lost_after_seconds
        self._state.timers.set(when, TimerKind.WORKER_SILENT, (worker.id, worker.connection_id))

    def _lose(self, worker: Worker, reason: str, now: float) -> None:
        state = self._state
        worker.state = WorkerState.GONE
        worker.connection_id = 0
        worker.left_at = now
        if worker.leases or not worker.draining:
            # A worker that drained and left empty-handed is what an operator wanted.
            state.add_effect(WorkerLost(worker.id, reason, len(worker.leases)))
        state.matchmaker.stop_serving(worker, now)
        self._lose_leases(worker, list(worker.leases.values()), reason, now)
        state.timers.set(now + state.settings.worker_memory_seconds, TimerKind.WORKER_FORGOTTEN, (worker.id, now))

    def _reconcile_held(self, worker: Worker, held: set[str], now: float) -> None:
        """Compare what a worker holds with what it was given, when it connects again."""
        # A lease that nobody here knows may come from an earlier scheduler: this is where it would be adopted.
        self._cancel_unwanted(worker, held)
        missing = [lease for lease in worker.leases.values() if lease.id not in held]
        self._lose_leases(worker, missing, "the worker restarted", now)

    def _cancel_unwanted(self, worker: Worker, listed: Iterable[str]) -> None:
        """Have a worker end what it holds and nobody waits for."""
        for lease_id in sorted(listed):
            lease = worker.leases.get(lease_id)
            if lease is None or lease.task is None:
                reason = "the scheduler does not know this lease" if lease is None else "cancelled"
                self._state.add_effect(CancelAction(worker.id, worker.connection_id, lease_id, reason))

    def _lose_leases(self, worker: Worker, leases: Iterable[Lease], reason: str, now: float) -> None:
        for lease in leases:
            worker.give_back(lease)
            if lease.task is not None:
                self._tasks.lease_lost(lease.task, worker.id, reason, now)


def _set_capacity(worker: Worker, event: events.WorkerConnected) -> None:
    """Set what a worker has, and what is left beside the leases that it holds."""
    worker.offer = event.offer
    worker.slots = event.slots
    worker.free_slots = event.slots - len(worker.leases)
    worker.free = dict(event.offer.amounts)
    for lease in worker.leases.values():
        for name, amount in lease.platform.minimums:
            worker.free[name] = worker.free.get(name, 0) - amount
