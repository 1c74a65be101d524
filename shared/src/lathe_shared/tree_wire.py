"""Directory and Tree messages, read as bytes.

A worker and a scheduler walk input roots of ten thousand files; this reads them several times faster than message
objects would be made. Nothing here judges names or digests beyond the wire format: ``DirectoryContents.check`` does,
for who builds a real directory from them.

Spec: REAPI, messages Directory, FileNode, DirectoryNode, SymlinkNode, NodeProperties and Tree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lathe_shared.cas_wire import read_digest
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.wire import MalformedMessageError, read_varint, scan, text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# A FileNode or DirectoryNode as clients write it: name, SHA-256 digest, perhaps the executable bit. The three length
# bytes are compared with what was matched, afterwards.
_PLAIN_NODE = re.compile(
    rb"\x0a([\x01-\x7f])([\x20-\x7e]+?)\x12([\x42-\x4d])\x0a\x40([0-9a-f]{64})(\x10[\x80-\xff]{0,8}[\x01-\x7f])?(\x20\x01)?",
    re.DOTALL,
)


class FileEntry(NamedTuple):
    """A FileNode; ``properties`` is the serialized NodeProperties, empty if absent."""

    name: str
    hash: str
    size_bytes: int
    is_executable: bool
    properties: bytes


class DirectoryEntry(NamedTuple):
    """A DirectoryNode."""

    name: str
    hash: str
    size_bytes: int


class SymlinkEntry(NamedTuple):
    """A SymlinkNode; ``properties`` is the serialized NodeProperties, empty if absent."""

    name: str
    target: str
    properties: bytes


@dataclass(frozen=True, slots=True)
class DirectoryContents:
    """A Directory, taken apart."""

    files: Sequence[FileEntry]
    directories: Sequence[DirectoryEntry]
    symlinks: Sequence[SymlinkEntry]
    properties: bytes

    def names(self) -> Iterator[str]:
        """Yield the names of all entries."""
        for file in self.files:
            yield file.name
        for directory in self.directories:
            yield directory.name
        for symlink in self.symlinks:
            yield symlink.name

    def check(self, function: DigestFunction = DigestFunction.SHA256, field: str = "directory") -> None:
        """Check that a real directory can be made of this one.

        Args:
            function: The function of all digests in it.
            field: What to call the directory in the error.

        Raises:
            InvalidArgumentError: A name is empty, ``.``, ``..``, holds a slash or NUL, or occurs twice; a digest is
                malformed; a symlink has no target.
        """
        names: set[str] = set()
        for name in self.names():
            if not name or name in (".", "..") or "/" in name or "\0" in name:
                raise InvalidArgumentError(field, f"{name!r} is no name for a file")
            if name in names:
                raise InvalidArgumentError(field, f"the name {name!r} occurs twice")
            names.add(name)
        for file in self.files:
            Digest.parse(file.hash, file.size_bytes, function, f"{field}: {file.name}: digest")
        for directory in self.directories:
            Digest.parse(directory.hash, directory.size_bytes, function, f"{field}: {directory.name}: digest")
        for symlink in self.symlinks:
            if not symlink.target or "\0" in symlink.target:
                raise InvalidArgumentError(field, f"the symlink {symlink.name!r} has no target")


def read_directory(data: bytes, start: int = 0, end: int | None = None) -> DirectoryContents:
    """Read a Directory message.

    Args:
        data: Bytes that hold it.
        start: Where it begins.
        end: Where it ends; the end of ``data`` if absent.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    files: list[FileEntry] = []
    directories: list[DirectoryEntry] = []
    symlinks: list[SymlinkEntry] = []
    properties = b""
    for tag, a, b in scan(data, start, end):
        if tag == 0x0A:
            plain = _read_plain_node(data, a, b)
            files.append(FileEntry(*plain, b"") if plain else _read_file(data, a, b))
        elif tag == 0x12:
            plain = _read_plain_node(data, a, b)
            directories.append(DirectoryEntry(*plain[:3]) if plain else _read_directory_node(data, a, b))
        elif tag == 0x1A:
            symlinks.append(_read_symlink(data, a, b))
        elif tag == 0x2A:
            properties += data[a:b]
    return DirectoryContents(files, directories, symlinks, properties)


def read_directory_blob(data: bytes, field: str) -> DirectoryContents:
    """Read a blob that somebody says is a Directory.

    Args:
        data: The blob.
        field: What to call it in an error.

    Raises:
        InvalidArgumentError: It is none.
    """
    try:
        return read_directory(data)
    except MalformedMessageError as error:
        raise InvalidArgumentError(field, f"is no Directory: {error.reason}") from None


def _read_plain_node(data: bytes, start: int, end: int) -> tuple[str, str, int, bool] | None:
    match = _PLAIN_NODE.fullmatch(data, start, end)
    if match is None:
        return None
    name_length, name, digest_length, hash_, size, executable = match.groups()
    size_length = len(size) if size else 0
    if name_length[0] != len(name) or digest_length[0] != 66 + size_length:
        return None
    size_bytes = read_varint(size, 1, size_length)[0] if size else 0
    return name.decode("ascii"), hash_.decode("ascii"), size_bytes, executable is not None


def _read_file(data: bytes, start: int, end: int) -> FileEntry:
    name, digest, properties = "", b"", b""
    is_executable = False
    for tag, a, b in scan(data, start, end):
        if tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x12:
            digest += data[a:b]
        elif tag == 0x20:
            is_executable = a != 0
        elif tag == 0x32:
            properties += data[a:b]
    return FileEntry(name, *read_digest(digest), is_executable, properties)


def _read_directory_node(data: bytes, start: int, end: int) -> DirectoryEntry:
    name, digest = "", b""
    for tag, a, b in scan(data, start, end):
        if tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x12:
            digest += data[a:b]
    return DirectoryEntry(name, *read_digest(digest))


def _read_symlink(data: bytes, start: int, end: int) -> SymlinkEntry:
    name, target, properties = "", "", b""
    for tag, a, b in scan(data, start, end):
        if tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x12:
            target = text(data, a, b)
        elif tag == 0x22:
            properties += data[a:b]
    return SymlinkEntry(name, target, properties)


def read_tree(data: bytes) -> tuple[DirectoryContents, list[DirectoryContents]]:
    """Read a Tree message into its root and its children.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    root = b""
    children = []
    for tag, a, b in scan(data):
        if tag == 0x0A:
            root += data[a:b]
        elif tag == 0x12:
            children.append(read_directory(data, a, b))
    return read_directory(root), children


def tree_file_digests(data: bytes) -> list[tuple[str, int]]:
    """Return hash and size of every file in a Tree: what must be stored for the tree to be complete.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    root, children = read_tree(data)
    return [(file.hash, file.size_bytes) for directory in (root, *children) for file in directory.files]
