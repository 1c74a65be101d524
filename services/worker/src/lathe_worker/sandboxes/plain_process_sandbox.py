"""No sandbox: actions run as ordinary processes of the worker's user. Must be asked for by name.

Actions share the machine with each other and the worker: they can read what the worker can, use the network, and leave
processes behind that make a session of their own. Only a process group is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_worker.child_process import exit_code, spawn
from lathe_worker.sandbox import (
    EXIT_CODE_NOT_EXECUTABLE,
    EXIT_CODE_NOT_FOUND,
    ResourceUsage,
    Sandbox,
    SandboxError,
    SandboxResult,
)
from lathe_worker.supervision import ProcessTree, supervise

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from lathe_worker.child_process import ChildProcess
    from lathe_worker.sandbox import SandboxSpec

_MACHINE_ERRORS = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO})
"""What keeps any process from being started, whatever the command."""


class PlainProcessSandbox(Sandbox):
    """Runs actions unprotected."""

    @override
    async def probe(self, scratch: Path) -> str:
        return "none: actions are not kept from anything that the worker may do"

    @override
    async def run(self, spec: SandboxSpec) -> SandboxResult:
        directory = spec.exec_root / spec.working_directory
        try:
            program = _resolve(spec, directory)
            result = await supervise(spec, None, lambda out, err: _start(spec, program, directory, out, err))
        except OSError as error:
            if error.errno in _MACHINE_ERRORS:
                raise SandboxError(f"cannot start a process: {error}") from error
            code = EXIT_CODE_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_CODE_NOT_EXECUTABLE
            spec.stderr_path.write_text(f"lathe: cannot run {spec.argv[0]}: {error.strerror}\n")
            return SandboxResult(code)
        if result is None:
            raise SandboxError("the command ended without a status")
        return result


def _resolve(spec: SandboxSpec, directory: Path) -> str:
    """Find the program as the action's environment says; Popen would look in the worker's directory and PATH."""
    name = spec.argv[0]
    if "/" in name:
        return str(directory / name)
    for folder in spec.environment.get("PATH", os.defpath).split(":"):
        candidate = directory / folder / name
        if os.access(candidate, os.X_OK) and candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(2, os.strerror(2), name)


def _start(spec: SandboxSpec, program: str, directory: Path, stdout_fd: int, stderr_fd: int) -> ProcessTree:
    child = spawn(
        spec.argv,
        environment=spec.environment,
        stdout_fd=stdout_fd,
        stderr_fd=stderr_fd,
        directory=directory,
        program=program,
    )
    return _ProcessGroup(child)


class _ProcessGroup(ProcessTree):
    def __init__(self, leader: ChildProcess) -> None:
        self._leader = leader

    @property
    @override
    def main_ended(self) -> asyncio.Future[None]:
        return self._leader.dead

    @override
    async def end(self) -> tuple[int | None, ResourceUsage]:
        # The dead but unreaped leader keeps the number of its group from being used again.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._leader.pid, signal.SIGKILL)
        await self._leader.dead
        reaped = self._leader.reap()
        return (exit_code(reaped[0]), reaped[1]) if reaped else (None, ResourceUsage())
