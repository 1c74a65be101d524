"""The one thread that writes to an environment.

It takes all operations that wait, commits them together and answers them together, so that the cost of making data
durable is shared by whoever arrived meanwhile. Nobody waits for a timer: the first operation starts a batch, and the
time its commit takes is what gathers the next one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from lathe_cas.stores.lmdb_committer import MAX_TOUCHES, Outcome
from lathe_shared.errors import InternalError, UnavailableError

if TYPE_CHECKING:
    from lathe_cas.stores.access_touches import Touches
    from lathe_cas.stores.lmdb_committer import LmdbCommitter
    from lathe_cas.stores.lmdb_operations import Operation

T = TypeVar("T")

MAX_BATCH_BYTES = 16 << 20
"""Bytes in one transaction: enough that its fsync hardly counts, and a bound for the time others wait behind it."""

MAX_BATCH_OPERATIONS = 4096

MAX_PENDING_BYTES = 64 << 20
"""Bytes that may wait for the writer; who brings more waits in ``submit``. A bound for memory."""

IDLE_SECONDS = 5.0
"""How often an idle writer looks for upkeep: touches are on disk within this time."""

_log = structlog.get_logger(__name__)


class LmdbWriter:
    """Runs a committer in a thread of its own. Everything here but the thread itself belongs to one event loop.

    Args:
        committer: Does the work.
        touches: What was used; looked at when somebody says that there is much of it, and every IDLE_SECONDS.
        name: Of the thread.
    """

    def __init__(self, committer: LmdbCommitter, touches: Touches, name: str = "lmdb-writer") -> None:
        self.committer = committer
        self._touches = touches
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Operation[Any], asyncio.Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._pending_bytes = 0
        self._waiting_for_room: list[asyncio.Future[None]] = []
        self._stopped = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def submit(self, operation: Operation[T]) -> T:
        """Have an operation done, and return its result once it is durable.

        Raises:
            LatheError: It could not be done; nothing was changed.

        Cancellation: The operation may or may not be done; what it stores is whole either way.
        """
        await self.wait_for_room()
        return await self.submit_nowait(operation)

    @property
    def has_room(self) -> bool:
        """Whether ``wait_for_room`` would not wait."""
        return self._pending_bytes < MAX_PENDING_BYTES

    async def wait_for_room(self) -> None:
        """Wait until fewer than MAX_PENDING_BYTES wait for the writer."""
        while not self.has_room:
            waiter = self._loop.create_future()
            self._waiting_for_room.append(waiter)
            await waiter

    def submit_nowait(self, operation: Operation[T]) -> asyncio.Future[T]:
        """Queue an operation, however many wait, and return the future of its result."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closing:
            future.set_exception(UnavailableError("the store is shutting down"))
            return future
        self._pending_bytes += operation.cost_bytes
        with self._wake:
            self._queue.append((operation, future))
            self._wake.notify()
        return future

    def submit_background(self, operation: Operation[Any]) -> None:
        """Queue an operation whose outcome nobody waits for; a failure is logged."""
        self.submit_nowait(operation).add_done_callback(_log_failure)

    def look_at_touches(self) -> None:
        """Have touches written now if they are many, so that neither memory nor what a crash forgets grows."""
        if len(self._touches) >= MAX_TOUCHES and self.committer.has_pressing_upkeep:
            with self._wake:
                self._wake.notify()

    async def aclose(self) -> None:
        """Do what is queued, write what was touched, then end the thread."""
        self._closing = True
        with self._wake:
            self._wake.notify()
        await asyncio.shield(self._stopped)
        self._thread.join()

    # In the writer's thread

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                self._commit(taken)
            # What was used last is worth a last transaction: the order of eviction outlives the process.
            self._commit([])
        finally:
            self._loop.call_soon_threadsafe(self._stopped.set_result, None)

    def _take(self) -> list[tuple[Operation[Any], asyncio.Future[Any]]] | None:
        """Wait for work and return it; an empty list for upkeep alone, None at the end."""
        with self._wake:
            if not self._queue and not self._closing and not self.committer.has_pressing_upkeep:
                self._wake.wait(IDLE_SECONDS)
            if self._closing and not self._queue:
                return None
            taken: list[tuple[Operation[Any], asyncio.Future[Any]]] = []
            cost = 0
            while self._queue and cost < MAX_BATCH_BYTES and len(taken) < MAX_BATCH_OPERATIONS:
                item = self._queue.popleft()
                cost += item[0].cost_bytes
                taken.append(item)
            return taken

    def _commit(self, taken: list[tuple[Operation[Any], asyncio.Future[Any]]]) -> None:
        if not taken and not self.committer.has_upkeep:
            return
        try:
            outcomes = self.committer.commit([operation for operation, _ in taken])
        except Exception:  # noqa: BLE001 - the writer outlives every bug; whoever waits gets an answer
            _log.exception("writer_failed")
            outcomes = [Outcome(None, InternalError("the store failed; see its log"))] * len(taken)
        if taken:
            self._loop.call_soon_threadsafe(self._resolve, taken, outcomes)

    # Back on the event loop

    def _resolve(self, taken: list[tuple[Operation[Any], asyncio.Future[Any]]], outcomes: list[Outcome]) -> None:
        for (operation, future), outcome in zip(taken, outcomes, strict=True):
            self._pending_bytes -= operation.cost_bytes
            if future.done():
                continue
            if outcome.error is None:
                future.set_result(outcome.result)
            else:
                future.set_exception(outcome.error)
        if self._pending_bytes < MAX_PENDING_BYTES:
            # All of them: one that was cancelled, or that brings nothing after all, would wake no other. Each looks
            # again, and whom the ones before it left no room waits on.
            waiting, self._waiting_for_room = self._waiting_for_room, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(None)


def _log_failure(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.warning("background_operation_failed", error=str(error))
