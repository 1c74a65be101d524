"""What an action has made, looked at and hashed; blocking, for a thread.

The action's processes are dead, so nothing changes any more. No symlink is followed: an output below one counts as not
made, since the symlink may lead anywhere on the worker.

Spec: REAPI, ActionResult.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import FailedPreconditionError, InvalidArgumentError
from lathe_worker import node_properties
from lathe_worker.directory_wire import DirectoryNode, FileNode, SymlinkNode, write_directory

if TYPE_CHECKING:
    from collections.abc import Collection

    from lathe_worker.output_paths import RequestedOutput

HASH_READ_BYTES = 1 << 20
"""Read size while hashing: large enough that hashlib works without the interpreter lock nearly all the time."""

_SPECIAL_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """A regular file among the outputs."""

    path: Path
    digest: Digest
    is_executable: bool
    properties: bytes


@dataclass(frozen=True, slots=True)
class ScannedSymlink:
    """A symlink among the outputs."""

    target: str
    properties: bytes


@dataclass(frozen=True, slots=True)
class ScannedDirectory:
    """A directory among the outputs.

    Attributes:
        directories: Serialized Directory messages with their digests, each once, the root first and every parent before
            its children.
        files: All files below, by digest, each content once.
    """

    directories: dict[Digest, bytes]
    files: dict[Digest, Path]

    @property
    def root(self) -> Digest:
        """Digest of the directory itself."""
        return next(iter(self.directories))


@dataclass(slots=True)
class OutputScanner:
    """Looks at outputs.

    Attributes:
        exec_root: Host path of the input root.
        function: Makes the digests.
        seen_root: Path of the input root as the action saw it; a symlink to an absolute path below it becomes a
            relative one, which means the same and is true outside of the sandbox, too. Empty for none.
        wanted_properties: ``Command.output_node_properties``.
    """

    exec_root: Path
    function: DigestFunction
    seen_root: str = ""
    wanted_properties: Collection[str] = ()
    _post_order: dict[Digest, bytes] = field(default_factory=dict)
    _files: dict[Digest, Path] = field(default_factory=dict)

    def scan(self, output: RequestedOutput) -> ScannedFile | ScannedSymlink | ScannedDirectory | None:
        """Look at one output; None if the action did not make it.

        Raises:
            FailedPreconditionError: It is or contains what no client can receive.
            OSError: The disk fails.
        """
        location = self.exec_root
        for name in output.components[:-1]:
            location /= name
            if not _is_directory(location):
                return None
        path = self.exec_root.joinpath(*output.components)
        try:
            status = os.lstat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            if error.errno == errno.ENAMETOOLONG:
                raise InvalidArgumentError("command.output_paths", f"{output.path[:200]!r}… is too long") from None
            raise
        if stat.S_ISLNK(status.st_mode):
            return ScannedSymlink(self._target(path), self._properties(status))
        if stat.S_ISDIR(status.st_mode):
            self._post_order, self._files = {}, {}
            self._scan_directory(path, status)
            # Reversed, an order in which children come first is one in which every parent does.
            return ScannedDirectory(dict(reversed(self._post_order.items())), self._files)
        return self._scan_file(path, status)

    def _scan_directory(self, root: Path, root_status: os.stat_result) -> Digest:
        """Scan a tree bottom-up, with a stack of its own: actions nest deeper than Python can call."""
        stack = [_OpenDirectory("", root, root_status, _entries(root))]
        while True:
            current = stack[-1]
            if current.entries:
                entry = current.entries.pop()
                status = entry.stat(follow_symlinks=False)
                path = Path(entry.path)
                name = _utf8(entry.name, path)
                if stat.S_ISDIR(status.st_mode):
                    stack.append(_OpenDirectory(name, path, status, _entries(path)))
                elif stat.S_ISLNK(status.st_mode):
                    current.symlinks.append(SymlinkNode(name, self._target(path), self._properties(status)))
                else:
                    file = self._scan_file(path, status)
                    self._files.setdefault(file.digest, path)
                    current.files.append(FileNode(name, file.digest, file.is_executable, file.properties))
                continue
            properties = self._properties(current.status)
            data = write_directory(current.files, current.directories, current.symlinks, properties)
            digest = Digest.of(data, self.function)
            self._post_order.setdefault(digest, data)
            stack.pop()
            if not stack:
                return digest
            stack[-1].directories.append(DirectoryNode(current.name, digest))

    def _scan_file(self, path: Path, status: os.stat_result) -> ScannedFile:
        if not stat.S_ISREG(status.st_mode):
            kind = _SPECIAL_KINDS.get(stat.S_IFMT(status.st_mode), "no file")
            shown = path.relative_to(self.exec_root)
            raise FailedPreconditionError(
                f"output {str(shown)!r} is {kind}; outputs are files, directories or symlinks"
            )
        digest = hash_file(path, self.function)
        return ScannedFile(path, digest, bool(status.st_mode & 0o111), self._properties(status))

    def _target(self, path: Path) -> str:
        target = _utf8(os.readlink(path), path)
        if self.seen_root and (target == self.seen_root or target.startswith(self.seen_root + "/")):
            inside = self.exec_root / target[len(self.seen_root) + 1 :]
            return os.path.relpath(inside, path.parent)
        return target

    def _properties(self, status: os.stat_result) -> bytes:
        return node_properties.write(status, self.wanted_properties) if self.wanted_properties else b""


@dataclass(slots=True)
class _OpenDirectory:
    name: str
    path: Path
    status: os.stat_result
    entries: list[os.DirEntry[str]]
    files: list[FileNode] = field(default_factory=list)
    directories: list[DirectoryNode] = field(default_factory=list)
    symlinks: list[SymlinkNode] = field(default_factory=list)


def hash_file(path: Path, function: DigestFunction) -> Digest:
    """Compute the digest of a file, readable or not as long as it is the worker's."""
    hasher = function.new_hasher()
    size_bytes = 0
    with contextlib.closing(_Readable(path)) as file:
        while chunk := os.read(file.fd, HASH_READ_BYTES):
            hasher.update(chunk)
            size_bytes += len(chunk)
    return Digest(hasher.hexdigest(), size_bytes, function)


class _Readable:
    """An open file, made readable first if the action took that right away and the worker is not root."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.fd = os.open(path, flags)
        except PermissionError:
            path.chmod(0o600)
            self.fd = os.open(path, flags)

    def close(self) -> None:
        os.close(self.fd)


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except PermissionError:
        path.chmod(0o700)
        with os.scandir(path) as entries:
            return list(entries)


def _is_directory(path: Path) -> bool:
    """Tell whether there is a directory, a symlink to one not counted."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _utf8(text: str, path: Path) -> str:
    """Return a name or target from the disk; REAPI's are UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FailedPreconditionError(f"output {os.fsencode(path)!r}: its name or target is not UTF-8") from None
    return text
