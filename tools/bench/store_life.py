"""Trials of a store's life, each with a server of its own: what years do to it, and how it starts when it is full.

Spec: design of the project, section 6, on ageing and start-up time.
"""

from __future__ import annotations

import itertools
import json
import secrets
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.ageing_client import LARGEST_BYTES
from tools.bench.blobs import make_blobs
from tools.bench.checked_calls import FIND_MISSING, CheckedCalls
from tools.bench.processes import run_client, server
from tools.bench.trials import Outcome, lease_free_cas, milliseconds
from tools.bench.watch import Watch
from typing_extensions import override

from lathe_shared.cas_wire import find_missing_request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tools.bench.processes import Cores

LIMIT_BYTES, QUICK_LIMIT_BYTES = 512 << 20, 48 << 20
QUICK_LARGEST_BYTES = 4 << 20
ROUNDS = 11
"""One fills the store, ten go through it."""

CLIENT_SECONDS = 3600.0
ASKED_DIGESTS = 100
IDLE_CALLS = 300

STORED_BLOBS, QUICK_STORED_BLOBS = 1_000_000, 20_000
STORED_BYTES = 64
BLOBS_PER_BATCH = 1000
FILL_PARTS = 10
ROOMY_BYTES = 4 << 30


@dataclass
class AgeingOutcome(Outcome):
    """A store that was filled, and had ten times its limit written through it.

    Attributes:
        limit_bytes: What it may keep.
        round_seconds: How long each round took, a round being so many bytes; the first one fills it.
        round_cpu_seconds: Processor time of the server in each. Others on the machine take little of that away.
        file_bytes: Largest size of its file.
        find_seconds: What FindMissingBlobs took beside that, every call.
        idle_find_seconds: What it took before, when nothing else was asked of the server: what the machine itself adds.
    """

    limit_bytes: int
    round_seconds: list[float]
    round_cpu_seconds: list[float]
    file_bytes: int
    find_seconds: list[float]
    idle_find_seconds: list[float]
    name = "ageing"

    @property
    def last_to_first(self) -> float:
        """Throughput of the last round in parts of that of the first one through a full store."""
        return self.round_seconds[1] / self.round_seconds[-1]

    @property
    def last_to_first_cpu(self) -> float:
        """Work of the server in the last round in parts of that in the first one through a full store."""
        return self.round_cpu_seconds[-1] / self.round_cpu_seconds[1]

    @property
    def file_to_limit(self) -> float:
        """The file's size in parts of the limit."""
        return self.file_bytes / self.limit_bytes

    @override
    def figures(self) -> dict[str, object]:
        return {
            "limit_bytes": self.limit_bytes,
            "round_mb_per_second": [round(self.limit_bytes / seconds / 1e6, 1) for seconds in self.round_seconds],
            "round_cpu_seconds": [round(seconds, 2) for seconds in self.round_cpu_seconds],
            "last_to_first": round(self.last_to_first, 3),
            "last_to_first_cpu": round(self.last_to_first_cpu, 3),
            "file_to_limit": round(self.file_to_limit, 3),
            "find_missing_calls": len(self.find_seconds),
            "find_missing_ms": milliseconds(self.find_seconds),
            "idle_find_missing_ms": milliseconds(self.idle_find_seconds),
        }

    @override
    def text(self) -> str:
        rates = " ".join(f"{self.limit_bytes / seconds / 1e6:.0f}" for seconds in self.round_seconds)
        beside, idle = milliseconds(self.find_seconds), milliseconds(self.idle_find_seconds)
        return (
            f"ageing, limit {self.limit_bytes / 1e6:.0f} MB: {rates} MB/s a round; last to first full one "
            f"{self.last_to_first:.2f}, processor time {self.last_to_first_cpu:.2f}; file "
            f"{self.file_to_limit:.3f} of the limit; FindMissingBlobs of "
            f"{ASKED_DIGESTS} digests p50 {beside['0.5']:.1f} ms, p99 {beside['0.99']:.1f} ms, of an idle server "
            f"{idle['0.5']:.1f} and {idle['0.99']:.1f} ms"
        )


