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
from lathe_cas.stores.lmdb_operations import RenewLeases
from lathe_shared.errors import InternalError, LatheError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    Attributes:
        given_up: Done when LMDB has given the environment up, so that only another process can go on.
    """

    def __init__(self, committer: LmdbCommitter, touches: Touches, name: str = "lmdb-writer") -> None:
        self.committer = committer
        self._touches = touches
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Operation[Any], asyncio.Future[Any]]] = deque()
        self._put_off: deque[tuple[Operation[Any], asyncio.Future[Any]]] = deque()
        self._renewals: deque[tuple[RenewLeases, asyncio.Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._pending_bytes = 0
        self._waiting_for_room: list[asyncio.Future[None]] = []
        self._stopped = self._loop.create_future()
        self.given_up: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def submit(self, operation: Operation[T]) -> T:
        """Have an operation done, and return its result once it is durable.

        Raises:
            LatheError: It could not be done; nothing was changed.

        Cancellation: The operation may or may not be done; what it stores is whole either way.
        """
        # What takes no room does not wait for those that wait for theirs.
        if operation.cost_bytes:
            await self.wait_for_room()
        return await self.submit_nowait(operation)

    async def submit_each(self, operations: Sequence[Operation[None]]) -> list[LatheError | None]:
        """Have operations done, at least one, and return for each None, or why it could not be done.

        Raises:
            UnavailableError: None of them could be done.

        Cancellation: As for ``submit``.
        """
        await self.wait_for_room()
        futures = self._submit_together(operations)
        errors: list[LatheError | None] = []
        try:
            for future in futures:
                try:
                    await future
                except LatheError as error:
                    errors.append(error)
                else:
                    errors.append(None)
        finally:
            # An error that is there already is not logged then, either.
            for future in futures[len(errors) :]:
                future.cancel()
        first = errors[0]
        if first is not None and all(isinstance(error, UnavailableError) for error in errors):
            raise first
        return errors

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
        return self._submit_together((operation,))[0]

    def _submit_together(self, operations: Sequence[Operation[T]]) -> list[asyncio.Future[T]]:
        futures: list[asyncio.Future[T]] = [self._loop.create_future() for _ in operations]
        if self._closing:
            for future in futures:
                future.set_exception(UnavailableError("the store is shutting down"))
            return futures
        self._pending_bytes += sum([operation.cost_bytes for operation in operations])
        with self._wake:
            self._queue.extend(zip(operations, futures, strict=True))
            self._wake.notify()
        return futures

    def submit_background(self, operation: Operation[Any]) -> None:
        """Queue an operation whose outcome nobody waits for; a failure is logged."""
        self.submit_nowait(operation).add_done_callback(log_failure)

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
            # What was used last is worth the last transactions: leases outlive the process, however many they are.
            left = len(self._touches) + 1
            while len(self._touches) < left:
                left = len(self._touches)
                self._commit([])
        finally:
            self._loop.call_soon_threadsafe(self._stopped.set_result, None)

    def _take(self) -> list[tuple[Operation[Any], asyncio.Future[Any]]] | None:
        """Wait for work and return it; an empty list for upkeep alone, None at the end."""
        with self._wake:
            has_work = self._queue or self._put_off or self._renewals
            if not has_work and not self._closing and not self.committer.has_pressing_upkeep:
                self._wake.wait(IDLE_SECONDS)
            if self._closing and not (self._queue or self._put_off or self._renewals):
                return None
            # Those that wait for room do not fill the batch, or what needs none would have to wait with them.
            taken = _take_from(self._put_off, MAX_BATCH_BYTES // 2)
            later = {operation.order_key for operation, _ in self._put_off}
            for item in _take_from(self._queue, MAX_BATCH_BYTES):
                operation, future = item
                if isinstance(operation, RenewLeases):
                    self._renewals.append((operation, future))
                    continue
                order_key = operation.order_key
                (taken if order_key is None or order_key not in later else self._put_off).append(item)
            return taken + self._take_renewals()

    def _take_renewals(self) -> list[tuple[Operation[Any], asyncio.Future[Any]]]:
        """Take renewals as far as one transaction has time for them: all clients come at once after a weekend."""
        taken: list[tuple[Operation[Any], asyncio.Future[Any]]] = []
        touches = 0
        while self._renewals and touches < MAX_TOUCHES:
            operation, future = self._renewals.popleft()
            taken.append((operation, future))
            touches += len(operation.blobs)
        return taken

    def _commit(self, taken: list[tuple[Operation[Any], asyncio.Future[Any]]]) -> None:
        if not taken and not self.committer.has_upkeep:
            return
        try:
            outcomes = self.committer.commit([operation for operation, _ in taken])
        except Exception:  # noqa: BLE001 - the writer outlives every bug; whoever waits gets an answer
            _log.exception("writer_failed")
            outcomes = [Outcome(None, InternalError("the store failed; see its log"))] * len(taken)
        if self.committer.is_given_up:
            self._loop.call_soon_threadsafe(self._note_given_up)
        put_off = [item for item, outcome in zip(taken, outcomes, strict=True) if outcome.is_put_off]
        self._put_off.extendleft(reversed(put_off))
        if len(put_off) < len(taken):
            self._loop.call_soon_threadsafe(self._resolve, taken, outcomes)

    # Back on the event loop

    def _note_given_up(self) -> None:
        if not self.given_up.done():
            self.given_up.set_result(None)

    def _resolve(self, taken: list[tuple[Operation[Any], asyncio.Future[Any]]], outcomes: list[Outcome]) -> None:
        for (operation, future), outcome in zip(taken, outcomes, strict=True):
            if outcome.is_put_off:
                continue
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


def _take_from(
    queue: deque[tuple[Operation[Any], asyncio.Future[Any]]], max_bytes: int
) -> list[tuple[Operation[Any], asyncio.Future[Any]]]:
    """Remove and return what comes first, as far as it fits into a batch."""
    taken: list[tuple[Operation[Any], asyncio.Future[Any]]] = []
    cost = touches = 0
    while queue and cost < max_bytes and touches < MAX_TOUCHES and len(taken) < MAX_BATCH_OPERATIONS:
        item = queue.popleft()
        cost += item[0].cost_bytes
        touches += item[0].touches
        taken.append(item)
    return taken


def log_failure(future: asyncio.Future[Any]) -> None:
    """Be told of an operation that nobody has to hear of."""
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.warning("background_operation_failed", error=str(error))
