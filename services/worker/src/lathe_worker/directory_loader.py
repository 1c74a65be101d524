"""DirectoryLoader: the Directory messages of an input root, fetched and remembered.

Actions of one build share most of their directories, so the parsed form is kept, bounded by the number of nodes.

Spec: REAPI, Directory.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lathe_shared.digest import Digest
from lathe_shared.tree_wire import read_directory, read_directory_blob

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lathe_shared.tree_wire import DirectoryContents
    from lathe_worker.remote_blobs import RemoteBlobs

MAX_REMEMBERED_NODES = 500_000
"""Files, directories and symlinks in remembered directories: some 200 MB at 400 bytes each."""

MAX_PREFETCHED_DIRECTORIES = 2_000
"""While trees are no larger than this, one call for all of a new one is cheaper than one for each level. Of larger
trees most directories are remembered, and need not be sent again."""

_INLINE_PARSE_BYTES = 1 << 15
"""More than this is parsed in a thread: about a millisecond's work."""

_EMPTY_DIRECTORY = read_directory(b"")


@dataclass(slots=True)
class LoadedTree:
    """The directories that an input root is made of.

    Attributes:
        root: Digest of the root.
        directories: All that were found, by hash.
        missing: Those that the content addressable storage lacks.
    """

    root: Digest
    directories: dict[str, DirectoryContents] = field(default_factory=dict)
    missing: list[Digest] = field(default_factory=list)


class DirectoryLoader:
    """Fetches trees of directories.

    Args:
        blobs: Where they come from.
        max_remembered_nodes: Bound on what is remembered.
    """

    def __init__(self, blobs: RemoteBlobs, max_remembered_nodes: int = MAX_REMEMBERED_NODES) -> None:
        self._blobs = blobs
        self._max_remembered_nodes = max_remembered_nodes
        self._remembered: OrderedDict[Digest, DirectoryContents] = OrderedDict()
        self._remembered_nodes = 0
        self._last_tree_size = 0

    async def load(self, instance_name: str, root: Digest) -> LoadedTree:
        """Fetch a directory and all below it.

        Raises:
            InvalidArgumentError: One of them is malformed.
            LatheError: The content addressable storage cannot be reached.
        """
        tree = LoadedTree(root)
        prefetched: dict[Digest, DirectoryContents] = {}
        if root not in self._remembered and self._last_tree_size <= MAX_PREFETCHED_DIRECTORIES and not root.is_empty:
            prefetched = await self._prefetch(instance_name, root)
        level = {root.hash: root}
        while level:
            found = await self._load_level(instance_name, list(level.values()), prefetched)
            tree.missing += [digest for digest in level.values() if digest not in found]
            following: dict[str, Digest] = {}
            for digest, contents in found.items():
                tree.directories[digest.hash] = contents
            for contents in found.values():
                for child in contents.directories:
                    if child.hash not in tree.directories and child.hash not in following:
                        following[child.hash] = Digest(child.hash, child.size_bytes, root.function)
            level = following
        self._last_tree_size = len(tree.directories)
        return tree

    async def _prefetch(self, instance_name: str, root: Digest) -> dict[Digest, DirectoryContents]:
        """Fetch a whole tree in one call; what does not come with it is asked for by ``_load_level``."""
        messages = await self._blobs.read_tree(instance_name, root)
        known = {
            digest: message
            for message in messages
            if (digest := Digest.of(message, root.function)) not in self._remembered
        }
        return await self._parse(known)

    async def _load_level(
        self, instance_name: str, digests: Sequence[Digest], prefetched: Mapping[Digest, DirectoryContents]
    ) -> dict[Digest, DirectoryContents]:
        found: dict[Digest, DirectoryContents] = {}
        wanted: list[Digest] = []
        for digest in digests:
            contents = prefetched.get(digest) or self._remembered.get(digest)
            if contents is None and digest.is_empty:
                contents = _EMPTY_DIRECTORY
            if contents is None:
                wanted.append(digest)
                continue
            found[digest] = contents
            if digest in self._remembered:
                self._remembered.move_to_end(digest)
        if wanted:
            found |= await self._parse(await self._blobs.read_many(instance_name, wanted))
        return found

    async def _parse(self, messages: Mapping[Digest, bytes]) -> dict[Digest, DirectoryContents]:
        """Parse, check and remember Directory messages."""
        if sum(map(len, messages.values())) > _INLINE_PARSE_BYTES:
            parsed = await asyncio.to_thread(_parse, messages)
        else:
            parsed = _parse(messages)
        self._remember(parsed)
        return parsed

    def _remember(self, parsed: Mapping[Digest, DirectoryContents]) -> None:
        for digest, contents in parsed.items():
            if digest not in self._remembered:
                self._remembered[digest] = contents
                self._remembered_nodes += _node_count(contents)
        while self._remembered_nodes > self._max_remembered_nodes:
            _, contents = self._remembered.popitem(last=False)
            self._remembered_nodes -= _node_count(contents)


def _node_count(contents: DirectoryContents) -> int:
    return 1 + len(contents.files) + len(contents.directories) + len(contents.symlinks)


def _parse(data: Mapping[Digest, bytes]) -> dict[Digest, DirectoryContents]:
    parsed: dict[Digest, DirectoryContents] = {}
    for digest, content in data.items():
        field = f"directory {digest}"
        contents = read_directory_blob(content, field)
        contents.check(digest.function, field)
        parsed[digest] = contents
    return parsed