def age(folder: Path, cores: Cores, *, quick: bool) -> AgeingOutcome:
    """Write ten times its limit through a store without leases, and ask it about blobs meanwhile."""
    limit_bytes = QUICK_LIMIT_BYTES if quick else LIMIT_BYTES
    largest_bytes = QUICK_LARGEST_BYTES if quick else LARGEST_BYTES
    salt = secrets.token_hex(8)
    command = lease_free_cas(folder / "store", limit_bytes)
    with server(command, cores.server, folder / "cas.log") as process:
        watch = Watch(process, folder / "store" / "data.mdb", salt, ASKED_DIGESTS)
        flags = [f"--address={process.address}", f"--salt={salt}", f"--limit-bytes={limit_bytes}"]
        flags += [f"--largest-bytes={largest_bytes}", f"--rounds={ROUNDS}"]
        client = [sys.executable, "-m", "tools.bench.ageing_client", *flags]
        idle_find_seconds = watch.ask(IDLE_CALLS)
        with watch:
            output = run_client(client, cores.client, CLIENT_SECONDS)
    times: list[float] = json.loads(output)
    cpu = [watch.cpu_seconds_at(moment) for moment in times]
    return AgeingOutcome(
        limit_bytes, _differences(times), _differences(cpu), watch.file_bytes, watch.find_seconds(), idle_find_seconds
    )


def _differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


@dataclass
class Start:
    """A server that was started.

    Attributes:
        seconds: Until it said that it is ready, the interpreter's own start included.
        resident_bytes: Its memory then.
        resident_bytes_after_call: Its memory after a first FindMissingBlobs.
    """

    seconds: float
    resident_bytes: int
    resident_bytes_after_call: int


@dataclass
class StartOutcome(Outcome):
    """How a store starts with nothing and with many blobs.

    Attributes:
        blobs: How many.
        empty: A start with none.
        full: A start with all of them.
    """

    blobs: int
    empty: Start
    full: Start
    name = "start"

    @override
    def figures(self) -> dict[str, object]:
        return asdict(self)

    @override
    def text(self) -> str:
        more_bytes = self.full.resident_bytes_after_call - self.empty.resident_bytes_after_call
        full_mb, empty_mb = self.full.resident_bytes / 1e6, self.empty.resident_bytes / 1e6
        return (
            f"start, {self.blobs:,} blobs: ready in {self.full.seconds:.2f} s, with none {self.empty.seconds:.2f} s; "
            f"{full_mb:.0f} MB resident, with none {empty_mb:.0f} MB; {more_bytes / 1e6:+.1f} MB after a first call"
        )


def start(folder: Path, cores: Cores, *, quick: bool) -> StartOutcome:
    """Start an empty store, fill it with small blobs, and start it again."""
    blobs = QUICK_STORED_BLOBS if quick else STORED_BLOBS
    command = lease_free_cas(folder / "store", ROOMY_BYTES)
    empty = _timed_start(command, cores, folder / "empty.log", lambda _: None)
    _timed_start(command, cores, folder / "fill.log", lambda address: _fill(address, cores, blobs))
    return StartOutcome(blobs, empty, _timed_start(command, cores, folder / "full.log", lambda _: None))


def _fill(address: str, cores: Cores, blobs: int) -> None:
    calls = blobs // BLOBS_PER_BATCH // FILL_PARTS
    for part in range(FILL_PARTS):
        flags = [f"--address={address}", f"--salt=start-{part}", f"--blob-bytes={STORED_BYTES}", f"--calls={calls}"]
        flags += [f"--batch={BLOBS_PER_BATCH}", "--connections=2", "--streams=2"]
        run_client([sys.executable, "-m", "tools.bench.lean_client", *flags], cores.client)


def _timed_start(command: list[str], cores: Cores, log: Path, use: Callable[[str], None]) -> Start:
    began = time.perf_counter()
    with server(command, cores.server, log) as process:
        seconds = time.perf_counter() - began
        resident_bytes = process.resident_bytes()
        with CheckedCalls(process.address, "") as calls:
            digests = [blob.digest for blob in make_blobs("start-0", STORED_BYTES, ASKED_DIGESTS)]
            calls.unary(FIND_MISSING, find_missing_request("", digests))
        result = Start(seconds, resident_bytes, process.resident_bytes())
        use(process.address)
    return result
