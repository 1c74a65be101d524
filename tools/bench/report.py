"""What was measured, as a table for people and as JSON for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.bench.measuring import RowResult, Run

ENGINE = "lathe"
BASELINE = "grpclib"


def table(results: Sequence[RowResult], engines: Sequence[str]) -> str:
    """Return a table: for each engine its best and median rate, server time for a call, and share of the kernel.

    Args:
        results: The rows.
        engines: Whose figures to show, in order; with two of them their ratio, too.
    """
    has_ratio = ENGINE in engines and BASELINE in engines
    head = ["call", "in flight", "client", "unit"]
    for engine in engines:
        head += [f"{engine} best", "median", "µs/call", "kernel"]
    lines = [[*head, "ratio"] if has_ratio else head]
    for result in results:
        row = result.row
        line = [row.name, str(row.load.in_flight), row.client, row.unit]
        for engine in engines:
            line += [
                _rate(result.best(engine)),
                _rate(result.median(engine)),
                _microseconds(result.server_us_per_call(engine)),
                _share(result.kernel_share(engine)),
            ]
        lines.append([*line, f"{result.ratio(ENGINE, BASELINE):.1f}"] if has_ratio else line)
    return _align(lines)


def _align(lines: Sequence[Sequence[str]]) -> str:
    """Write lines in columns; what is words to the left, what is figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = (0, 2, 3)
    rows = [
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([rows[0], "  ".join("-" * width for width in widths), *rows[1:]])


def as_json(results: Sequence[RowResult], machine: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """Return everything that was measured, run by run.

    Args:
        results: The rows.
        machine: The machine's facts.
        settings: How it was measured.
    """
    return {"machine": machine, "settings": settings, "rows": [_row(result) for result in results]}


def _row(result: RowResult) -> dict[str, object]:
    row = result.row
    fields: dict[str, object] = {
        "call": row.name,
        "client": row.client,
        "connections": row.load.connections,
        "in_flight": row.load.in_flight,
        "unit": row.unit,
        "engines": {engine: _engine(result, engine, runs) for engine, runs in result.runs.items()},
    }
    if ENGINE in result.runs and BASELINE in result.runs:
        fields["ratio"] = round(result.ratio(ENGINE, BASELINE), 3)
    return fields


def _engine(result: RowResult, engine: str, runs: Sequence[Run]) -> dict[str, object]:
    return {
        "best": round(result.best(engine), 3),
        "median": round(result.median(engine), 3),
        "server_us_per_call": _rounded(result.server_us_per_call(engine)),
        "kernel_share": _rounded(result.kernel_share(engine)),
        "runs": [
            {"rate": round(run.rate, 3), "calls": run.calls, "cpu": run.cpu and run.cpu._asdict()} for run in runs
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
