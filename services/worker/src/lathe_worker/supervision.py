"""Watching one command of an action: its output, its time, its end.

What the two sandboxes have in common. They differ in how they start processes and in how they make sure that all are
gone, which is what ``ProcessTree`` stands for.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING

from lathe_worker.child_process import despite_cancellation
from lathe_worker.output_spool import OutputSpool
from lathe_worker.sandbox import SandboxError, SandboxResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from lathe_worker.sandbox import ActionUser, ResourceUsage, SandboxSpec

DEATH_SECONDS = 10.0
"""How long killed processes may take to go; one that the kernel cannot end (a dead network disk) takes longer."""


class ProcessTree(abc.ABC):
    """The processes of one running command."""

    @property
    @abc.abstractmethod
    def main_ended(self) -> asyncio.Future[None]:
        """Done when the command itself has ended."""

    @abc.abstractmethod
    async def end(self) -> tuple[int | None, ResourceUsage]:
        """Kill what still runs, wait until nothing does, and return exit code and usage.

        The exit code is None if the command never began to run.
        """


async def supervise(
    spec: SandboxSpec, user: ActionUser | None, start: Callable[[int, int], ProcessTree]
) -> SandboxResult | None:
    """Start a command and see it through to the end of its last process.

    Args:
        spec: What runs; used for output paths and bounds, and for the timeout.
        user: Owner of the output pipes, if other than the worker.
        start: Starts the command with the two descriptors given as standard output and error.

    Returns:
        How it ended; None if the command never began to run, in which case standard error says why.

    Cancellation: kills all processes, waits for their death, then is raised.

    Raises:
        SandboxError: Output could not be written to disk, or killed processes did not go.
        OSError: The command could not be started.
    """
    began = time.monotonic()
    must_stop = asyncio.get_running_loop().create_future()

    def stop() -> None:
        if not must_stop.done():
            must_stop.set_result(None)

    stdout = OutputSpool(spec.stdout_path, spec.max_output_bytes, stop)
    stderr = OutputSpool(spec.stderr_path, spec.max_output_bytes, stop)
    with contextlib.closing(stdout), contextlib.closing(stderr):
        tree = _start(stdout, stderr, user, start)
        timed_out = False
        try:
            timed_out = not await _first_of(spec.timeout_seconds, tree.main_ended, must_stop)
        finally:
            code, usage = await despite_cancellation(_end(tree))
        wall_seconds = time.monotonic() - began
        stdout.finish()
        stderr.finish()
        for spool in (stdout, stderr):
            if spool.error is not None:
                raise SandboxError(f"output of the action could not be written to disk: {spool.error}") from spool.error
        if code is None:
            return None
        exceeded = "stdout" if stdout.exceeded else "stderr" if stderr.exceeded else ""
        return SandboxResult(code, timed_out, exceeded, wall_seconds, usage)


def _start(
    stdout: OutputSpool, stderr: OutputSpool, user: ActionUser | None, start: Callable[[int, int], ProcessTree]
) -> ProcessTree:
    stdout_fd = stdout.open(user)
    stderr_fd = -1
    try:
        stderr_fd = stderr.open(user)
        return start(stdout_fd, stderr_fd)
    finally:
        os.close(stdout_fd)
        if stderr_fd >= 0:
            os.close(stderr_fd)


async def _first_of(timeout_seconds: float | None, *futures: asyncio.Future[None]) -> bool:
    """Wait for one of several; return False if time was over first."""
    done, _ = await asyncio.wait(futures, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def _end(tree: ProcessTree) -> tuple[int | None, ResourceUsage]:
    try:
        async with asyncio.timeout(DEATH_SECONDS):
            return await tree.end()
    except TimeoutError:
        raise SandboxError(f"processes of the action did not die within {DEATH_SECONDS} s of SIGKILL") from None
