"""Time as a dependency.

Whoever needs the time, or waits for it, is given a ``Clock``; tests give ``testing.fake_clock.FakeClock`` instead and
so never wait.
"""

from __future__ import annotations

import abc
import asyncio
import datetime
import time

from typing_extensions import override


class Clock(abc.ABC):
    """What time it is, and how to wait."""

    @abc.abstractmethod
    def wall_seconds(self) -> float:
        """Return seconds since the Unix epoch; may jump when the machine's clock is set."""

    @abc.abstractmethod
    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment; never goes back. For durations and deadlines."""

    @abc.abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait until ``monotonic`` has advanced by ``seconds``.

        Args:
            seconds: Zero or less lets other tasks run once.
        """

    def now(self) -> datetime.datetime:
        """Return the wall time as an aware datetime in UTC, as betterproto's timestamps want it."""
        return datetime.datetime.fromtimestamp(self.wall_seconds(), datetime.UTC)


class SystemClock(Clock):
    """The machine's clocks."""

    @override
    def wall_seconds(self) -> float:
        return time.time()

    @override
    def monotonic(self) -> float:
        return time.monotonic()

    @override
    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
