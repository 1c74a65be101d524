"""Actions in bubblewrap: own namespaces for everything, a read-only machine, an unprivileged user.

The processes and who waits for whom::

    worker ── bwrap (outside) ── bwrap (pid 1 of the sandbox) ── the command ── …

When the command ends, the outer bwrap writes its exit code and ends; by ``--die-with-parent`` pid 1 is killed then, and
with it whatever the command left behind. The worker, a subreaper, inherits pid 1 and waits for its death, which the
kernel completes only when the whole namespace is dead: from then on nothing can touch the outputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_worker import sandbox_probe
from lathe_worker.child_process import ChildProcess, spawn
from lathe_worker.sandbox import (
    EXIT_CODE_NOT_EXECUTABLE,
    EXIT_CODE_NOT_FOUND,
    ActionUser,
    ResourceUsage,
    Sandbox,
    SandboxError,
    SandboxResult,
    SandboxSpec,
    SandboxUnavailableError,
)
from lathe_worker.sandboxes import bubblewrap_arguments
from lathe_worker.sandboxes.bubblewrap_arguments import ProcView
from lathe_worker.supervision import ProcessTree, supervise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_START_SECONDS = 5.0
"""How long a kill waits to learn who pid 1 is; bubblewrap says it about a millisecond after its start."""

_TOOL_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""For setpriv, prlimit and bwrap: never the action's variables, which could make them load its code outside."""

_EXEC_FAILURE = b"bwrap: execvp "
_CHDIR_FAILURE = b"bwrap: Can't chdir to "


class BubblewrapSandbox(Sandbox):
    """Runs each action in namespaces of its own.

    Args:
        view: The part of the machine that actions can read.
        action_user: User to become, which the worker must be root for; None to stay the worker's own.
        reachable: Maps a path of the worker to one that ``action_user`` can reach; the identity where the worker's data
            directory is open to all.
        proc: What actions find at ``/proc``: the first of these that the probe finds to work.
        bwrap: Name or path of bubblewrap.
    """

    seen_root = bubblewrap_arguments.EXEC_ROOT

    def __init__(
        self,
        view: bubblewrap_arguments.View,
        *,
        action_user: ActionUser | None = None,
        reachable: Callable[[Path], Path] = lambda path: path,
        proc: Sequence[ProcView] = tuple(ProcView),
        bwrap: str = "bwrap",
    ) -> None:
        self.action_user = action_user
        self._view = view
        self._reachable = reachable
        self._proc_choices = proc
        self._proc = proc[0]
        self._bwrap = bwrap

    @override
    async def probe(self, scratch: Path) -> str:
        tools = [self._bwrap] if self.action_user is None else [self._bwrap, "setpriv"]
        for tool in tools:
            if shutil.which(tool, path=_TOOL_ENVIRONMENT["PATH"]) is None:
                raise SandboxUnavailableError(sandbox_probe.explain_missing_tool(tool))
        problem = ""
        for choice in self._proc_choices:
            self._proc = choice
            problem = await sandbox_probe.try_out(self, scratch)
            if not sandbox_probe.concerns_proc(problem):
                break
        if problem:
            raise SandboxUnavailableError(sandbox_probe.explain(problem))
        user = "the worker's uid" if self.action_user is None else f"uid {self.action_user.uid}"
        namespaces = "own user, pid, mount, net, ipc and uts namespaces"
        return f"bubblewrap: {namespaces}, read-only root, {self._proc.value}, {user}"

    @override
    async def run(self, spec: SandboxSpec) -> SandboxResult:
        try:
            result = await supervise(spec, self.action_user, lambda out, err: self._start(spec, out, err))
        except OSError as error:
            if error.errno == errno.E2BIG:
                return _not_run(spec, EXIT_CODE_NOT_EXECUTABLE, os.strerror(error.errno))
            raise SandboxError(f"cannot start {self._bwrap}: {error}") from error
        return result or _exec_failure(spec)

    def _start(self, spec: SandboxSpec, stdout_fd: int, stderr_fd: int) -> ProcessTree:
        options = bubblewrap_arguments.options(
            spec,
            self._view,
            exec_root=self._reachable(spec.exec_root),
            temporary_directory=self._reachable(spec.temporary_directory),
            proc=self._proc,
        )
        argv, content = bubblewrap_arguments.command(spec)
        with contextlib.ExitStack() as stack:
            keep = []
            if content:
                keep.append(_memory_file(stack, content))
                options[:0] = ["--ro-bind-data", str(keep[0]), bubblewrap_arguments.ARGUMENTS_FILE]
            # Options travel in a file: neither the length limit of a command line nor ps sees the action's variables.
            keep.append(_memory_file(stack, bubblewrap_arguments.serialized(options)))
            status_read, status_write = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, status_write)
            prefix = bubblewrap_arguments.limit_prefix(spec.limits)
            prefix += bubblewrap_arguments.user_prefix(self.action_user)
            command = [self._bwrap, "--args", str(keep[-1]), "--json-status-fd", str(status_write), "--", *argv]
            try:
                outer = spawn(
                    [*prefix, *command],
                    environment=_TOOL_ENVIRONMENT,
                    stdout_fd=stdout_fd,
                    stderr_fd=stderr_fd,
                    keep_fds=(*keep, status_write),
                )
            except BaseException:
                os.close(status_read)
                raise
            return _BubblewrapTree(outer, status_read)


