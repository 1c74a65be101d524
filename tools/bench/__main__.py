"""The ``make bench`` command."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.errors import BenchError
from tools.bench.large_traffic import large_traffic
from tools.bench.machine import machine_facts
from tools.bench.measuring import Measured, measure_row
from tools.bench.processes import Cores, cas_command, server
from tools.bench.report import as_json, table
from tools.bench.rows import LARGE_BYTES, Target, all_rows
from tools.bench.store_life import age, start

from lathe_shared.grpc_transport import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tools.bench.measuring import RowResult
    from tools.bench.rows import Row
    from tools.bench.trials import Outcome, Trial

TRIALS: dict[str, Trial] = {"ageing": age, "start": start, "large traffic": large_traffic}
"""By the name that ``--rows`` is compared with."""

RESULTS = Path("bench-results")
SECONDS, TURNS = 2.0, 3
QUICK_SECONDS, QUICK_TURNS = 0.3, 1
STORE_BYTES = 40 << 30
"""Limit of the measured store: more than all rows write, since what is measured is not eviction."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="Measure what the services serve.")
    parser.add_argument("--target", help="host:port of a REAPI server to measure, in place of our own")
    parser.add_argument("--instance-name", default="main", help="instance name in requests (default: %(default)s)")
    parser.add_argument("--engine", choices=[engine.value for engine in Engine], help="only this engine of ours")
    parser.add_argument("--rows", default="", help="regular expression: only rows whose names it is found in")
    parser.add_argument("--quick", action="store_true", help="one short run each: to see that it works")
    parser.add_argument("--seconds", type=float, help=f"of one run (default: {SECONDS}; quick: {QUICK_SECONDS})")
    parser.add_argument("--turns", type=int, help=f"runs of each row (default: {TURNS}; quick: {QUICK_TURNS})")
    parser.add_argument("--large-bytes", type=int, default=LARGE_BYTES, help="size of a large blob (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON."""
    options = parse_arguments(arguments)
    rows = [row for row in all_rows() if re.search(options.rows, row.name)]
    trials = [trial for name, trial in TRIALS.items() if options.rows and re.search(options.rows, name)]
    if options.target and trials:
        print("bench: the trials need servers of their own; they are left out", file=sys.stderr)
        trials = []
    seconds = options.seconds if options.seconds is not None else QUICK_SECONDS if options.quick else SECONDS
    turns = options.turns or (QUICK_TURNS if options.quick else TURNS)
    machine = machine_facts()
    began = datetime.datetime.now(datetime.UTC)
    results: list[RowResult] = []
    try:
        for name in dict.fromkeys(row.server for row in rows):
            if options.target and name != "cas":
                continue
            with servers_for(name, options) as measured:
                for row in rows:
                    if row.server == name:
                        _tell(row)
                        results.append(measure_row(row, measured, seconds=seconds, turns=turns))
        outcomes = [_run_trial(trial, options) for trial in trials]
    except BenchError as error:
        print(f"\nbench: {error}", file=sys.stderr)
        return 1
    engines = list(dict.fromkeys(engine for result in results for engine in result.runs))
    if results:
        print("\r" + " " * 79 + "\r" + table(results, engines))
    for outcome in outcomes:
        print(outcome.text())
    settings: dict[str, object] = {
        "began": began.isoformat(timespec="seconds"),
        "seconds": seconds,
        "turns": turns,
        "large_bytes": options.large_bytes,
        "target": options.target,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"bench-{began:%Y%m%d-%H%M%S}.json"
    trial_figures = {"trials": {outcome.name: outcome.figures() for outcome in outcomes}} if outcomes else {}
    path.write_text(json.dumps(as_json(results, machine, settings) | trial_figures, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return 0


def _run_trial(trial: Trial, options: argparse.Namespace) -> Outcome:
    cores = Cores.of_this_machine()
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
        return trial(Path(folder), cores, quick=options.quick)


def _tell(row: Row) -> None:
    """Say what is being measured, where somebody watches."""
    if sys.stdout.isatty():
        print(f"\r{row.name}, {row.load.in_flight} in flight, {row.client} …".ljust(79), end="", flush=True)


@contextlib.contextmanager
def servers_for(name: str, options: argparse.Namespace) -> Iterator[list[Measured]]:
    """Run a server of each engine, with data of its own; or only name the one that was given by address.

    Args:
        name: ``echo`` or ``cas``.
        options: The command line.
    """
    cores = Cores.of_this_machine()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lathe-bench-")))

        def target(address: str) -> Target:
            salt = secrets.token_hex(8)
            return Target(address, options.instance_name, folder, cores.client, salt, options.large_bytes)

        if options.target:
            yield [Measured("target", target(options.target), None)]
            return
        measured = []
        for engine in [options.engine] if options.engine else [engine.value for engine in Engine]:
            command = _command(name, engine, folder)
            process = stack.enter_context(server(command, cores.server, folder / f"{name}-{engine}.log"))
            measured.append(Measured(engine, target(process.address), process))
        yield measured


def _command(name: str, engine: str, folder: Path) -> list[str]:
    if name == "echo":
        return [sys.executable, "-m", "tools.bench.echo_server", engine]
    return cas_command(folder / engine, STORE_BYTES, f"--grpc-engine={engine}")


if __name__ == "__main__":
    # As with Ctrl-C: the servers end, and their data goes.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
