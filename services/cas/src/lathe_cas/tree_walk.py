"""The walk behind GetTree: every Directory below a root once, breadth first, in pages.

Breadth first with each Directory at its first place makes the order a function of the root alone, so that a position in
it can serve as a page token: whoever comes with one gets what follows, however long ago it was given.

Spec: REAPI, ContentAddressableStorage.GetTree.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import BlobNotFoundError, InvalidArgumentError, ResourceExhaustedError
from lathe_shared.tree_wire import read_directory_blob
from lathe_shared.wire import bytes_field, message_field

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lathe_cas.blob_store import BlobStore

MAX_PAGE_BYTES = 1 << 20
"""Bytes of Directories in one response, unless a single one is larger; clients accept 4 MiB by default."""

MAX_PAGE_DIRECTORIES = 10_000

MAX_DIRECTORY_BYTES = 64 << 20
"""Largest blob that is read as a Directory: some 600,000 files."""

INLINE_PARSE_BYTES = 256 << 10
"""Up to this size messages are taken apart on the event loop, in some 30 ms. Large ones would take it for seconds."""

MAX_TREE_DIRECTORIES = 1 << 20
"""Distinct Directories of one tree: more than the largest source trees have by far. Each takes 110 to 140 bytes as long
as the walk lasts, so this bounds memory, too."""

_MAX_READ_DIRECTORIES = 256


class TreeWalk:
    """One GetTree.

    Args:
        store: Where the Directories are.
        root: The root's digest.
        page_size: Directories in one response, at most; zero or less leaves it to this module.
        page_token: Where to begin, from an earlier response; empty for the root.

    Raises:
        InvalidArgumentError: The token is none, or belongs to another root; the root is too large for a Directory.
    """

    def __init__(self, store: BlobStore, root: Digest, page_size: int = 0, page_token: str = "") -> None:
        if root.size_bytes > MAX_DIRECTORY_BYTES:
            raise InvalidArgumentError("root_digest", f"{root.size_bytes} bytes are too many for a Directory")
        self._store = store
        self._root = root
        self._page_directories = min(page_size, MAX_PAGE_DIRECTORIES) if page_size > 0 else MAX_PAGE_DIRECTORIES
        self._start = self._parse_token(page_token) if page_token else 0

    async def pages(self) -> AsyncIterator[bytes]:
        """Yield serialized GetTreeResponses; a Directory below the root that is missing is left out.

        Raises:
            BlobNotFoundError: The root is not there.
            InvalidArgumentError: A blob that should be a Directory is none.
            ResourceExhaustedError: There are more than MAX_TREE_DIRECTORIES.
        """
        page: list[bytes] = []
        page_bytes = 0
        async for position, data in self._directories():
            full = len(page) >= self._page_directories or page_bytes + len(data) > MAX_PAGE_BYTES
            if page and full:
                yield b"".join((*page, bytes_field(2, self._format_token(position))))
                page, page_bytes = [], 0
            page.append(message_field(1, data))
            page_bytes += len(data)
        yield b"".join(page)

    async def _directories(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield position and bytes of each Directory that is there, from the start position on."""
        queue = _DirectoryQueue(self._root)
        position = 0
        while queue:
            level = queue.take_together()
            for digest, data in zip(level, await self._store.read_many(level), strict=True):
                if data is None and position == 0:
                    raise BlobNotFoundError(digest)
                if data is not None:
                    if len(data) <= INLINE_PARSE_BYTES:
                        self._add_children(digest, data, queue)
                    else:
                        await asyncio.to_thread(self._add_children, digest, data, queue)
                    if position >= self._start:
                        yield position, data
                position += 1

    def _add_children(self, digest: Digest, data: bytes, queue: _DirectoryQueue) -> None:
        field = f"directory {digest}"
        for entry in read_directory_blob(data, field).directories:
            child = Digest.parse(entry.hash, entry.size_bytes, digest.function, field)
            if child.size_bytes > MAX_DIRECTORY_BYTES:
                raise InvalidArgumentError(
                    field, f"{entry.name!r} has {child.size_bytes} bytes, too many for a Directory"
                )
            queue.add(child)

    def _format_token(self, position: int) -> bytes:
        return f"{self._root.hash[:16]}-{position}".encode()

    def _parse_token(self, token: str) -> int:
        prefix, _, position = token.partition("-")
        if prefix != self._root.hash[:16] or not (position.isascii() and position.isdigit() and len(position) < 12):
            raise InvalidArgumentError("page_token", "is not one that this service gave for this root_digest")
        return int(position)


class _DirectoryQueue:
    """Directories to be read, each once; as small as a queue of a million of them should be.

    Args:
        root: The first one, whose function is that of all.
    """

    def __init__(self, root: Digest) -> None:
        self._function: DigestFunction = root.function
        self._seen: set[bytes] = set()
        self._keys: deque[bytes] = deque()
        self._sizes_bytes: array[int] = array("I")
        self._taken = 0
        self.add(root)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def add(self, digest: Digest) -> None:
        """Add a Directory, unless it was there before.

        Raises:
            ResourceExhaustedError: That is one too many.
        """
        key = digest.key
        if key in self._seen:
            return
        if len(self._seen) >= MAX_TREE_DIRECTORIES:
            raise ResourceExhaustedError(f"the tree has more than {MAX_TREE_DIRECTORIES} distinct directories")
        self._seen.add(key)
        self._keys.append(key)
        self._sizes_bytes.append(digest.size_bytes)

    def take_together(self) -> list[Digest]:
        """Remove and return the next Directories to read together."""
        keys = islice(self._keys, _MAX_READ_DIRECTORIES)
        sizes_bytes = self._sizes_bytes[self._taken : self._taken + _MAX_READ_DIRECTORIES]
        batch = read_together(
            [
                Digest(key[1:].hex(), size_bytes, self._function)
                for key, size_bytes in zip(keys, sizes_bytes, strict=True)
            ]
        )
        for _ in batch:
            self._keys.popleft()
        self._taken += len(batch)
        return batch


def read_together(queue: Sequence[Digest], position: int = 0) -> list[Digest]:
    """Return the next Directories to read together: bounded in number and, unless it is a single one, in bytes."""
    batch: list[Digest] = []
    size_bytes = 0
    for digest in queue[position : position + _MAX_READ_DIRECTORIES]:
        size_bytes += digest.size_bytes
        if batch and size_bytes > MAX_PAGE_BYTES:
            break
        batch.append(digest)
    return batch