def _memory_file(stack: contextlib.ExitStack, content: bytes) -> int:
    fd = os.memfd_create("lathe")
    stack.callback(os.close, fd)
    os.truncate(fd, len(content))
    view = memoryview(content)
    while view:
        view = view[os.pwrite(fd, view, len(content) - len(view)) :]
    return fd


class _BubblewrapTree(ProcessTree):
    """The outer bwrap, its status pipe and, once that has named it, pid 1 of the sandbox."""

    def __init__(self, outer: ChildProcess, status_fd: int) -> None:
        loop = asyncio.get_running_loop()
        self._outer = outer
        self._first: ChildProcess | None = None
        self._exit_code: int | None = None
        self._status_fd = status_fd
        self._status = b""
        self._first_known: asyncio.Future[None] = loop.create_future()
        os.set_blocking(status_fd, False)
        loop.add_reader(status_fd, self._read_status)

    @property
    @override
    def main_ended(self) -> asyncio.Future[None]:
        return self._outer.dead

    @override
    async def end(self) -> tuple[int | None, ResourceUsage]:
        killed = not self._outer.dead.done()
        if killed:
            # Killed earlier, pid 1 would be left waiting for instructions, and nobody would know its number.
            await asyncio.wait([self._first_known], timeout=_START_SECONDS)
            self._outer.kill()
        await self._outer.dead
        while self._status_fd >= 0 and self._read_status():
            pass
        self._close_status()
        reaped = self._outer.reap()
        usage = reaped[1] if reaped else ResourceUsage()
        if self._first is not None:
            self._first.kill()
            await self._first.dead
            if reaped := self._first.reap():
                usage = reaped[1]
        if killed and self._exit_code is None:
            return 137, usage
        return self._exit_code, usage

    def _read_status(self) -> bool:
        """Take in more of the status; return False if there is none now."""
        try:
            chunk = os.read(self._status_fd, 4096)
        except BlockingIOError:
            return False
        if not chunk:
            self._close_status()
            return False
        *lines, self._status = (self._status + chunk).split(b"\n")
        for line in lines:
            self._take_status(json.loads(line))
        return True

    def _take_status(self, status: dict[str, int]) -> None:
        if "child-pid" in status:
            with contextlib.suppress(ProcessLookupError):
                self._first = ChildProcess(status["child-pid"])
            self._set_first_known()
        self._exit_code = status.get("exit-code", self._exit_code)

    def _set_first_known(self) -> None:
        if not self._first_known.done():
            self._first_known.set_result(None)

    def _close_status(self) -> None:
        if self._status_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._status_fd)
            os.close(self._status_fd)
            self._status_fd = -1
        self._set_first_known()


def _exec_failure(spec: SandboxSpec) -> SandboxResult:
    """Judge a command that never began to run by what bubblewrap wrote to standard error.

    A command that cannot be executed is the action's failure, and so is a working directory that its inputs make
    something else; anything else is the sandbox's.
    """
    message = spec.stderr_path.read_bytes() if spec.stderr_path.exists() else b""
    text = message.decode(errors="replace").strip() or "bubblewrap ended without a word"
    reason = text.rpartition(": ")[2]
    too_long = reason == os.strerror(errno.E2BIG)
    if too_long or message.startswith(_EXEC_FAILURE + os.fsencode(spec.argv[0])):
        missing = reason == os.strerror(errno.ENOENT)
        return _not_run(spec, EXIT_CODE_NOT_FOUND if missing else EXIT_CODE_NOT_EXECUTABLE, reason)
    if message.startswith(_CHDIR_FAILURE):
        shown = f"working directory {_shorten(spec.working_directory)!r}: {reason}"
        return _not_run(spec, EXIT_CODE_NOT_EXECUTABLE, shown)
    raise SandboxError(sandbox_probe.explain(text[:2000]))


def _not_run(spec: SandboxSpec, code: int, reason: str) -> SandboxResult:
    spec.stderr_path.write_text(f"lathe: cannot run {_shorten(spec.argv[0])}: {reason}\n")
    return SandboxResult(code)


def _shorten(argument: str, limit: int = 1000) -> str:
    return argument if len(argument) <= limit else argument[:limit] + "…"
