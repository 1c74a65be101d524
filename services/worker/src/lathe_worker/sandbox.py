"""Sandbox: the port through which an action's processes run.

An implementation runs one command to its end, however that end comes, and leaves no process of it behind. What it may
not do is judge: an exit code, a timeout and too much output are all results. Only its own failures are errors.

Spec: REAPI, Command and ActionResult.exit_code.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

EXIT_CODE_NOT_FOUND = 127
"""Exit code when the command does not exist: what a POSIX shell gives (XCU, 2.8.2)."""

EXIT_CODE_NOT_EXECUTABLE = 126
"""Exit code when the command exists and cannot be run: what a POSIX shell gives (XCU, 2.8.2)."""

SIGNAL_EXIT_CODE_BASE = 128
"""A process that died of signal n has this plus n as its exit code: the shells' convention."""


class SandboxError(Exception):
    """The sandbox itself failed; the action is not to blame and may run elsewhere."""


class SandboxUnavailableError(SandboxError):
    """This machine cannot give the sandbox that is configured; the message says what is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class ActionUser:
    """The unprivileged user that actions run as.

    Attributes:
        uid: User id, not that of a real user.
        gid: Group id; the action is in no other group.
    """

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """Limits on each process of an action; zero means the worker's own.

    Attributes:
        max_file_size_bytes: Largest file that a process may write (RLIMIT_FSIZE).
        max_open_files: File descriptors of a process (RLIMIT_NOFILE).
        max_processes: Processes of the action's uid on the machine (RLIMIT_NPROC): all actions of all workers under
            that uid count together.
        max_address_space_bytes: Address space of a process (RLIMIT_AS).
    """

    max_file_size_bytes: int = 0
    max_open_files: int = 0
    max_processes: int = 0
    max_address_space_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """One command to run.

    Attributes:
        argv: The command; ``argv[0]`` holds a slash and is relative to the working directory, or is absolute, or is
            looked up in the PATH of ``environment``.
        environment: All variables that the action sees.
        exec_root: Host path of the input root, writable by the action.
        temporary_directory: Host path of an empty directory that becomes the action's ``/tmp`` where the sandbox can do
            that.
        working_directory: Relative to ``exec_root``; empty for the root itself.
        timeout_seconds: After this time all processes are killed; None for no limit.
        stdout_path: File that takes standard output; made only if there is any.
        stderr_path: File that takes standard error; made only if there is any.
        max_output_bytes: Bound on each of the two; an action that writes more is killed.
        limits: Resource limits.
        network: Whether the action may use the machine's network.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    exec_root: Path
    temporary_directory: Path
    stdout_path: Path
    stderr_path: Path
    working_directory: str = ""
    timeout_seconds: float | None = None
    max_output_bytes: int = 64 << 20
    limits: ResourceLimits = field(default_factory=ResourceLimits)
    network: bool = False


@dataclass(frozen=True, slots=True)
class ResourceUsage:
    """What the kernel counted for an action's processes, those that the main process waited for included.

    Spec: getrusage(2).
    """

    user_seconds: float = 0.0
    system_seconds: float = 0.0
    max_resident_bytes: int = 0
    minor_page_faults: int = 0
    major_page_faults: int = 0
    blocks_read: int = 0
    blocks_written: int = 0
    voluntary_context_switches: int = 0
    involuntary_context_switches: int = 0


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a command ended.

    Attributes:
        exit_code: As the command gave it; 128 + n if signal n ended it, 137 when it was killed for its timeout or its
            output.
        timed_out: Whether it was killed because its time was over.
        exceeded_output: ``stdout`` or ``stderr`` if it was killed for writing more there than allowed, else empty.
        wall_seconds: Time from start to the death of the last process.
        usage: What it used.
    """

    exit_code: int
    timed_out: bool = False
    exceeded_output: str = ""
    wall_seconds: float = 0.0
    usage: ResourceUsage = field(default_factory=ResourceUsage)


class Sandbox(abc.ABC):
    """Runs commands, each apart from the others and from the worker.

    Attributes:
        action_user: The user that actions run as, if that is another than the worker's own; None otherwise. Whoever
            builds input roots needs it: files of the worker are safe from another uid, not from the same.
        seen_root: Where an action sees its input root, if that is the same for all actions; empty otherwise.
    """

    action_user: ActionUser | None = None
    seen_root: str = ""

    @abc.abstractmethod
    async def probe(self, scratch: Path) -> str:
        """Run a trivial command and say in words what protection was reached.

        Args:
            scratch: An empty directory to make an exec root in.

        Raises:
            SandboxUnavailableError: It cannot run here; the message says what is missing.
        """

    @abc.abstractmethod
    async def run(self, spec: SandboxSpec) -> SandboxResult:
        """Run one command until all its processes are gone.

        Cancellation: kills all processes and returns to the caller when they are dead.

        Raises:
            SandboxError: The command could not be started for reasons that lie with this machine.
        """
