"""Allowances against peers that keep us busy with frames that cost them nothing.

An allowance is spent by useless frames and comes back with time, and with useful work where that rightly brings such
frames along. It knows no clock: whoever owns the connection says how much time has passed.

Spec: RFC 9113 section 10.5; CVE-2019-9512 to 9518 and CVE-2023-44487 are the attacks.
"""

from __future__ import annotations

from typing import Final

from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode

_MOST_EARNED: Final = 1 << 20
"""Bound on what work can save up: WINDOW_UPDATEs for all that may be under way to a peer with the largest windows."""


class Allowance:
    """A number of frames that may still come.

    Args:
        name: What it is for, as the peer is told when it is used up.
        burst: How many may come at once, and to how much it comes back with time.
        per_second: How fast it comes back.
    """

    __slots__ = ("_burst", "_left", "_name", "_per_second", "_work_seen")

    def __init__(self, name: str, burst: int, per_second: float) -> None:
        self._name = name
        self._burst = burst
        self._per_second = per_second
        self._left: float = burst
        self._work_seen = 0

    def spend(self, work: int = 0, *, cost: int = 1) -> None:
        """Take one frame off.

        Args:
            work: Count of everything so far that earns allowance; its growth since the last time is added.
            cost: As how many the frame counts.

        Raises:
            ConnectionFaultError: Nothing is left.
        """
        left = self._left
        if work != self._work_seen:
            left = min(left + work - self._work_seen, max(_MOST_EARNED, self._burst))
            self._work_seen = work
        if left < cost:
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, f"too many {self._name}")
        self._left = left - cost

    def refill(self, seconds: float) -> None:
        """Add what comes back in some seconds."""
        if self._left < self._burst:
            self._left = min(self._left + seconds * self._per_second, self._burst)
