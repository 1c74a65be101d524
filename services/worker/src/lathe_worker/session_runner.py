"""SessionRunner: drives a WorkerSession over gRPC and runs the actions that it is given.

Connections come and go; actions go on. A broken connection is made again after a pause that grows and varies, so that
the workers of a scheduler that restarts do not all come back at the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import TYPE_CHECKING, Any

import structlog

from lathe_shared.clients.rpc_client import RetryPolicy
from lathe_shared.errors import LatheError
from lathe_shared.rpc_context import bind_request_metadata
from lathe_worker.action_outcome import ActionOutcome, cancelled, failed
from lathe_worker.action_request import read_request
from lathe_worker.session_effects import Accepted, Effect, KillAction, RunAction, TurnedAway

if TYPE_CHECKING:
    import datetime

    from lathe_protos import worker_v1
    from lathe_shared.clients.rpc_client import BidirectionalCall, RpcClient
    from lathe_shared.clock import Clock
    from lathe_worker.action_executor import ActionExecutor
    from lathe_worker.worker_metrics import WorkerMetrics
    from lathe_worker.worker_session import WorkerSession

CONNECT = "/lathe.worker.v1.WorkerApi/Connect"

RECONNECTION = RetryPolicy(attempts=0, first_seconds=0.1, limit_seconds=5.0)
"""Pauses between connections. The longest one is how late a worker may notice that its scheduler is back."""

CONNECT_SECONDS = 10.0
"""How long a connection may take to be made; a machine that is gone says nothing at all."""

REGISTER_SECONDS = 10.0
"""How long a scheduler may take to answer the registration."""

SEND_SECONDS = 30.0
"""How long the scheduler may leave its end of the stream unread; it then counts as dead."""

STEADY_SECONDS = 10.0
"""How long a registered connection must have lived for the pauses to begin anew. What breaks it sooner may be in what
is said on it, such as a result that is sent again each time, and would break the next one as well."""

_LOG_EVERY_FAILURES = 20
"""A scheduler that stays away is worth a line about every minute and a half."""

_log = structlog.get_logger("lathe.worker")


class SessionRunner:
    """Keeps a worker connected and its actions running.

    Args:
        session: The conversation.
        scheduler: The scheduler's worker port.
        executor: Runs actions.
        metrics: Counts them.
        clock: For deadlines and the log.
        worker_name: Stands in the errors that this makes.
    """

    def __init__(
        self,
        session: WorkerSession,
        scheduler: RpcClient,
        executor: ActionExecutor,
        metrics: WorkerMetrics,
        clock: Clock,
        worker_name: str,
    ) -> None:
        self._session = session
        self._scheduler = scheduler
        self._executor = executor
        self._metrics = metrics
        self._clock = clock
        self._worker_name = worker_name
        self._actions: dict[str, asyncio.Task[ActionOutcome]] = {}
        self._kill_reasons: dict[str, str] = {}
        self._under_way: dict[str, tuple[str, float]] = {}
        self._wake = asyncio.Event()
        self._left = asyncio.Event()
        self._is_registered = False
        self._registered_at = 0.0

    @property
    def is_registered(self) -> bool:
        """Whether the scheduler knows this worker at the moment."""
        return self._is_registered

    def running(self) -> list[dict[str, Any]]:
        """Describe the actions under way, for the status page."""
        now = self._clock.monotonic()
        return [
            {"lease_id": lease_id, "digest": digest, "seconds": round(now - began, 1)}
            for lease_id, (digest, began) in self._under_way.items()
        ]

    async def run(self) -> None:
        """Stay connected until the worker is drained.

        Cancellation: kills all running actions.
        """
        failures = 0
        try:
            while not self._left.is_set():
                reason = await self._converse()
                was_registered, self._is_registered = self._is_registered, False
                self._session.disconnected()
                self._check_left()
                if self._left.is_set():
                    return
                was_steady = was_registered and self._clock.monotonic() - self._registered_at >= STEADY_SECONDS
                failures = 1 if was_steady else failures + 1
                if failures == 1 or was_registered or failures % _LOG_EVERY_FAILURES == 0:
                    _log.warning("scheduler_away", reason=reason, running=len(self._actions), failures=failures)
                await self._scheduler.pause(failures, RECONNECTION)
        finally:
            await self._kill_all()

    async def drain(self) -> None:
        """Take nothing new, and wait until every result has reached the scheduler.

        A scheduler that is not there is not waited for once nothing runs: it will hand the actions out again.
        """
        self._session.drain(self._clock.monotonic())
        self._wake.set()
        self._check_left()
        await self._left.wait()

    async def _converse(self) -> str:
        """Hold one conversation and return why it ended."""
        try:
            async with (
                asyncio.timeout(CONNECT_SECONDS) as until_connected,
                self._scheduler.bidirectional(CONNECT) as call,
            ):
                until_connected.reschedule(None)
                self._session.connected()
                receiver = asyncio.create_task(self._receive(call))
                receiver.add_done_callback(lambda _: self._wake.set())
                try:
                    return await self._send(call, receiver)
                finally:
                    receiver.cancel()
                    await asyncio.wait([receiver])
        except LatheError as error:
            return error.message
        except TimeoutError:
            return f"{self._scheduler.peer} cannot be reached"

    async def _receive(self, call: BidirectionalCall) -> str:
        while (data := await call.receive()) is not None:
            for effect in self._session.received(data, self._clock.monotonic()):
                self._apply(effect)
                if isinstance(effect, TurnedAway):
                    return f"the scheduler refused this worker: {effect.reason}"
            self._check_left()
            self._wake.set()
        return "the scheduler closed the connection"

    async def _send(self, call: BidirectionalCall, receiver: asyncio.Task[str]) -> str:
        register_deadline = self._clock.monotonic() + REGISTER_SECONDS
        while True:
            self._wake.clear()
            now = self._clock.monotonic()
            self._session.tick(now)
            for message in self._session.take_outgoing():
                async with asyncio.timeout(SEND_SECONDS):
                    await call.send(message)
            if self._session.is_drained:
                await call.end()
                return "drained"
            if receiver.done():
                return receiver.result()
            if self._session.is_silent(now):
                return "the scheduler is silent"
            due = self._session.next_due()
            if due is None:
                if now >= register_deadline:
                    return f"the scheduler did not answer the registration within {REGISTER_SECONDS:g} s"
                due = register_deadline
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(due - now, 0.0)):
                    await self._wake.wait()

    def _apply(self, effect: Effect) -> None:
        if isinstance(effect, RunAction):
            self._run(effect.start)
        elif isinstance(effect, KillAction):
            self._kill_reasons.setdefault(effect.lease_id, effect.reason)
            self._actions[effect.lease_id].cancel()
        elif isinstance(effect, Accepted):
            self._is_registered = True
            self._registered_at = self._clock.monotonic()
            _log.info("registered", scheduler=self._scheduler.peer, running=len(self._actions))

    def _run(self, start: worker_v1.StartAction) -> None:
        """Begin an action, in a context of its own: its log lines and calls carry its client's metadata."""
        context = contextvars.copy_context()
        context.run(bind_request_metadata, start.request_metadata)
        began = self._clock.monotonic()
        task = asyncio.get_running_loop().create_task(self._execute(start), context=context)
        self._actions[start.lease_id] = task
        self._under_way[start.lease_id] = (start.action_digest.hash, began)
        self._metrics.started()
        # Not at the end of the coroutine: one that is cancelled before its first step never runs at all.
        task.add_done_callback(lambda ended: self._report(start, began, ended), context=context)

    def _report(self, start: worker_v1.StartAction, began: float, task: asyncio.Task[ActionOutcome]) -> None:
        """Tell the session how an action ended."""
        lease_id = start.lease_id
        del self._actions[lease_id], self._under_way[lease_id]
        kill_reason = self._kill_reasons.pop(lease_id, None)
        self._metrics.ended()
        if not task.cancelled():
            outcome = task.result()
        elif kill_reason is not None:
            outcome = cancelled(kill_reason)
        else:
            return  # the worker stops
        now = self._clock.monotonic()
        self._metrics.finished(outcome.kind, now - began)
        _log.info(
            "action_finished",
            lease_id=lease_id,
            digest=start.action_digest.hash,
            outcome=outcome.kind.value,
            seconds=round(now - began, 3),
            message=outcome.message,
        )
        self._session.action_finished(lease_id, outcome.execute_response, worker_fault=outcome.worker_fault, now=now)
        self._check_left()
        self._wake.set()

    async def _execute(self, start: worker_v1.StartAction) -> ActionOutcome:
        try:
            request = read_request(start)
        except LatheError as error:
            return failed(error, self._worker_name)

        def on_started(when: datetime.datetime) -> None:
            self._session.action_started(start.lease_id, when)
            self._wake.set()

        return await self._executor.execute(request, on_started)

    def _check_left(self) -> None:
        """Note when a draining worker has nothing left to wait for."""
        nothing_runs = self._session.is_draining and not self._session.running
        if nothing_runs and (self._session.is_drained or not self._is_registered):
            self._left.set()

    async def _kill_all(self) -> None:
        tasks = list(self._actions.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
