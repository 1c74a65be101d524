"""Asks a server for blobs every few milliseconds while something else goes on: how long does it keep others waiting?"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from tools.bench.blobs import make_blobs
from tools.bench.checked_calls import FIND_MISSING, CheckedCalls

from lathe_shared.cas_wire import find_missing_request

if TYPE_CHECKING:
    from pathlib import Path

    from tools.bench.processes import ServerProcess

ASK_SECONDS = 0.01
ASKED_BYTES = 64


class Watch:
    """Asks a server for blobs and looks at its file, in a thread.

    Args:
        process: The server.
        file: The data file of its store.
        salt: What makes the blobs different from all others.
        digests: How many blobs each call is for.

    Attributes:
        finds: When each call ended, and what it took, both in seconds of the monotonic clock.
        file_bytes: The file's largest size.
    """

    def __init__(self, process: ServerProcess, file: Path, salt: str, digests: int) -> None:
        self.finds: list[tuple[float, float]] = []
        self.file_bytes = 0
        self._process = process
        self._cpu: list[tuple[float, float]] = []
        self._calls = CheckedCalls(process.address, "")
        self._file = file
        asked = [blob.digest for blob in make_blobs(f"{salt}-asked", ASKED_BYTES, digests)]
        self._request = find_missing_request("", asked)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()

    def find_seconds(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Return what the calls took that ended between two moments."""
        return [seconds for moment, seconds in self.finds if since <= moment <= until]

    def ask(self, count: int) -> list[float]:
        """Make so many calls and return what they took; the first one, which connects, is not among them."""
        self._ask_once()
        seconds = []
        for _ in range(count):
            time.sleep(ASK_SECONDS)
            seconds.append(self._ask_once())
        return seconds

    def _ask_once(self) -> float:
        began = time.monotonic()
        self._calls.unary(FIND_MISSING, self._request)
        return time.monotonic() - began

    def cpu_seconds_at(self, moment: float) -> float:
        """Return the processor time that the server had taken by then, as far as was seen."""
        return max((cpu for seen_at, cpu in self._cpu if seen_at <= moment), default=0.0)

    def _run(self) -> None:
        with self._calls:
            while not self._is_over.wait(ASK_SECONDS):
                seconds = self._ask_once()
                self.finds.append((time.monotonic(), seconds))
                self._cpu.append((time.monotonic(), self._process.cpu_time().total_seconds))
                self.file_bytes = max(self.file_bytes, self._file.stat().st_size)
