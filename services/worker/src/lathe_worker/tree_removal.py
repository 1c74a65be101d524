"""Removing what actions leave behind, whatever they did to its permissions, and never through a symlink."""

from __future__ import annotations

import os
import stat
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MAX_DEPTH = 64
"""Directories open at once. Actions can nest thousands, which would use up the worker's file descriptors."""


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it; blocking. Nothing happens if it is absent.

    Every directory is opened without following a symlink, relative to its parent, so that nothing outside can be hit.

    Raises:
        OSError: Something cannot be removed.
    """
    try:
        parent_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _remove(parent_fd, path.name)
    finally:
        os.close(parent_fd)


def _remove(parent_fd: int, name: str) -> None:
    """Remove one entry, with a stack of open directories in place of recursion."""
    stack: list[tuple[int, str, list[str]]] = []
    try:
        _enter(stack, parent_fd, name)
        while stack:
            fd, own_name, children = stack[-1]
            if children:
                child = children.pop()
                if _unlinked(fd, child):
                    continue
                if len(stack) < _MAX_DEPTH:
                    _enter(stack, fd, child)
                else:
                    _lift(fd, child, *stack[0])
                continue
            stack.pop()
            os.close(fd)
            os.rmdir(own_name, dir_fd=stack[-1][0] if stack else parent_fd)
    finally:
        for fd, _, _ in stack:
            os.close(fd)


def _unlinked(directory_fd: int, name: str) -> bool:
    """Remove an entry that is no directory; return False if it is one."""
    try:
        os.unlink(name, dir_fd=directory_fd)
    except IsADirectoryError:
        return False
    except FileNotFoundError:
        pass
    except PermissionError:  # what some file systems say for a directory
        if stat.S_ISDIR(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
            return False
        raise
    return True


def _enter(stack: list[tuple[int, str, list[str]]], parent_fd: int, name: str) -> None:
    try:
        fd = _open_directory(parent_fd, name)
    except FileNotFoundError:
        return
    try:
        os.fchmod(fd, 0o700)  # the action may have taken its own rights away
        children = os.listdir(fd)
    except PermissionError:
        children = os.listdir(fd)
    stack.append((fd, name, children))


def _lift(directory_fd: int, child: str, top_fd: int, _: str, top_children: list[str]) -> None:
    """Move a directory that lies too deep to the top of the tree, to be removed from there."""
    lifted = f"lathe-lifted-{uuid.uuid4().hex}"
    os.chmod(child, 0o700, dir_fd=directory_fd)
    os.rename(child, lifted, src_dir_fd=directory_fd, dst_dir_fd=top_fd)
    top_children.append(lifted)


def _open_directory(parent_fd: int, name: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent_fd)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent_fd)  # no symlink: those were unlinked, and nobody makes new ones
        return os.open(name, flags, dir_fd=parent_fd)
