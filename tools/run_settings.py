"""What ``make run`` is told by its variables, and the processes that follow from it."""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HOST = "127.0.0.1"

# Variable to default; the names are a contract with whoever runs `make run`.
VARIABLES = {
    "LATHE_DATA_DIR": "~/.cache/lathe",
    "LATHE_CAS_PORT": "50051",
    "LATHE_CAS_TLS_PORT": "50071",  # nothing listens there: a run on loopback has no certificate to show
    "LATHE_SCHEDULER_PORT": "50052",
    "LATHE_WORKER_API_PORT": "50061",
    "LATHE_CAS_HTTP_PORT": "50081",
    "LATHE_SCHEDULER_HTTP_PORT": "50082",
    "LATHE_WORKER_HTTP_PORT": "50083",
    "LATHE_WORKERS": "1",
}

# A stop is promised within 10 s: the services get less than that for what still runs. They stop in three groups, one
# after the other (workers, scheduler, CAS), so this counts three times.
DRAIN_SECONDS = 1


class StartError(Exception):
    """Say to the user why nothing was, or could be, started."""


@dataclass(frozen=True)
class Settings:
    """What the variables ask for.

    Attributes:
        data_dir: Absolute; one folder for each service below it.
        ports: Port of each variable that ends in ``_PORT``.
        workers: How many workers; worker n has its HTTP port n above the first one's.
    """

    data_dir: Path
    ports: dict[str, int]
    workers: int

    def worker_http_port(self, index: int) -> int:
        """Give the HTTP port of a worker, counted from 0."""
        return self.ports["LATHE_WORKER_HTTP_PORT"] + index


@dataclass(frozen=True)
class Service:
    """One process to keep running.

    Attributes:
        name: Prefix of its output.
        command: Program and flags.
        http_port: Where its /healthz is.
    """

    name: str
    command: list[str]
    http_port: int


def read_settings(environ: dict[str, str]) -> Settings:
    """Read and check the variables.

    Raises:
        StartError: A value is not what the variable accepts, or two ports are the same.
    """
    values = {name: environ.get(name) or default for name, default in VARIABLES.items()}
    ports = {name: _number(name, values[name], 1, 65535) for name in VARIABLES if name.endswith("_PORT")}
    workers = _number("LATHE_WORKERS", values["LATHE_WORKERS"], 0, 1000)
    data_dir = Path(values["LATHE_DATA_DIR"]).expanduser().absolute()
    settings = Settings(data_dir, ports, workers)
    taken: dict[int, str] = {}
    for name, port in listening_ports(settings):
        if port > 65535:
            raise StartError(f"{name} {port} is beyond 65535; LATHE_WORKER_HTTP_PORT must leave room for all workers")
        if port in taken:
            raise StartError(f"{name} and {taken[port]} are both port {port}; each needs a port of its own")
        taken[port] = name
    return settings


def _number(name: str, text: str, low: int, high: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not low <= number <= high:
        raise StartError(f"{name} is {text!r}; it must be a whole number from {low} to {high}")
    return number


def listening_ports(settings: Settings) -> list[tuple[str, int]]:
    """List what the services will listen on, with the variable that says so."""
    other = ("LATHE_CAS_TLS_PORT", "LATHE_WORKER_HTTP_PORT")
    single = [(name, port) for name, port in settings.ports.items() if name not in other]
    workers = [("LATHE_WORKER_HTTP_PORT", settings.worker_http_port(index)) for index in range(settings.workers)]
    return single + workers


def check_ports(settings: Settings) -> None:
    """Find out before anything starts whether all ports are free.

    Raises:
        StartError: One is not; names it, and the variable that moves it.
    """
    for name, port in listening_ports(settings):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise StartError(
                    f"port {port} on {HOST} cannot be used ({error.strerror}).\n"
                    f"Stop what uses it, or choose another port with {name}=PORT make run"
                ) from None


def lock_data_dir(data_dir: Path) -> IO[str]:
    """Make sure that no other `make run` uses the directory; the lock lasts as long as the returned file is open.

    Raises:
        StartError: Another one does, or the directory cannot be made.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "run.lock").open("a+")
    except OSError as error:
        raise StartError(f"LATHE_DATA_DIR {data_dir} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise StartError(
            f"{data_dir} is in use by another `make run` (process {holder}).\n"
            "Stop that one, or give this one a directory and ports of its own: LATHE_DATA_DIR=DIR LATHE_CAS_PORT=PORT …"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def services(settings: Settings, programs: Path) -> list[Service]:
    """Describe the processes, in the order in which they depend on each other.

    Args:
        settings: From the variables.
        programs: Directory of the console scripts.
    """
    ports = settings.ports
    cas = f"--cas-endpoint={HOST}:{ports['LATHE_CAS_PORT']}"
    common = [f"--host={HOST}", f"--drain-seconds={DRAIN_SECONDS}"]

    def service(name: str, program: str, http_port: int, *flags: str) -> Service:
        return Service(name, [str(programs / program), *common, f"--http-port={http_port}", *flags], http_port)

    result = [
        service(
            "cas",
            "lathe-cas",
            ports["LATHE_CAS_HTTP_PORT"],
            f"--port={ports['LATHE_CAS_PORT']}",
            f"--data-dir={settings.data_dir / 'cas'}",
        ),
        service(
            "scheduler",
            "lathe-scheduler",
            ports["LATHE_SCHEDULER_HTTP_PORT"],
            f"--port={ports['LATHE_SCHEDULER_PORT']}",
            f"--worker-api-port={ports['LATHE_WORKER_API_PORT']}",
            cas,
        ),
    ]
    for index in range(settings.workers):
        name = f"worker-{index + 1}"
        result.append(
            service(
                name,
                "lathe-worker",
                settings.worker_http_port(index),
                f"--scheduler-endpoint={HOST}:{ports['LATHE_WORKER_API_PORT']}",
                cas,
                f"--data-dir={settings.data_dir / name}",
            )
        )
    return result
