"""Several processes that serve as one: started together, kept running, stopped together.

The first process of the service becomes the keeper of the others and serves nothing itself. It binds every port once
for each of them (``SO_REUSEPORT``: the kernel shares connections out) and holds the sockets as long as it lives, so a
process that dies is followed by one on the same socket, and who connects meanwhile waits there and is not refused.
Processes are forked before anything is opened or any thread is started: LMDB and event loops want that.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from lathe_shared.group_member import GroupMember, report_socket
from lathe_shared.lifecycle import BACKLOG, BuildFunction, StartError, run_service
from lathe_shared.log_config import configure_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lathe_shared.config_loading import ServiceSettings

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 10.0
FORGIVEN_AFTER_SECONDS = 60.0
"""A process that ends is started again at once, then after doubling pauses; a life of this length clears its record."""

_LONGEST_FOLDER_BYTES = 80
"""The address of a Unix socket has 107 bytes; the rest is for the socket's name."""

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)

_log = structlog.get_logger("lathe.group")


@dataclass(slots=True)
class _Slot:
    """A place in the group, and the process that has it."""

    number: int
    sockets: dict[str, socket.socket]
    reports: socket.socket
    pid: int = 0
    ready_pipe: int = -1
    is_ready: bool = False
    started_at: float = 0.0
    failures: int = 0
    start_at: float | None = None


def run_processes(
    settings: ServiceSettings, count: int, ports: Mapping[str, int], prepare: Callable[[], BuildFunction]
) -> int:
    """Run a service as several processes until SIGTERM or SIGINT; what its ``main`` returns to the operating system.

    Args:
        settings: The service's settings.
        count: How many processes.
        ports: The service's ports by the names that its runtime knows them by; 0 lets the kernel choose.
        prepare: Called once before any process is started, in the process that will never serve: checks what all of
            them need and returns the composition root of each. It leaves nothing open and no thread running.

    Returns:
        The exit code: 0 after an orderly stop of all, 1 if they could not start or one of them did not stop well.
    """
    configure_logging(settings.service, settings.log_level)
    try:
        with _folder_for_sockets(f"lathe-{settings.service}-") as directory:
            group = _Group(settings, prepare(), directory)
            group.bind(count, ports)
            return group.run()
    except StartError as error:
        sys.stderr.write(f"{settings.program()}: {error}\n")
        return 1


