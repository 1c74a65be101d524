"""The only owner of the action queue: feeds it events, does what it asks for, tells it the time.

Everything here runs on one event loop, and ``submit`` never waits: between an event and its effects nothing else can
happen. Whoever follows an operation reads its present state when woken, so a slow client skips states, never sees them
out of order.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import structlog

from lathe_scheduler import queue_effects as effects
from lathe_scheduler import queue_events as events
from lathe_scheduler.operation_messages import operation_message
from lathe_scheduler.task import OutcomeKind, TaskState
from lathe_scheduler.worker_messages import cancel_action, reports_missing, start_action
from lathe_shared.errors import NotFoundError
from lathe_shared.request_metadata import RequestMetadata

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from lathe_scheduler.action_check import ActionChecker
    from lathe_scheduler.action_queue import ActionQueue
    from lathe_scheduler.operation import Operation
    from lathe_scheduler.scheduler_metrics import SchedulerMetrics
    from lathe_scheduler.task import Task
    from lathe_scheduler.worker_connection import WorkerConnection
    from lathe_shared.clock import Clock

TICK_SECONDS = 0.25
"""How exactly deadlines are kept. The shortest is two seconds; four wake-ups a second cost nothing."""

STANDSTILL_SECONDS = 1.0
"""What wakes up later than this was not busy but stopped: a virtual machine that is moved, swapping, a debugger."""

_log = structlog.get_logger("lathe.scheduler")


class QueueRunner:
    """Runs an action queue.

    Args:
        queue: The queue; nobody else may change it.
        checker: Checks actions before they are queued.
        clock: Tells the time.
        metrics: What is counted.
        default_action_timeout_seconds: What workers apply to actions without a timeout; 0 for no limit.
        operation_update_interval_seconds: How often a follower hears of an operation that does not change.
    """

    def __init__(
        self,
        queue: ActionQueue,
        checker: ActionChecker,
        clock: Clock,
        metrics: SchedulerMetrics,
        *,
        default_action_timeout_seconds: float = 0.0,
        operation_update_interval_seconds: float = 30.0,
    ) -> None:
        self.queue = queue
        self.on_missing_inputs: Callable[[], None] = lambda: None
        """Called when a worker did not find an input that was there when the action was queued."""
        self._checker = checker
        self._clock = clock
        self._metrics = metrics
        self._default_timeout_seconds = default_action_timeout_seconds
        self._update_interval_seconds = operation_update_interval_seconds
        self._followers: dict[str, set[asyncio.Event]] = {}
        self._connections: dict[int, WorkerConnection] = {}
        self._last_connection_id = 0
        self._checks: dict[int, asyncio.Task[None]] = {}
        self._past_cache: set[int] = set()
        self._appliers: dict[type, Callable[..., None]] = {
            effects.CheckAction: self._start_check,
            effects.AbandonCheck: self._abandon_check,
            effects.OperationChanged: self._wake_followers,
            effects.OperationForgotten: self._wake_followers,
            effects.ExecutionMerged: self._count_merged,
            effects.StartAction: self._start_action,
            effects.CancelAction: self._cancel_action,
            effects.CloseConnection: self._close_connection,
            effects.WorkerLost: self._log_lost_worker,
            effects.FinishIgnored: self._log_ignored_finish,
            effects.TaskRequeued: self._log_requeued,
            effects.TaskCompleted: self._log_completed,
        }

    # ---- events in, effects out

    def submit(self, event: events.QueueEvent) -> None:
        """Hand an event to the queue and do what it asks for."""
        for effect in self.queue.handle(event, self._clock.monotonic()):
            self._appliers[type(effect)](effect)
        self._metrics.observe(self.queue, len(self._connections))

    async def run(self) -> None:
        """Keep deadlines and refresh followers until cancelled.

        Cancellation: gives up running checks.
        """
        next_refresh = self._clock.monotonic() + self._update_interval_seconds
        try:
            while True:
                due = self._clock.monotonic() + TICK_SECONDS
                await self._clock.sleep(TICK_SECONDS)
                now = self._clock.monotonic()
                if now > due + STANDSTILL_SECONDS:
                    _log.warning("stood_still", seconds=round(now - due, 1))
                    self.submit(events.StoodStill())
                deadline = self.queue.next_deadline()
                if deadline is not None and deadline <= now:
                    self.submit(events.TimePassed())
                if now >= next_refresh:
                    next_refresh = now + self._update_interval_seconds
                    for followers in self._followers.values():
                        for follower in followers:
                            follower.set()
        finally:
            for check in list(self._checks.values()):
                check.cancel()
            await asyncio.gather(*self._checks.values(), return_exceptions=True)

    # ---- clients

    async def follow(self, name: str, *, is_new: bool = False) -> AsyncGenerator[bytes, None]:
        """Yield an operation's state now, at each change and now and then, until it is done.

        The end comes also if the operation is forgotten the moment that it is done, as it may be where few are kept.

        Args:
            name: The operation; counting the listener is the caller's business.
            is_new: Raise what the request was rejected with, and yield nothing until the action cache was asked: a
                cached result is then the first message, and a storage that is away can be answered by a plain status.

        Raises:
            NotFoundError: The operation is unknown.
            LatheError: Why a new request was rejected.
        """
        # Looked up once: what is forgotten is done, and its outcome does not change any more.
        operation = self._known(name)
        changed = asyncio.Event()
        self._followers.setdefault(name, set()).add(changed)
        try:
            while True:
                if is_new and operation.outcome is not None and operation.outcome.kind is OutcomeKind.REJECTED:
                    raise operation.outcome.error or RuntimeError("rejected without an error")
                if not (is_new and self._asks_cache(operation)):
                    yield operation_message(operation)
                if operation.is_done:
                    return
                await changed.wait()
                changed.clear()
        finally:
            followers = self._followers[name]
            followers.discard(changed)
            if not followers:
                del self._followers[name]

    async def wait_until_done(self, name: str) -> None:
        """Wait for the end of an operation without counting as its listener.

        Raises:
            NotFoundError: The operation is unknown.
        """
        async for _ in self.follow(name):
            pass

    def _known(self, name: str) -> Operation:
        operation = self.queue.operation(name)
        if operation is None:
            raise NotFoundError(f"no operation {name[:300]!r}; it never was, or it was done some time ago")
        return operation

    def _asks_cache(self, operation: Operation) -> bool:
        task = operation.task
        return task is not None and task.state is TaskState.CHECKING and task.id not in self._past_cache

    def _wake_followers(self, effect: effects.OperationChanged | effects.OperationForgotten) -> None:
        for follower in self._followers.get(effect.operation_name, ()):
            follower.set()

    def _count_merged(self, _effect: effects.ExecutionMerged) -> None:
        self._metrics.merged.inc()

    # ---- checks

    def _start_check(self, effect: effects.CheckAction) -> None:
        self._checks[effect.task.id] = asyncio.create_task(self._check(effect.task))

    def _abandon_check(self, effect: effects.AbandonCheck) -> None:
        check = self._checks.pop(effect.task_id, None)
        self._past_cache.discard(effect.task_id)
        if check is not None:
            check.cancel()

    async def _check(self, task: Task) -> None:
        def past_cache() -> None:
            self._past_cache.add(task.id)
            for name in task.operations:
                for follower in self._followers.get(name, ()):
                    follower.set()

        try:
            event = await self._checker.check(task, past_cache)
        finally:
            self._past_cache.discard(task.id)
            self._checks.pop(task.id, None)
        if isinstance(event, events.CheckEnded) and event.outcome.kind is OutcomeKind.CACHED:
            self._metrics.cache_hits.inc(len(task.operations))
        self.submit(event)

    # ---- workers

    def new_connection_id(self) -> int:
        """Return a fresh number for a worker's stream."""
        self._last_connection_id += 1
        return self._last_connection_id

    def connect(self, connection: WorkerConnection, event: events.WorkerConnected) -> None:
        """Take in a worker's stream."""
        self._connections[connection.connection_id] = connection
        _log.info(
            "worker_connected",
            worker_id=event.worker_id,
            slots=event.slots,
            held_count=len(event.held),
            version=event.version,
        )
        self.submit(event)

    def disconnect(self, connection: WorkerConnection) -> None:
        """Let go of a worker's stream that has ended."""
        if self._connections.pop(connection.connection_id, None) is not None:
            _log.info("worker_disconnected", worker_id=connection.worker_id, reason=connection.close_reason)
            self.submit(events.WorkerDisconnected(connection.worker_id, connection.connection_id))

    @property
    def connection_count(self) -> int:
        """Number of workers connected."""
        return len(self._connections)

    def _start_action(self, effect: effects.StartAction) -> None:
        self._metrics.dispatched.inc()
        connection = self._connections.get(effect.connection_id)
        if connection is not None:
            connection.send(start_action(effect, self._default_timeout_seconds))
        if _log.is_enabled_for(logging.DEBUG):
            fields = _task_fields(effect.task)
            _log.debug("action_dispatched", worker_id=effect.worker_id, lease_id=effect.lease_id, **fields)

    def _cancel_action(self, effect: effects.CancelAction) -> None:
        connection = self._connections.get(effect.connection_id)
        if connection is not None:
            connection.send(cancel_action(effect))

    def _close_connection(self, effect: effects.CloseConnection) -> None:
        connection = self._connections.get(effect.connection_id)
        if connection is not None:
            connection.close(effect.reason)

    # ---- for people

    def _log_lost_worker(self, effect: effects.WorkerLost) -> None:
        self._metrics.workers_lost.inc()
        _log.warning("worker_lost", worker_id=effect.worker_id, reason=effect.reason, lease_count=effect.requeued_count)

    @staticmethod
    def _log_ignored_finish(effect: effects.FinishIgnored) -> None:
        _log.info("finish_ignored", worker_id=effect.worker_id, lease_id=effect.lease_id)

    def _log_requeued(self, effect: effects.TaskRequeued) -> None:
        self._metrics.requeued.inc()
        _log.warning(
            "action_requeued",
            worker_id=effect.worker_id,
            reason=effect.reason,
            lost_count=len(effect.task.lost_on),
            **_task_fields(effect.task),
        )

    def _log_completed(self, effect: effects.TaskCompleted) -> None:
        outcome = effect.outcome
        self._metrics.completed.labels(outcome.kind.value).inc()
        if outcome.response is not None and outcome.kind is OutcomeKind.FINISHED and reports_missing(outcome.response):
            self.on_missing_inputs()
        if _log.is_enabled_for(logging.DEBUG):
            _log.debug("action_completed", outcome=outcome.kind.value, **_task_fields(effect.task))


def _task_fields(task: Task) -> dict[str, str]:
    """Return what a log line says of a task.

    What moves it on is often another client's RPC, whose ids must not show.
    """
    return {
        "invocation_id": "",
        "target_id": "",
        "mnemonic": "",
        **RequestMetadata.parse(task.request_metadata).log_fields(),
        "action_id": task.key.digest.hash,
        "action_digest": str(task.key.digest),
        "instance_name": task.key.instance_name,
    }
