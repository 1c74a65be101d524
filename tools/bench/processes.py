"""The processes of a benchmark: which core each runs on, how they start and stop, and what time they take."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tools.bench.errors import BenchError
from tools.run_service import TETHER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HOST = "127.0.0.1"
STOP_SECONDS = 20.0
CLIENT_SECONDS = 600.0
"""A client that takes longer than this hangs."""

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cas_command(data_dir: Path, limit_bytes: int, *flags: str) -> list[str]:
    """Return the command of a CAS with a store of its own, on ports that the kernel chooses."""
    return [
        str(Path(sys.executable).parent / "lathe-cas"),
        f"--host={HOST}",
        "--port=0",
        "--http-port=0",
        f"--data-dir={data_dir}",
        f"--max-size-bytes={limit_bytes}",
        *flags,
    ]


@dataclass(frozen=True)
class Cores:
    """Where servers and clients run, so that neither takes the other's time.

    Attributes:
        server: The cores of a server; one, since a service is one process with one event loop.
        client: The cores of its clients.
    """

    server: frozenset[int]
    client: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> Cores:
        """Give the server a core of its own if there are two or more."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(frozenset(usable[:1]), frozenset(usable[1:] or usable))


class CpuTime(NamedTuple):
    """Processor seconds that a process has taken, all threads together."""

    user_seconds: float
    kernel_seconds: float

    @property
    def total_seconds(self) -> float:
        """Both together."""
        return self.user_seconds + self.kernel_seconds

    def since(self, earlier: CpuTime) -> CpuTime:
        """Return what was taken since an earlier look."""
        return CpuTime(self.user_seconds - earlier.user_seconds, self.kernel_seconds - earlier.kernel_seconds)


def cpu_time(stat: str) -> CpuTime:
    """Read the text of ``/proc/PID/stat``.

    Spec: proc(5), fields 14 (utime) and 15 (stime). The second field is the program's name, which may hold blanks and
    brackets, so the fields are counted from its last bracket.
    """
    fields = stat.rpartition(")")[2].split()
    return CpuTime(int(fields[11]) / _TICKS_PER_SECOND, int(fields[12]) / _TICKS_PER_SECOND)


def resident_bytes(status: str) -> int:
    """Read the text of ``/proc/PID/status``.

    Spec: proc(5), field VmRSS, in units of 1,024 bytes.
    """
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) << 10


class ServerProcess:
    """A server that runs.

    Args:
        process: The process, whose output is no longer read.
        port: Where it listens on loopback.
    """

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.address = f"{HOST}:{port}"

    def cpu_time(self) -> CpuTime:
        """Return the processor time that it has taken so far."""
        return cpu_time(Path(f"/proc/{self._process.pid}/stat").read_text())

    def resident_bytes(self) -> int:
        """Return the memory that it has now, mapped files included."""
        return resident_bytes(Path(f"/proc/{self._process.pid}/status").read_text())


@contextlib.contextmanager
def server(command: Sequence[str], cores: frozenset[int], log: Path) -> Iterator[ServerProcess]:
    """Run a server that says in a JSON line, as Lathe's services do, when it is ready and on which ``grpc_port``.

    Args:
        command: Program and flags.
        cores: Where it may run.
        log: File for the rest of what it writes.

    Raises:
        BenchError: It ended before it was ready.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("LATHE_")}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environ,
            process_group=0,
        )
    # A pipe that nobody empties would stop it at some line of its log.
    reader = threading.Thread(target=_pass_on, args=(process, log), daemon=True)
    with process:
        try:
            # Threads that it starts later inherit this.
            os.sched_setaffinity(process.pid, cores)
            port = _ready_port(process, command, log)
            reader.start()
            yield ServerProcess(process, port)
        finally:
            _stop(process)
            if reader.is_alive():
                reader.join()


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ready_port(process: subprocess.Popen[str], command: Sequence[str], log: Path) -> int:
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record.get("event") == "ready":
                return int(record["grpc_port"])
    raise BenchError(f"{' '.join(command)} ended before it was ready:\n{''.join(lines)}{log.read_text()}")


def _pass_on(process: subprocess.Popen[str], log: Path) -> None:
    with log.open("a") as rest:
        rest.writelines(process.stdout or ())


def run_client(command: Sequence[str], cores: frozenset[int], seconds: float = CLIENT_SECONDS) -> str:
    """Run a client to its end and return what it wrote.

    Args:
        command: Program and flags.
        cores: Where it may run.
        seconds: How long that may take.

    Raises:
        BenchError: It failed.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        raise BenchError(f"there is no {command[0]} here; Debian has h2load in nghttp2-client") from None
    with process:
        # It may have ended already.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, cores)
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BenchError(f"{' '.join(command)} does not end") from None
            raise
    if process.returncode:
        raise BenchError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    return output