@contextlib.contextmanager
def _folder_for_sockets(prefix: str) -> Iterator[Path]:
    """Make a folder that only this user can enter, and remove it in the end.

    Yields:
        A path to it for this process and those that it forks, short enough for the address of a socket.

    Raises:
        StartError: It cannot be made.
    """
    try:
        made = tempfile.mkdtemp(prefix=prefix)
    except OSError as error:
        raise StartError(f"cannot make a temporary folder: {error.strerror}") from None
    try:
        if len(os.fsencode(made)) <= _LONGEST_FOLDER_BYTES:
            yield Path(made)
            return
        descriptor = os.open(made, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(made, ignore_errors=True)


class _Group:
    def __init__(self, settings: ServiceSettings, build: BuildFunction, directory: Path) -> None:
        self._settings = settings
        self._build = build
        self._directory = directory
        self._slots: list[_Slot] = []
        self._ports: dict[str, int] = {}
        self._is_stopping = False
        self._is_well = True
        self._was_ready = False
        self._wake, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def bind(self, count: int, ports: Mapping[str, int]) -> None:
        """Bind every port for every process.

        Raises:
            StartError: A port cannot be bound, or a socket for reports not be made.
        """
        host = self._settings.host
        bound = {name: _bind_shared(name, host, port, count) for name, port in ports.items()}
        self._ports = {name: sockets[0].getsockname()[1] for name, sockets in bound.items()}
        for number in range(count):
            reports = socket.socket(socket.AF_UNIX)
            try:
                reports.bind(report_socket(self._directory, number))
                reports.listen()
            except OSError as error:
                raise StartError(f"cannot make a socket in a temporary folder: {error.strerror or error}") from None
            self._slots.append(_Slot(number, {name: sockets[number] for name, sockets in bound.items()}, reports))

    def run(self) -> int:
        """Start all processes and keep them running until told to stop."""
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        # What the processes have in common stays as it is in memory that they share.
        gc.collect()
        gc.freeze()
        for slot in self._slots:
            if not self._is_stopping:
                self._start(slot)
        while not self._is_over():
            self._wait()
            self._start_what_is_due()
        return 0 if self._is_well else 1

    def _is_over(self) -> bool:
        return self._is_stopping and not any(slot.pid for slot in self._slots)

    def _wait(self) -> None:
        """Wait until something happens, and take note of it."""
        due = [slot.start_at for slot in self._slots if slot.start_at is not None]
        pause = max(0.0, min(due) - time.monotonic()) if due else None
        pipes = [slot.ready_pipe for slot in self._slots if slot.ready_pipe >= 0]
        readable, _, _ = select.select([self._wake, *pipes], [], [], pause)
        for slot in self._slots:
            if slot.ready_pipe in readable:
                self._note_ready(slot)
        if self._wake in readable:
            for number in os.read(self._wake, 4096):
                if number != signal.SIGCHLD:
                    self._stop(signal.Signals(number))
        self._bury()

    # Starting

    def _start_what_is_due(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.start_at is not None and slot.start_at <= now:
                self._start(slot)

    def _start(self, slot: _Slot) -> None:
        slot.start_at = None
        slot.started_at = time.monotonic()
        slot.is_ready = False
        sys.stdout.flush()
        keeper = os.getpid()
        try:
            slot.ready_pipe, ready, pid = _fork_with_pipe()
        except OSError as error:
            # No process, memory or descriptor is left just now. Those that run go on.
            _log.error("process_not_started", process=slot.number, error=str(error))
            self._start_again_later(slot)
            return
        if pid:
            os.close(ready)
            slot.pid = pid
            return
        code = 70
        try:
            code = self._serve(slot, ready, keeper)
        except BaseException:  # noqa: BLE001 -- whatever it is, this process ends here
            traceback.print_exc()
        finally:
            # Never back into what the keeper was doing.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _serve(self, slot: _Slot, ready: int, keeper: int) -> int:
        """Be one of the processes."""
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # A terminal's Ctrl-C goes to all of them; the keeper tells when to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Should the keeper be killed, nobody else would.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != keeper:
            return 1
        os.close(self._wake)
        os.close(self._wakes)
        for other in self._slots:
            if other.ready_pipe >= 0:
                os.close(other.ready_pipe)
            if other is not slot:
                other.reports.close()
                for each in other.sockets.values():
                    each.close()

        def on_ready() -> None:
            with contextlib.suppress(BrokenPipeError):
                os.write(ready, b"\0")
            os.close(ready)

        member = GroupMember(slot.number, len(self._slots), slot.sockets, slot.reports, self._directory, on_ready)
        return run_service(self._settings, self._build, member)

    def _note_ready(self, slot: _Slot) -> None:
        slot.is_ready = bool(os.read(slot.ready_pipe, 1))
        os.close(slot.ready_pipe)
        slot.ready_pipe = -1
        if not self._was_ready and all(each.is_ready for each in self._slots):
            self._was_ready = True
            ports = {f"{name}_port": port for name, port in self._ports.items()}
            _log.info("ready", host=self._settings.host, processes=len(self._slots), **ports)

    # Stopping

    def _stop(self, number: signal.Signals) -> None:
        if self._is_stopping:
            _log.warning("killed", signal=number.name)
            self._signal_all(signal.SIGKILL)
            self._is_well = False
            return
        _log.info("stopping", signal=number.name)
        self._begin_stop()

    def _begin_stop(self) -> None:
        self._is_stopping = True
        for slot in self._slots:
            slot.start_at = None
            # Nobody who connects from now on is to wait for an answer.
            for each in slot.sockets.values():
                each.close()
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for slot in self._slots:
            if slot.pid:
                os.kill(slot.pid, number)

    def _bury(self) -> None:
        """Take note of every process that has ended."""
        for slot in self._slots:
            if not slot.pid:
                continue
            pid, status = os.waitpid(slot.pid, os.WNOHANG)
            if pid:
                self._note_end(slot, os.waitstatus_to_exitcode(status))

    def _note_end(self, slot: _Slot, code: int) -> None:
        pid, slot.pid = slot.pid, 0
        if slot.ready_pipe >= 0:
            self._note_ready(slot)
        if self._is_stopping:
            self._is_well &= code == 0
            return
        _log.error("process_ended", process=slot.number, pid=pid, code=code)
        self._start_again_later(slot)

    def _start_again_later(self, slot: _Slot) -> None:
        if not self._was_ready:
            # It has said why. What keeps one from starting keeps them all.
            self._is_well = False
            self._begin_stop()
            return
        lived_seconds = time.monotonic() - slot.started_at
        slot.failures = 1 if lived_seconds > FORGIVEN_AFTER_SECONDS else slot.failures + 1
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (slot.failures - 1), LONGEST_PAUSE_SECONDS)
        slot.start_at = time.monotonic() + (0.0 if slot.failures == 1 else pause)


def _fork_with_pipe() -> tuple[int, int, int]:
    """Fork, with a pipe from the new process; both its ends, to read and to write, and what ``os.fork`` returns."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        return read, write, os.fork()
    except OSError:
        os.close(read)
        os.close(write)
        raise


def _bind_shared(name: str, host: str, port: int, count: int) -> list[socket.socket]:
    """Bind one port several times.

    Raises:
        StartError: It cannot be bound, or somebody else has it: with SO_REUSEPORT alone another service of the same
            user would get a share of our clients, and we of its.
    """
    sockets: list[socket.socket] = []
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
        for _ in range(count):
            each = socket.socket(family, kind, protocol)
            sockets.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(address)
            address = each.getsockname()
        for each in sockets:
            each.listen(BACKLOG)
            each.setblocking(False)
    except OSError as error:
        for each in sockets:
            each.close()
        reason = (os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)).lower()
        raise StartError(f"cannot listen on {host}:{port} ({name}): {reason}") from None
    return sockets
