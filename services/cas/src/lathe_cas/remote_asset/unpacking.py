"""Archives into the store: their files as blobs, their directories as Directory messages."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from lathe_cas.remote_asset.archive import ArchiveError, ArchiveReader
from lathe_cas.remote_asset.directory_tree import ConflictingPathError, DirectoryTree
from lathe_shared.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lathe_cas.blob_store import BlobStore
    from lathe_cas.remote_asset.archive import ArchiveEntry, ArchiveLimits
    from lathe_cas.remote_asset.spool import Spool
    from lathe_shared.digest import Digest, DigestFunction

_GROUP_BYTES = 4 << 20
_GROUP_ENTRIES = 500
"""What is read in one visit to a thread and stored together."""

_threads = ThreadPoolExecutor(2, "unpack")
"""Not those that everybody uses: a large file in an archive keeps one for minutes, and what others want takes
milliseconds. None is started before there is an archive."""

T = TypeVar("T")


async def unpack(
    archive: Spool,
    blobs: BlobStore,
    function: DigestFunction,
    limits: ArchiveLimits,
    subdirectory: Sequence[str],
    spool_directory: Path,
) -> Digest:
    """Store what an archive holds; return the digest of its root Directory.

    Args:
        archive: The archive.
        blobs: Where to.
        function: Makes the digests.
        limits: What it may hold.
        subdirectory: The part that is wanted; empty means all.
        spool_directory: Where large files wait.

    Raises:
        ArchiveError: It cannot be read, or holds what is refused.
        NotFoundError: It has no such part.
        ResourceExhaustedError: It holds too much, or no room is left.
    """
    archive.file.seek(0)
    entries = ArchiveReader(archive.file, function, limits, spool_directory).entries()
    root = DirectoryTree()
    while group := await _in_thread(lambda: _next_group(entries)):
        try:
            await _store([entry for entry in group if _is_below(entry.path, subdirectory)], blobs)
            for entry in group:
                _add(root, entry)
        finally:
            for entry in group:
                if entry.spool is not None:
                    entry.spool.file.close()
    wanted = root.find(subdirectory)
    if wanted is None:
        raise NotFoundError(f"the archive has no directory {'/'.join(subdirectory)!r}")
    messages = await _in_thread(lambda: wanted.messages(function))
    await _put(blobs, messages)
    return messages[-1][0]


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


def _next_group(entries: Iterator[ArchiveEntry]) -> list[ArchiveEntry]:
    group: list[ArchiveEntry] = []
    size_bytes = 0
    try:
        for entry in entries:
            group.append(entry)
            size_bytes += len(entry.data or b"")
            if entry.spool is not None or size_bytes >= _GROUP_BYTES or len(group) == _GROUP_ENTRIES:
                break
    except BaseException:
        for entry in group:
            if entry.spool is not None:
                entry.spool.file.close()
        raise
    return group


async def _store(entries: Sequence[ArchiveEntry], blobs: BlobStore) -> None:
    await _put(blobs, [(entry.digest, entry.data) for entry in entries if entry.digest and entry.data is not None])
    for entry in entries:
        if entry.spool is not None and entry.digest is not None:
            await entry.spool.store(blobs, entry.digest)


async def _put(blobs: BlobStore, items: Sequence[tuple[Digest, bytes]]) -> None:
    for start in range(0, len(items), _GROUP_ENTRIES):
        group = items[start : start + _GROUP_ENTRIES]
        for error in await blobs.put_many([(digest, memoryview(data)) for digest, data in group]):
            if error is not None:
                raise error


def _add(root: DirectoryTree, entry: ArchiveEntry) -> None:
    try:
        if entry.digest is None:
            root.add_directory(entry.path)
        else:
            root.add_file(entry.path, entry.digest, is_executable=entry.is_executable)
    except ConflictingPathError as error:
        raise ArchiveError(f"the archive is ambiguous: {error}") from None


def _is_below(path: Sequence[str], subdirectory: Sequence[str]) -> bool:
    return tuple(path[: len(subdirectory)]) == tuple(subdirectory)
