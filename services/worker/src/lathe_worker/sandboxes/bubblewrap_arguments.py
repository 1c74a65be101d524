"""What bubblewrap is told: pure functions from settings and a spec to its command line.

Spec: bwrap(1).
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lathe_worker.sandbox import ActionUser, ResourceLimits, SandboxSpec

EXEC_ROOT = "/lathe/root"
"""Where every action sees its input root: always the same, so that paths in outputs do not differ between runs."""

ARGUMENTS_FILE = "/lathe/arguments"
"""Where a command line too long for bubblewrap lies; see ``command``."""

HOST_NAME = "lathe"

_ENV = "/usr/bin/env"

DEFAULT_READABLE_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt")
"""What actions may read of the machine: programs, libraries, configuration; nothing of /root, /home, /srv or /var."""

MAX_ARGUMENTS = 8_000
"""Longer commands, their variables counted, take another way: bubblewrap gives up above 9,000 arguments, its own
included (its MAX_ARGS)."""


class ProcView(enum.Enum):
    """What an action finds at ``/proc``; the value is for logs."""

    FRESH = "own /proc"
    """A proc file system of its own pid namespace."""

    SHARED = "the worker's /proc, read-only"
    """The one that the worker has: programs find themselves there (``/proc/self``, which the dynamic linker needs for
    ``$ORIGIN``, and Java and shells for more), and see that other processes exist, with their command lines. What
    leads into a process (root, cwd, an fd, environ, mem, maps) the kernel gives to nobody who is in another user
    namespace, as every action is. Spec: ptrace(2), ptrace access mode checking."""

    NONE = "no /proc"


_PROC_OPTIONS = {
    ProcView.FRESH: ("--proc", "/proc"),
    ProcView.SHARED: ("--ro-bind", "/proc", "/proc"),
    ProcView.NONE: (),
}


@dataclass(frozen=True, slots=True)
class View:
    """What of the machine every action sees, worked out once at start.

    Attributes:
        arguments: Options that make it, in order.
    """

    arguments: Sequence[str]


def host_view(readable_paths: Iterable[str], hidden_paths: Iterable[Path]) -> View:
    """Work out the options for the machine's readable part.

    Args:
        readable_paths: Absolute paths of files or directories; absent ones are left out, symlinks stay symlinks, so
            that ``/lib`` is ``/usr/lib`` inside where it is outside.
        hidden_paths: Directories that are covered by an empty one if they lie inside a readable path.
    """
    arguments: list[str] = []
    shown: list[Path] = []
    for name in readable_paths:
        path = Path(name)
        if path.is_symlink() and path.parent == Path("/"):
            arguments += ["--symlink", str(path.readlink()), name]
        elif path.exists():
            arguments += ["--ro-bind", name, name]
            shown.append(path.resolve())
    for hidden in hidden_paths:
        real = hidden.resolve()
        if any(real.is_relative_to(path) for path in shown):
            arguments += ["--tmpfs", str(real), "--remount-ro", str(real)]
    return View(tuple(arguments))


def options(spec: SandboxSpec, view: View, *, exec_root: Path, temporary_directory: Path, proc: ProcView) -> list[str]:
    """Return bubblewrap's options for one action.

    Args:
        spec: The action.
        view: The machine's readable part.
        exec_root: The input root's path as the action's user can reach it.
        temporary_directory: Likewise for what becomes ``/tmp``.
        proc: What the action finds at ``/proc``.
    """
    result = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if not spec.network:
        result.append("--unshare-net")
    result += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", HOST_NAME]
    result += view.arguments
    result += ["--dev", "/dev"]
    result += _PROC_OPTIONS[proc]
    result += ["--bind", str(temporary_directory), "/tmp", "--symlink", "../tmp", "/var/tmp"]
    result += ["--bind", str(exec_root), EXEC_ROOT]
    result += ["--remount-ro", "/", "--chdir", os.path.normpath(f"{EXEC_ROOT}/{spec.working_directory}")]
    result.append("--clearenv")
    if not _goes_by_file(spec):
        for name, value in spec.environment.items():
            result += ["--setenv", name, value]
    return result


def _goes_by_file(spec: SandboxSpec) -> bool:
    """Tell whether a command and its variables, which take three arguments each, are too many for bubblewrap."""
    return _env_runs(spec.argv[0]) and len(spec.argv) + 3 * len(spec.environment) > MAX_ARGUMENTS


def _env_runs(program: str) -> bool:
    """Tell whether env takes this for a program; not what has a ``=``, nor ``-`` alone, an option even after ``--``."""
    return "=" not in program and program != "-"


def serialized(arguments: Iterable[str]) -> bytes:
    """Return arguments as a file holds them: each with a NUL byte behind it."""
    return b"".join(os.fsencode(argument) + b"\0" for argument in arguments)


def command(spec: SandboxSpec) -> tuple[Sequence[str], bytes]:
    """Return what bubblewrap is to run, and the content of ``ARGUMENTS_FILE`` if that needs it, else nothing.

    bubblewrap puts PWD into the environment, over the one that C++ toolchains set on purpose (``/proc/self/cwd``, which
    keeps paths out of debug information); env puts that right. It also fails like a shell, with 127 or 126 and a
    message, when the command is not there or not executable: the action's own failure, as a build's user can read it.

    A command of very many arguments or variables comes from a file by way of bash, whose own variables never reach the
    action.
    """
    if not _env_runs(spec.argv[0]):
        return spec.argv, b""
    if _goes_by_file(spec):
        script = f'mapfile -d "" -t arguments < {ARGUMENTS_FILE} && exec -c "${{arguments[@]}}"'
        variables = [f"{name}={value}" for name, value in spec.environment.items()]
        return ("/bin/bash", "-c", script), serialized([_ENV, "--", *variables, *spec.argv])
    if "PWD" in spec.environment:
        return (_ENV, "--", f"PWD={spec.environment['PWD']}", *spec.argv), b""
    return (_ENV, "-u", "PWD", "--", *spec.argv), b""


def limit_prefix(limits: ResourceLimits) -> list[str]:
    """Return the command that sets resource limits and runs the rest; core dumps are always off."""
    result = ["prlimit", "--core=0"]
    for option, value in (
        ("fsize", limits.max_file_size_bytes),
        ("nofile", limits.max_open_files),
        ("nproc", limits.max_processes),
        ("as", limits.max_address_space_bytes),
    ):
        if value:
            result.append(f"--{option}={value}")
    return [*result, "--"] if len(result) > 2 else []


def user_prefix(user: ActionUser | None) -> list[str]:
    """Return the command that becomes another user and runs the rest."""
    if user is None:
        return []
    return ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "--"]
