"""The time that touches, leases and ages go by, which does not jump when the machine's clock is set."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe_shared.clock import Clock


class StoreClock:
    """Seconds that begin as the wall clock has them and pass as the monotonic clock does.

    A machine's clock that is set while the store is open thus changes nothing. One that was set back before it was
    opened is noticed by what the store holds: time goes on from the step of the last use that is noted there. One that
    was set forward meanwhile cannot be told from a long pause.

    Args:
        clock: The machine's clocks.
        newest_seconds: A time that the store has seen: not before its last touch's step, 0 if there is none.
    """

    def __init__(self, clock: Clock, newest_seconds: float) -> None:
        self._monotonic = clock.monotonic
        self._offset = max(clock.wall_seconds(), newest_seconds) - clock.monotonic()

    def seconds(self) -> float:
        """Return the time: seconds since the Unix epoch, unless a clock was wrong at some time."""
        return self._offset + self._monotonic()
