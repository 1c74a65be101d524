"""A trial: large blobs are read and written by many clients, and small requests beside them must not wait for it.

Spec: design of the project, section 6, on latency.
"""

from __future__ import annotations

import secrets
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.blobs import make_blobs
from tools.bench.checked_calls import READ, CheckedCalls
from tools.bench.errors import BenchError
from tools.bench.h2load import run_h2load
from tools.bench.message_file import write_framed
from tools.bench.processes import run_client, server
from tools.bench.timing import Timing
from tools.bench.trials import Outcome, lease_free_cas, milliseconds
from tools.bench.watch import Watch
from typing_extensions import override

from lathe_shared.cas_wire import read_request

if TYPE_CHECKING:
    from tools.bench.processes import Cores

STREAMS = 8
BLOB_BYTES, QUICK_BLOB_BYTES = 256 << 20, 8 << 20
WRITES = 16
LIMIT_BYTES = 16 << 30
IDLE_CALLS = 500

POLITE = ("nice", "-n10")
"""Clients share a core with who measures. They let it go first, or their own work would be taken for the server's."""


@dataclass
class LargeTrafficOutcome(Outcome):
    """What small requests took beside large ones.

    Attributes:
        blob_bytes: Size of the large blobs.
        write_mb_per_second: Written by STREAMS streams at the same time.
        read_mb_per_second: Read by as many others.
        find_seconds: What FindMissingBlobs for one digest took beside that, every call.
        idle_find_seconds: What it took before.
    """

    blob_bytes: int
    write_mb_per_second: float
    read_mb_per_second: float
    find_seconds: list[float]
    idle_find_seconds: list[float]
    name = "large traffic"

    @override
    def figures(self) -> dict[str, object]:
        return {
            "blob_bytes": self.blob_bytes,
            "write_mb_per_second": round(self.write_mb_per_second, 1),
            "read_mb_per_second": round(self.read_mb_per_second, 1),
            "find_missing_calls": len(self.find_seconds),
            "find_missing_ms": milliseconds(self.find_seconds),
            "idle_find_missing_ms": milliseconds(self.idle_find_seconds),
        }

    @override
    def text(self) -> str:
        beside, idle = milliseconds(self.find_seconds), milliseconds(self.idle_find_seconds)
        return (
            f"large traffic, {STREAMS} streams each of {self.blob_bytes / 1e6:.0f} MB: written "
            f"{self.write_mb_per_second:.0f} MB/s, read {self.read_mb_per_second:.0f} MB/s; FindMissingBlobs of 1 "
            f"digest p50 {beside['0.5']:.1f} ms, p99 {beside['0.99']:.1f} ms, longest {beside['1.0']:.1f} ms, of an "
            f"idle server {idle['0.5']:.1f}, {idle['0.99']:.1f} and {idle['1.0']:.1f} ms"
        )


def large_traffic(folder: Path, cores: Cores, *, quick: bool) -> LargeTrafficOutcome:
    """Write and read large blobs at the same time, and ask about a small one meanwhile."""
    blob_bytes = QUICK_BLOB_BYTES if quick else BLOB_BYTES
    salt = secrets.token_hex(8)
    with server(lease_free_cas(folder / "store", LIMIT_BYTES), cores.server, folder / "cas.log") as process:
        watch = Watch(process, folder / "store" / "data.mdb", salt, 1)
        idle_find_seconds = watch.ask(IDLE_CALLS)
        with watch, _Readers(process.address, f"{salt}-read", blob_bytes, cores, folder) as readers:
            flags = [f"--address={process.address}", f"--salt={salt}", f"--blob-bytes={blob_bytes}"]
            flags += [f"--calls={WRITES}", f"--streams={STREAMS}"]
            command = [*POLITE, sys.executable, "-m", "tools.bench.lean_client", *flags]
            timing = Timing.from_json(run_client(command, cores.client))
            end = time.monotonic()
            begin = end - timing.seconds
    return LargeTrafficOutcome(
        blob_bytes,
        timing.calls_per_second * blob_bytes / 1e6,
        readers.calls_per_second * blob_bytes / 1e6,
        watch.find_seconds(begin, end),
        idle_find_seconds,
    )


class _Readers:
    """STREAMS streams that read one large blob again and again, until they are told to stop.

    Attributes:
        calls_per_second: How fast.
    """

    def __init__(self, address: str, salt: str, blob_bytes: int, cores: Cores, folder: Path) -> None:
        self.calls_per_second = 0.0
        self._address = address
        self._cores = cores
        (blob,) = make_blobs(salt, blob_bytes, 1)
        self._digest = blob.digest
        with CheckedCalls(address, "") as calls:
            calls.store([blob])
        self._body = write_framed(folder, read_request(f"blobs/{blob.digest}"))
        self._is_over = threading.Event()
        self._errors: list[BenchError] = []
        self._thread = threading.Thread(target=self._run, name="bench-readers", daemon=True)

    def __enter__(self) -> _Readers:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        timings: list[Timing] = []
        try:
            while not self._is_over.is_set():
                timings.append(
                    run_h2load(
                        self._address,
                        READ,
                        self._body,
                        calls=STREAMS,
                        connections=2,
                        streams=STREAMS // 2,
                        response_bytes=self._digest.size_bytes,
                        cores=self._cores.client,
                        prefix=POLITE,
                    )
                )
        except BenchError as error:
            self._errors.append(error)
        # The last one went on when the writers had stopped.
        whole = timings[:-1] or timings
        self.calls_per_second = sum(timing.calls for timing in whole) / sum(timing.seconds for timing in whole)
