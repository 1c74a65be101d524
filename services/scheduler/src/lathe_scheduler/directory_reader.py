"""Read Directory messages, each only once.

A Directory is immutable, for its digest names its contents: what was parsed stays true. The memo is bounded by the
number of entries that it holds, and drops what was not used for the longest time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_shared.digest import Digest
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.tree_wire import read_directory_blob

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping


MAX_DIRECTORY_BYTES = 64 << 20
"""Largest Directory that is read: half a million files in one; a bound on what a digest can make us load."""


@dataclass(frozen=True, slots=True)
class DirectoryReferences:
    """The blobs that one Directory names.

    Attributes:
        files: Digests of its files, each once.
        directories: Digests of its subdirectories, each once.
    """

    files: tuple[Digest, ...]
    directories: tuple[Digest, ...]


class DirectoryReader:
    """Reads and remembers what Directories refer to.

    Args:
        read: Reads blobs by digest; leaves out what is not stored.
        max_entries: Files and directories in all remembered Directories together.
    """

    def __init__(
        self, read: Callable[[str, Collection[Digest]], Awaitable[Mapping[Digest, bytes]]], max_entries: int
    ) -> None:
        self._read = read
        self._max_entries = max_entries
        self._entries = 0
        self._memo: OrderedDict[Digest, DirectoryReferences] = OrderedDict()

    async def get(self, instance_name: str, digests: Collection[Digest]) -> dict[Digest, DirectoryReferences]:
        """Return what Directories refer to; those that are not stored are left out.

        Raises:
            InvalidArgumentError: A blob is no well-formed Directory; names it.
            UnavailableError: The storage is away.
        """
        found: dict[Digest, DirectoryReferences] = {}
        wanted: list[Digest] = []
        for digest in digests:
            references = self._memo.get(digest)
            if references is None:
                wanted.append(digest)
            else:
                self._memo.move_to_end(digest)
                found[digest] = references
        for digest in wanted:
            if digest.size_bytes > MAX_DIRECTORY_BYTES:
                raise InvalidArgumentError(f"input directory {digest}", f"has more than {MAX_DIRECTORY_BYTES} bytes")
        if wanted:
            for digest, data in (await self._read(instance_name, wanted)).items():
                references = found[digest] = parse_references(digest, data)
                self._remember(digest, references)
        return found

    def _remember(self, digest: Digest, references: DirectoryReferences) -> None:
        if digest in self._memo:
            return
        self._memo[digest] = references
        self._entries += _size(references)
        while self._entries > self._max_entries and len(self._memo) > 1:
            _, oldest = self._memo.popitem(last=False)
            self._entries -= _size(oldest)


def parse_references(digest: Digest, data: bytes) -> DirectoryReferences:
    """Find what a Directory refers to.

    Raises:
        InvalidArgumentError: The bytes are no Directory from which a real one could be made; names it.
    """
    field = f"input directory {digest}"
    contents = read_directory_blob(data, field)
    function = digest.function
    contents.check(function, field)
    return DirectoryReferences(
        tuple({Digest(file.hash, file.size_bytes, function): None for file in contents.files}),
        tuple({Digest(node.hash, node.size_bytes, function): None for node in contents.directories}),
    )


def _size(references: DirectoryReferences) -> int:
    return 1 + len(references.files) + len(references.directories)
