"""Directory and Tree messages, written in REAPI's canonical form.

Spec: REAPI, Directory ("names sorted, no duplicates"), Tree and OutputDirectory.is_topologically_sorted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lathe_shared.wire import bytes_field, message_field, string_field, varint_field

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lathe_shared.digest import Digest


class FileNode(NamedTuple):
    """A file in a directory; ``properties`` is a serialized NodeProperties or empty."""

    name: str
    digest: Digest
    is_executable: bool
    properties: bytes


class DirectoryNode(NamedTuple):
    """A directory in a directory."""

    name: str
    digest: Digest


class SymlinkNode(NamedTuple):
    """A symlink in a directory; ``properties`` is a serialized NodeProperties or empty."""

    name: str
    target: str
    properties: bytes


def write_directory(
    files: Iterable[FileNode],
    directories: Iterable[DirectoryNode],
    symlinks: Iterable[SymlinkNode],
    properties: bytes = b"",
) -> bytes:
    """Serialize a Directory; entries may come in any order."""
    parts = [
        message_field(
            1,
            string_field(1, file.name)
            + message_field(2, file.digest.wire)
            + varint_field(4, file.is_executable)
            + bytes_field(6, file.properties),
        )
        for file in sorted(files)
    ]
    parts += [
        message_field(2, string_field(1, directory.name) + message_field(2, directory.digest.wire))
        for directory in sorted(directories)
    ]
    parts += [
        message_field(
            3, string_field(1, symlink.name) + string_field(2, symlink.target) + bytes_field(4, symlink.properties)
        )
        for symlink in sorted(symlinks)
    ]
    parts.append(bytes_field(5, properties))
    return b"".join(parts)


def write_tree(directories: Iterable[bytes]) -> bytes:
    """Serialize a Tree.

    Args:
        directories: Serialized Directory messages, each once, the root first and every parent before its children.
    """
    return b"".join(message_field(1 if index == 0 else 2, data) for index, data in enumerate(directories))
