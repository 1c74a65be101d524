"""A way into the work directory for the actions' user, where the directories above it are closed to others.

A worker that runs as root by hand has its data in root's home directory, which nobody else may enter; the user that
bubblewrap runs as could not reach the exec root there. So the worker gives itself a mount namespace in which the work
directory appears a second time, at an open place. Nobody else sees that, and it goes with the worker.

Spec: unshare(2), mount(2), mount_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from lathe_worker.sandbox import SandboxUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lathe_worker.sandbox import ActionUser

MOUNT_POINT = Path("/run/lathe-worker")
"""An empty directory; many workers can use it at once, as each sees its own mount there."""

# linux/sched.h and linux/mount.h
_CLONE_NEWNS = 0x00020000
_MS_BIND = 4096
_MS_REC = 16384
_MS_SLAVE = 1 << 19


def can_reach(directory: Path, user: ActionUser) -> bool:
    """Tell whether a user may pass through a directory and all those above it."""
    real = directory.resolve()
    return all(_can_search(path.stat(), user) for path in (real, *real.parents))


def make_reachable(directory: Path, user: ActionUser) -> Callable[[Path], Path]:
    """Return a function from paths in a directory to paths by which a user reaches them.

    Call it while the process has one thread: a mount namespace is entered by the calling thread and inherited by those
    that it starts.

    Args:
        directory: An existing directory, itself open to ``user``.
        user: Who shall reach it.

    Raises:
        SandboxUnavailableError: The directory is closed, and this process may not make a mount namespace.
    """
    if can_reach(directory, user):
        return lambda path: path
    try:
        MOUNT_POINT.mkdir(mode=0o755, exist_ok=True)
        libc = ctypes.CDLL(None, use_errno=True)
        _check(libc.unshare(_CLONE_NEWNS))
        # Mounts that the machine makes later still arrive here; ours do not arrive there.
        _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None))
        _check(libc.mount(os.fsencode(directory), os.fsencode(MOUNT_POINT), None, _MS_BIND, None))
    except OSError as error:
        raise SandboxUnavailableError(
            f"the actions' user {user.uid} cannot reach {directory}, and it cannot be shown to it elsewhere ({error}); "
            "choose a data_dir whose parents can all be searched by others (chmod o+x)"
        ) from error
    return lambda path: MOUNT_POINT / path.relative_to(directory)


def _can_search(status: os.stat_result, user: ActionUser) -> bool:
    if status.st_uid == user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == user.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
