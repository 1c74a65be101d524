"""The trial at start: does the sandbox work on this machine, and if not, what is missing.

A worker that cannot protect its machine does not start; so the message has to carry the cure.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lathe_worker.sandbox import SandboxError, SandboxSpec

if TYPE_CHECKING:
    from pathlib import Path

    from lathe_worker.sandbox import Sandbox

_TIMEOUT_SECONDS = 30.0
"""Far more than a trivial command takes on a busy machine."""

_CURES = (
    (
        ("execvp",),
        "actions need at least /usr and what /bin and /lib are on this machine; add them to readable_paths",
    ),
    (
        ("setpriv",),
        "the worker is root and may not become another user; run it as an ordinary user instead",
    ),
    (
        ("proc",),
        "a new /proc may not be mounted here, as in a container whose /proc is masked; unmask it "
        "(systempaths=unconfined) or set sandbox_proc to 'auto', 'shared' or 'none'",
    ),
    (
        ("namespace", "Operation not permitted", "clone", "setting up uid map"),
        "unprivileged user namespaces are switched off; check the sysctls user.max_user_namespaces (above 0), "
        "kernel.unprivileged_userns_clone (1, where it exists) and kernel.apparmor_restrict_unprivileged_userns (0, "
        "where it exists), and in a container the seccomp profile, which must allow clone, unshare, mount, umount2 and "
        "pivot_root",
    ),
    (
        ("Can't find source path", "Permission denied"),
        "the action's user cannot reach the worker's data directory; choose a data_dir whose parents all can be "
        "searched by others (chmod o+x)",
    ),
)


async def try_out(sandbox: Sandbox, scratch: Path) -> str:
    """Run a trivial command; return an empty text if that works, else what went wrong.

    Args:
        sandbox: The sandbox on trial.
        scratch: An existing directory in which the exec root is made; its content may be overwritten.
    """
    exec_root, temporary = scratch / "root", scratch / "tmp"
    for directory in (exec_root, temporary):
        directory.mkdir(exist_ok=True)
        if sandbox.action_user is not None:
            os.chown(directory, sandbox.action_user.uid, sandbox.action_user.gid)
    for name in ("stdout", "stderr"):
        (scratch / name).unlink(missing_ok=True)
    (exec_root / "written").unlink(missing_ok=True)
    spec = SandboxSpec(
        argv=["/bin/sh", "-c", "echo alive > written"],
        environment={},
        exec_root=exec_root,
        temporary_directory=temporary,
        stdout_path=scratch / "stdout",
        stderr_path=scratch / "stderr",
        timeout_seconds=_TIMEOUT_SECONDS,
    )
    try:
        result = await sandbox.run(spec)
    except SandboxError as error:
        return str(error)
    if result.exit_code != 0 or not (exec_root / "written").exists():
        said = spec.stderr_path.read_text(errors="replace").strip() if spec.stderr_path.exists() else ""
        return f"a trivial command ended with exit code {result.exit_code}: {said}"
    return ""


def concerns_proc(problem: str) -> bool:
    """Tell whether a failure is about mounting /proc."""
    return "proc" in problem


def explain_missing_tool(tool: str) -> str:
    """Say how to get a program that the sandbox needs."""
    package = {"setpriv": "util-linux", "prlimit": "util-linux"}.get(tool, "bubblewrap")
    return (
        f"{tool} is not installed (package {package}); install it, or set sandbox to 'none' to run actions without any "
        "protection of this machine"
    )


def explain(problem: str) -> str:
    """Add the likely cure to what bubblewrap said."""
    for signs, cure in _CURES:
        if any(sign in problem for sign in signs):
            # The sandbox has explained what it said itself, and nothing else.
            return problem if cure in problem else f"{problem} -- {cure}"
    return problem
