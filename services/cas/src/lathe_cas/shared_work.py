"""Work that is done once for all who ask for it at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from lathe_shared.errors import LatheError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class SharedWork:
    """Runs work in the background, equal work once, and only so much of it at a time.

    Args:
        name: What kind of work, for the log.
        at_once: How many pieces of work may run at the same time; others wait.
    """

    def __init__(self, name: str, at_once: int) -> None:
        self._name = name
        self._slots = asyncio.Semaphore(at_once)
        self._running: dict[Hashable, asyncio.Task[Any]] = {}

    async def once(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """Do some work, or wait for that with an equal key.

        Cancellation: It ends the waiting. The work goes on, so that the next one who asks finds it done.
        """
        task: asyncio.Task[T] | None = self._running.get(key)
        if task is None:
            task = asyncio.create_task(self._in_a_slot(work))
            self._running[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait until all that runs now has ended, however that may be."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def aclose(self) -> None:
        """Give up what is under way."""
        for task in self._running.values():
            task.cancel()
        await self.settle()

    async def _in_a_slot(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._slots:
            return await work()

    def _ended(self, key: Hashable, task: asyncio.Task[T]) -> None:
        del self._running[key]
        if task.cancelled() or (error := task.exception()) is None:
            return
        # Whoever waits is told; there may be nobody.
        if isinstance(error, LatheError):
            _log.info("shared_work_failed", work=self._name, error=str(error))
        else:
            _log.error("shared_work_failed", work=self._name, exc_info=error)
