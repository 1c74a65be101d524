"""The store's clock against the machine's."""

from __future__ import annotations

import pytest
from typing_extensions import override

from lathe_cas.stores.store_clock import StoreClock
from lathe_shared.clock import Clock


class SetClock(Clock):
    """Clocks that a test sets one by one."""

    wall = 1_000.0
    passed = 77.0

    @override
    def wall_seconds(self) -> float:
        return self.wall

    @override
    def monotonic(self) -> float:
        return self.passed

    @override
    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("newest_seconds", "expected"), [(0, 1_000), (900, 1_000), (1_001, 1_001), (10**9, 10**9)])
def test_it_begins_with_the_wall_clock_or_with_what_the_store_has_seen(newest_seconds: int, expected: int) -> None:
    assert StoreClock(SetClock(), newest_seconds).seconds() == expected


def test_it_passes_with_the_monotonic_clock_whatever_the_wall_clock_does() -> None:
    machine = SetClock()
    clock = StoreClock(machine, 0)
    for wall in (5.0, 10.0**10):
        machine.wall = wall
        assert clock.seconds() == 1_000
    machine.passed += 10
    assert clock.seconds() == 1_010
