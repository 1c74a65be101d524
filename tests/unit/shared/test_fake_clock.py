from __future__ import annotations

import asyncio
import datetime

from lathe_shared.clock import SystemClock
from lathe_shared.testing.fake_clock import FakeClock


async def test_sleepers_wake_in_the_order_of_their_moments() -> None:
    clock = FakeClock()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        for name, seconds in (("late", 3.0), ("early", 1.0), ("first of two", 2.0), ("second of two", 2.0)):
            group.create_task(sleeper(name, seconds))
        await clock.advance(5)

    assert woken == [("early", 1.0), ("first of two", 2.0), ("second of two", 2.0), ("late", 3.0)]
    assert clock.monotonic() == 5


async def test_a_sleeper_that_sleeps_again_wakes_again_within_one_advance() -> None:
    clock = FakeClock()
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            await clock.sleep(1)
            ticks.append(clock.monotonic())

    task = asyncio.create_task(tick())
    await clock.advance(3.5)
    task.cancel()

    assert ticks == [1, 2, 3]


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(1))
    await clock.settle()
    assert clock.sleeper_count == 1

    task.cancel()
    await clock.settle()

    assert clock.sleeper_count == 0
    await clock.advance(2)
    assert task.cancelled()


async def test_nothing_wakes_before_its_moment() -> None:
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(1))
    await clock.advance(0.999)
    assert not task.done()

    clock.advance_nowait(0.001)
    await task


def test_wall_and_monotonic_time_move_together() -> None:
    clock = FakeClock(wall_seconds=1000)
    clock.advance_nowait(2.5)

    assert (clock.wall_seconds(), clock.monotonic()) == (1002.5, 2.5)
    assert clock.now() == datetime.datetime(1970, 1, 1, 0, 16, 42, 500_000, tzinfo=datetime.UTC)


async def test_the_system_clock_is_the_machines() -> None:
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0)

    assert clock.monotonic() >= before
    assert abs(clock.now().timestamp() - clock.wall_seconds()) < 60
