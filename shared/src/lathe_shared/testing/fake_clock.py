"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from typing_extensions import override

from lathe_shared.clock import Clock

EPOCH_SECONDS = 1_700_000_000.0
"""Wall time at which a fake clock begins: an arbitrary moment in November 2023."""

SETTLE_TURNS = 50
"""Loop turns given to woken tasks before and after each wake-up: more than any chain of awaits in our code takes."""


class FakeClock(Clock):
    """A clock for tests.

    Wall and monotonic time move together. Sleepers wake in the order of their deadlines, equal ones in the order in
    which they fell asleep, so a test runs the same way each time.

    Args:
        wall_seconds: Where the wall time begins, in seconds since the Unix epoch.
    """

    def __init__(self, wall_seconds: float = EPOCH_SECONDS) -> None:
        self._wall_start = wall_seconds
        self._elapsed = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    @override
    def wall_seconds(self) -> float:
        return self._wall_start + self._elapsed

    @override
    def monotonic(self) -> float:
        return self._elapsed

    @override
    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed + seconds, next(self._order), future))
        await future

    @property
    def sleeper_count(self) -> int:
        """How many tasks are asleep on this clock."""
        return sum(not future.done() for _, _, future in self._sleepers)

    def advance_nowait(self, seconds: float) -> None:
        """Move the time, and wake whoever's moment has come; they run when the caller next awaits.

        For synchronous tests. ``advance`` lets a sleeper that falls asleep again within the span wake once more.
        """
        self._elapsed += seconds
        while self._sleepers and self._sleepers[0][0] <= self._elapsed:
            _, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)

    async def advance(self, seconds: float) -> None:
        """Move the time, stopping at each sleeper's moment so that what it does happens at that time.

        Returns when the span has passed and woken tasks have had their turns. Work that waits for sockets or threads
        may still be under way: wait for its effect.
        """
        await self.settle()
        end = self._elapsed + seconds
        while True:
            while self._sleepers and self._sleepers[0][2].done():
                heapq.heappop(self._sleepers)
            if not self._sleepers or self._sleepers[0][0] > end:
                break
            self.advance_nowait(self._sleepers[0][0] - self._elapsed)
            await self.settle()
        self._elapsed = end
        await self.settle()

    async def settle(self) -> None:
        """Let tasks that can run do so, without moving the time."""
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)


class ImpatientClock(FakeClock):
    """Notes what it is asked to wait, and does not wait.

    Attributes:
        pauses: What it was asked for, in seconds, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    @override
    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
