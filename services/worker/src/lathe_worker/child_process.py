"""Child processes: started by vfork, awaited by pidfd, reaped with what they used.

Spawn only from the main thread: the kernel sends a child's parent-death signal when the *thread* that made it ends. One
spawning thread also keeps executables from being busy: ``Popen`` returns only when the child has left the worker's
address space, so by the time an action starts, no other child holds a write descriptor of one of its inputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from typing import TYPE_CHECKING, TypeVar

from lathe_worker.sandbox import SIGNAL_EXIT_CODE_BASE, ResourceUsage

if TYPE_CHECKING:
    import resource
    from collections.abc import Coroutine, Mapping, Sequence
    from pathlib import Path
    from types import FrameType
    from typing import Any

T = TypeVar("T")

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PASSED_ON_IF_IGNORED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
"""Signals that a shell or a supervisor may have us ignore. Those that Python itself ignores, Popen sets back."""
_KIBIBYTE = 1024  # Linux counts ru_maxrss in these


def become_subreaper() -> bool:
    """Adopt orphaned descendants, so that the first process of a sandbox can be waited for after bubblewrap has gone.

    Returns:
        Whether the kernel agreed; the resource usage of actions is unknown otherwise.

    Spec: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def exit_code(status: int) -> int:
    """Turn a wait status into an exit code, 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else SIGNAL_EXIT_CODE_BASE - code


class ChildProcess:
    """A process that is watched through a pidfd, which cannot come to mean another one.

    Args:
        pid: A child, or a descendant that becomes one when its parent ends.

    Raises:
        ProcessLookupError: There is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._dead = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_readable)

    @property
    def dead(self) -> asyncio.Future[None]:
        """Done when the process and, for the first one of a pid namespace, that whole namespace is dead."""
        return self._dead

    def kill(self) -> None:
        """Send SIGKILL; nothing happens if the process is dead."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def reap(self) -> tuple[int, ResourceUsage] | None:
        """Return wait status and usage of the dead process; None if its parent was quicker."""
        try:
            _, status, usage = os.wait4(self.pid, os.WNOHANG)
        except ChildProcessError:
            return None
        return status, _usage(usage)

    def close(self) -> None:
        """Stop watching."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_readable(self) -> None:
        self.close()
        if not self._dead.done():
            self._dead.set_result(None)


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdout_fd: int,
    stderr_fd: int,
    keep_fds: Sequence[int] = (),
    directory: Path | None = None,
    program: str | None = None,
) -> ChildProcess:
    """Start a command in a session of its own, with an empty standard input and no other descriptor than those named.

    The session keeps a Ctrl-C in the worker's terminal away from actions.

    Args:
        argv: The command.
        environment: All of its variables.
        stdout_fd: Its standard output.
        stderr_fd: Its standard error.
        keep_fds: Further descriptors that it inherits, under their numbers.
        directory: Its working directory; the worker's own if None.
        program: The file to run, if that is not ``argv[0]``.

    Raises:
        OSError: It cannot be started.
    """
    _handle_ignored_signals()
    process = subprocess.Popen(
        argv,
        executable=program,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout_fd,
        stderr=stderr_fd,
        pass_fds=keep_fds,
        cwd=directory,
        start_new_session=True,
    )
    # This module waits for the process by itself; a Popen object that believes it runs would warn about it.
    process.returncode = 0
    return ChildProcess(process.pid)


def _handle_ignored_signals() -> None:
    """Have the signals that this process ignores, as under nohup, handled by doing nothing.

    To the process that is the same. But what is ignored stays so in a program that it starts, and what is handled
    is at its default there. Spec: execve(2), signal(7).
    """
    for number in _PASSED_ON_IF_IGNORED:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


async def despite_cancellation(work: Coroutine[Any, Any, T]) -> T:
    """Run something to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    if cancelled is not None:
        task.exception()
        raise cancelled
    return task.result()


def _usage(usage: resource.struct_rusage) -> ResourceUsage:
    return ResourceUsage(
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        max_resident_bytes=usage.ru_maxrss * _KIBIBYTE,
        minor_page_faults=usage.ru_minflt,
        major_page_faults=usage.ru_majflt,
        blocks_read=usage.ru_inblock,
        blocks_written=usage.ru_oublock,
        voluntary_context_switches=usage.ru_nvcsw,
        involuntary_context_switches=usage.ru_nivcsw,
    )
