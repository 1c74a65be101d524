"""InputRoot: from Directory messages to a real tree that an action may do anything to.

Two steps, both without waiting for the network, so that they run in a thread: ``plan`` walks the messages and lists
what is to be made; ``build`` makes it. Between them the files are brought into the cache.

Nothing follows a symlink: directories come first, then files, and symlinks last, and the names in one directory differ.

Spec: REAPI, Directory, FileNode, SymlinkNode, NodeProperties.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from lathe_shared.errors import InvalidArgumentError
from lathe_worker import node_properties
from lathe_worker.cache_files import copy_contents, digest_of, file_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from lathe_shared.digest import DigestFunction
    from lathe_shared.tree_wire import DirectoryContents
    from lathe_worker.directory_loader import LoadedTree
    from lathe_worker.file_cache import FileCache
    from lathe_worker.sandbox import ActionUser

MAX_NODES = 2_000_000
"""Bound on files, directories and symlinks of one input root: a few directories that each contain the next one twice
unfold to any number."""

_PATH_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL})
"""What the disk says to names that the client should not have chosen."""


@dataclass(slots=True)
class InputRootPlan:
    """What an input root consists of; all paths are relative to it.

    Attributes:
        directories: Paths, parents before children.
        files: Path, name in the file cache (empty for an empty file), executable bit, serialized NodeProperties.
        symlinks: Path and target.
        directory_properties: Path and serialized NodeProperties of the directories that have any.
    """

    directories: list[str] = field(default_factory=list)
    files: list[tuple[str, str, bool, bytes]] = field(default_factory=list)
    symlinks: list[tuple[str, str]] = field(default_factory=list)
    directory_properties: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def cache_names(self) -> list[str]:
        """Distinct names of the files that must be in the cache."""
        return list(dict.fromkeys(name for _, name, _, _ in self.files if name))

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of all files."""
        return sum(digest_of(name).size_bytes for _, name, _, _ in self.files if name)


def plan(tree: LoadedTree, extra_directories: Iterable[Sequence[str]], max_nodes: int = MAX_NODES) -> InputRootPlan:
    """List what an input root consists of.

    Args:
        tree: Its directories; with missing ones, what can be reached without them is listed.
        extra_directories: Further directories to make, as names from the root: parents of outputs, the working
            directory. One that lies below a file or a symlink of the input root is left out.
        max_nodes: Bound on the number of nodes.

    Raises:
        InvalidArgumentError: There are more nodes than ``max_nodes``.
    """
    result = InputRootPlan()
    function = tree.root.function
    nodes = 0
    waiting = [("", tree.root.hash)]
    while waiting:
        prefix, hash_ = waiting.pop()
        contents = tree.directories.get(hash_)
        if contents is None:
            continue
        nodes += 1 + len(contents.files) + len(contents.symlinks)
        if nodes + len(waiting) > max_nodes:
            raise InvalidArgumentError("action.input_root_digest", f"the tree has more than {max_nodes} nodes")
        _plan_leaves(result, contents, prefix, function)
        for child in contents.directories:
            result.directories.append(prefix + child.name)
            waiting.append((f"{prefix}{child.name}/", child.hash))
    _plan_extra(result, extra_directories)
    return result


def _plan_leaves(result: InputRootPlan, contents: DirectoryContents, prefix: str, function: DigestFunction) -> None:
    if contents.properties:
        result.directory_properties.append((prefix.rstrip("/") or ".", contents.properties))
    for name, hash_, size_bytes, is_executable, properties in contents.files:
        cached = file_name(hash_, size_bytes, function, is_executable=is_executable) if size_bytes else ""
        result.files.append((prefix + name, cached, is_executable, properties))
    for name, target, _ in contents.symlinks:
        result.symlinks.append((prefix + name, target))


def _plan_extra(result: InputRootPlan, extra_directories: Iterable[Sequence[str]]) -> None:
    directories = set(result.directories)
    others: set[str] | None = None
    for names in extra_directories:
        for depth in range(1, len(names) + 1):
            path = "/".join(names[:depth])
            if path in directories:
                continue
            if others is None:
                others = {file[0] for file in result.files} | {symlink[0] for symlink in result.symlinks}
            if path in others:
                break
            directories.add(path)
            result.directories.append(path)


def build(plan: InputRootPlan, exec_root: Path, cache: FileCache, user: ActionUser | None) -> None:
    """Make an input root on disk; blocking.

    Where actions run under another uid than the worker, files are links into the cache, which that uid can neither
    write nor chmod. Where they run under the worker's own, files are copies, as an action could do anything to a link.

    Args:
        plan: What to make.
        exec_root: An existing empty directory.
        cache: Holds the files, for as long as this runs.
        user: The actions' user; None for the worker's own.

    Raises:
        InvalidArgumentError: A name or path is too long for the disk.
        OSError: The disk is full or broken, or somebody removed files from the cache's directory.
    """
    root = f"{exec_root}/"
    try:
        if user is not None:
            os.chown(root, user.uid, user.gid)
        for path in plan.directories:
            os.mkdir(root + path, 0o755)
            if user is not None:
                os.chown(root + path, user.uid, user.gid)
        for path, name, is_executable, properties in plan.files:
            _make_file(root + path, name, cache, user, is_executable=is_executable, properties=properties)
        for path, target in plan.symlinks:
            os.symlink(target, root + path)
            if user is not None:
                os.chown(root + path, user.uid, user.gid, follow_symlinks=False)
        for path, properties in reversed(plan.directory_properties):
            node_properties.apply(root + path, properties)
    except OSError as error:
        if error.errno in _PATH_ERRORS:
            reason = f"{error.strerror}: {error.filename!r}"
            raise InvalidArgumentError("action.input_root_digest", reason[:500]) from None
        raise


def _make_file(
    path: str, name: str, cache: FileCache, user: ActionUser | None, *, is_executable: bool, properties: bytes
) -> None:
    if name and user is not None and not properties:
        try:
            os.link(cache.path(name), path)
            return
        except FileNotFoundError as error:
            _report_vanished(cache, name, error)
        except OSError as error:
            # Too many links to one file, or a cache on another disk.
            if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
                raise
    _copy(path, name, cache, is_executable=is_executable)
    if properties:
        if user is not None:
            os.chown(path, user.uid, user.gid)
        node_properties.apply(path, properties)


def _copy(path: str, name: str, cache: FileCache, *, is_executable: bool) -> None:
    target_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if name:
            _copy_cached(cache, name, target_fd)
        os.fchmod(target_fd, 0o555 if is_executable else 0o444)
    finally:
        os.close(target_fd)


def _copy_cached(cache: FileCache, name: str, target_fd: int) -> None:
    try:
        with open(cache.path(name), "rb") as source:
            copy_contents(source.fileno(), target_fd)
    except FileNotFoundError as error:
        _report_vanished(cache, name, error)


def _report_vanished(cache: FileCache, name: str, error: FileNotFoundError) -> NoReturn:
    """Make the cache forget a file that somebody removed from its directory, so that the next try fetches it anew."""
    if not os.path.exists(cache.path(name)):
        cache.forget(name)
    raise error
