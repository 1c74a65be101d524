"""Directory messages from a list of files.

Spec: REAPI, messages Directory, on its canonical form, FileNode and DirectoryNode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lathe_shared.digest import Digest
from lathe_shared.wire import message_field, string_field, varint_field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_shared.digest import DigestFunction


class ConflictingPathError(ValueError):
    """A path that is two things at once."""


@dataclass(slots=True)
class DirectoryTree:
    """A directory that is being put together.

    Attributes:
        files: Serialized FileNodes, by name. As message objects those of a large archive would take seconds.
        directories: By name.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    directories: dict[str, DirectoryTree] = field(default_factory=dict)

    def add_file(self, path: Sequence[str], digest: Digest, *, is_executable: bool) -> None:
        """Add a file, and the directories on its way.

        Raises:
            ConflictingPathError: There is something of this name.
        """
        *parents, name = path
        directory = self.add_directory(parents)
        if name in directory.files or name in directory.directories:
            raise ConflictingPathError(f"{'/'.join(path)!r} comes twice")
        directory.files[name] = string_field(1, name) + message_field(2, digest.wire) + varint_field(4, is_executable)

    def add_directory(self, path: Sequence[str]) -> DirectoryTree:
        """Add a directory, unless it is there; return it.

        Raises:
            ConflictingPathError: There is a file of this name, or on the way.
        """
        directory = self
        for name in path:
            if name in directory.files:
                raise ConflictingPathError(f"{'/'.join(path)!r} has a file where a directory should be")
            directory = directory.directories.setdefault(name, DirectoryTree())
        return directory

    def find(self, path: Sequence[str]) -> DirectoryTree | None:
        """Return a directory below this one."""
        directory: DirectoryTree | None = self
        for name in path:
            directory = None if directory is None else directory.directories.get(name)
        return directory

    def messages(self, function: DigestFunction) -> list[tuple[Digest, bytes]]:
        """Return the Directories, this one last. They are as deep as the paths that were added."""
        found: list[tuple[Digest, bytes]] = []
        nodes = [message_field(1, node) for _, node in sorted(self.files.items())]
        for name, child in sorted(self.directories.items()):
            below = child.messages(function)
            found += below
            nodes.append(message_field(2, string_field(1, name) + message_field(2, below[-1][0].wire)))
        data = b"".join(nodes)
        return [*found, (Digest.of(data, function), data)]
