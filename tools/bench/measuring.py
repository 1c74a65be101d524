"""Measure rows on servers: in turns, several times, with the server's processor time beside the clock's.

A machine that others use too gives figures that wander. So engines take turns within a row, the ratio is the median of
the ratios of each turn, and the server's processor time for a call is told: others cannot take that much away.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tools.bench.processes import CpuTime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tools.bench.processes import ServerProcess
    from tools.bench.rows import Row, Target
    from tools.bench.timing import Timing

_STEP = 10


@dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        rate: Units per second.
        calls: Calls made.
        cpu: Processor time of the server; None for a server by address.
    """

    rate: float
    calls: int
    cpu: CpuTime | None

    @property
    def server_us_per_call(self) -> float | None:
        """Processor microseconds of the server for one call."""
        return None if self.cpu is None else self.cpu.total_seconds / self.calls * 1e6

    @property
    def kernel_share(self) -> float | None:
        """The part of them that the kernel took; None if there were too few to tell."""
        if self.cpu is None or not self.cpu.total_seconds:
            return None
        return self.cpu.kernel_seconds / self.cpu.total_seconds


@dataclass
class RowResult:
    """What was measured of a row.

    Attributes:
        row: Which.
        runs: The runs by engine, in order.
    """

    row: Row
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def best(self, engine: str) -> float:
        """Return an engine's best rate."""
        return max(run.rate for run in self.runs[engine])

    def median(self, engine: str) -> float:
        """Return the median of an engine's rates."""
        return statistics.median(run.rate for run in self.runs[engine])

    def server_us_per_call(self, engine: str) -> float | None:
        """Return the median of an engine's server time for a call."""
        return _median([run.server_us_per_call for run in self.runs[engine]])

    def kernel_share(self, engine: str) -> float | None:
        """Return the median of an engine's share of time in the kernel."""
        return _median([run.kernel_share for run in self.runs[engine]])

    def ratio(self, engine: str, baseline: str) -> float:
        """Return by how much an engine is faster than another one, in the median turn."""
        pairs = zip(self.runs[engine], self.runs[baseline], strict=True)
        return statistics.median(run.rate / base.rate for run, base in pairs)


@dataclass(frozen=True)
class Measured:
    """A server to be measured, under its engine's name.

    Attributes:
        engine: The engine, or what else to call it.
        target: How it is reached.
        server: Its process; None for a server by address.
    """

    engine: str
    target: Target
    server: ServerProcess | None


def measure_row(row: Row, servers: Sequence[Measured], *, seconds: float, turns: int) -> RowResult:
    """Measure one row on servers in turns.

    Args:
        row: Which.
        servers: Those that the row is for.
        seconds: How long a run should take.
        turns: Runs on each server.

    Raises:
        BenchError: A call failed, or was answered wrong.
    """
    result = RowResult(row, {measured.engine: [] for measured in servers})
    callers = [(measured, row.prepare(row, measured.target)) for measured in servers]
    counts = [_calls_for(row, make_calls, seconds) for _, make_calls in callers]
    for _ in range(turns):
        for (measured, make_calls), count in zip(callers, counts, strict=True):
            units = row.units_per_call(measured.target)
            result.runs[measured.engine].append(_run(measured.server, make_calls, count, units))
    return result


def _calls_for(row: Row, make_calls: Callable[[int], Timing], seconds: float) -> int:
    """Return how many calls take so many seconds; finding that out warms the server up, too."""
    count = row.first_calls
    timing = make_calls(count)
    # Short runs are slower than long ones: each but the last one tells of one that is at most ten times as long.
    while timing.seconds * _STEP < seconds and count < row.max_calls:
        count = min(count * _STEP, row.max_calls)
        timing = make_calls(count)
    wanted = min(max(int(timing.calls_per_second * seconds), row.first_calls), row.max_calls)
    in_flight = row.load.in_flight
    return -(-wanted // in_flight) * in_flight


def _run(server: ServerProcess | None, make_calls: Callable[[int], Timing], count: int, units_per_call: float) -> Run:
    before = server.cpu_time() if server is not None else None
    timing = make_calls(count)
    cpu = server.cpu_time().since(before) if server is not None and before is not None else None
    return Run(timing.calls_per_second * units_per_call, timing.calls, cpu)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
