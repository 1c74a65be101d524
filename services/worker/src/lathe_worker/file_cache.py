"""FileCache: input blobs on the worker's disk, ready to be linked into input roots.

A blob is kept in up to two files, executable and not, since a mode belongs to a file and all links share it. Files
belong to the worker and are read-only; an action under another uid can neither write nor chmod them.

What is in the cache is known from memory; at start one scan of the directory fills that in. A file is valid if its size
is the one in its name: it is written before anyone hears of it, and file systems that order data before metadata keep
that so over a crash.

Spec: REAPI, FileNode.is_executable.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_shared.errors import BlobNotFoundError, LatheError, MissingInputsError
from lathe_worker.cache_files import copy_contents, digest_of, mode, new_file, take_stock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterable, Sequence
    from pathlib import Path

    from lathe_worker.remote_blobs import RemoteBlobs

SMALL_BLOB_BYTES = 256 << 10
"""Larger blobs are streamed to disk; up to this size the client reads many in one answer (MAX_BATCHED_BLOB_BYTES)."""

BATCH_BYTES = 3 << 20
"""Blobs per answer: below the usual limit of 4 MiB on gRPC messages, with room for digests and statuses."""

BATCH_COUNT = 2_000
"""Blobs per answer, since empty ones would otherwise come without bound."""

CONCURRENT_DOWNLOADS = 8
"""Batches and streams under way at once: enough to hide round trips, too few to starve other actions."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One file. Those who hold it hold this object: a file that comes after it under the same name is another one.

    Attributes:
        size_bytes: Its size.
        holders: How many hold it.
        known: Whether it is in the index; not so any more if it was forgotten while somebody held it.
    """

    size_bytes: int
    holders: int
    known: bool = True


@dataclass(slots=True, eq=False)
class _Download:
    """One file on its way.

    Attributes:
        name: Its name in the cache.
        done: Gets None or the error, as a value: nobody may be left to fetch an exception.
        holders: How many wait for it and will hold it.
        entry: What it has become, held by all of them.
    """

    name: str
    done: asyncio.Future[Exception | None]
    holders: int = 0
    entry: _Entry | None = None


@dataclass(slots=True)
class CacheCounters:
    """What the cache has done since start."""

    hits: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    evictions: int = 0


class FileCache:
    """Keeps input blobs as files, bounded in size, least recently used out first.

    Its index may be used from any thread; ``hold`` belongs to the event loop.

    Args:
        directory: Where the files are; made if absent. One worker only.
        max_size_bytes: Bound on the sum of sizes. Held files are never evicted, so input roots of running actions may
            exceed it for the time being.
        blobs: Where missing blobs come from.
    """

    def __init__(self, directory: Path, max_size_bytes: int, blobs: RemoteBlobs) -> None:
        self._directory = directory
        self._prefix = f"{directory}/"
        self._max_size_bytes = max_size_bytes
        self._blobs = blobs
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._downloads: dict[str, _Download] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(CONCURRENT_DOWNLOADS)
        self.size_bytes = 0
        self._held_bytes = 0
        self.counters = CacheCounters()

    def open(self) -> None:
        """Take stock of what an earlier run left; blocking, for start-up."""
        found: list[tuple[float, str, int]] = []
        for index in range(256):
            folder = self._directory / f"{index:02x}"
            folder.mkdir(parents=True, exist_ok=True)
            with os.scandir(folder) as entries:
                found.extend(known for entry in entries if (known := take_stock(entry)) is not None)
        with self._lock:
            for _, name, size_bytes in sorted(found):
                self._entries[name] = _Entry(size_bytes, 0)
                self.size_bytes += size_bytes
            self._evict()

    async def close(self) -> None:
        """Stop all downloads."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __len__(self) -> int:
        return len(self._entries)

    def path(self, name: str) -> str:
        """Return where a held file is."""
        return f"{self._prefix}{name[:2]}/{name}"

    def forget(self, name: str) -> None:
        """Drop a file that turned out to be gone or damaged."""
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is not None:
                entry.known = False
                self.size_bytes -= entry.size_bytes
                self._held_bytes -= entry.size_bytes if entry.holders else 0
                self._unlink(name)

    @contextlib.asynccontextmanager
    async def hold(self, instance_name: str, names: Collection[str]) -> AsyncIterator[None]:
        """Have files at hand for the time of a ``with`` block, downloading what is missing.

        A file that several actions want at once is downloaded once.

        Args:
            instance_name: For the downloads.
            names: Distinct names made by ``file_name``.

        Cancellation: downloads that have begun go on; their files are for the next action.

        Raises:
            MissingInputsError: The content addressable storage lacks some; all of them are named.
            LatheError: It cannot be reached.
            OSError: The disk is full or broken.
        """
        held, awaited = self._hold_present(instance_name, names)
        try:
            errors = []
            if awaited:
                await asyncio.wait([download.done for download in awaited])
                errors = [error for download in awaited if (error := download.done.result()) is not None]
            if errors:
                raise _combined(errors)
            yield
        finally:
            self._release(held, awaited)

    def _hold_present(self, instance_name: str, names: Collection[str]) -> tuple[list[_Entry], list[_Download]]:
        """Hold what is there; join or begin downloads of the rest."""
        held: list[_Entry] = []
        awaited: list[_Download] = []
        begun: list[_Download] = []
        loop = asyncio.get_running_loop()
        with self._lock:
            for name in names:
                entry = self._entries.get(name)
                if entry is not None:
                    self._add_holder(name, entry)
                    held.append(entry)
                    continue
                download = self._downloads.get(name)
                if download is None:
                    download = self._downloads[name] = _Download(name, loop.create_future())
                    begun.append(download)
                download.holders += 1
                awaited.append(download)
        self.counters.hits += len(held)
        for group in _grouped(begun):
            task = loop.create_task(self._fetch(instance_name, group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return held, awaited

    def _add_holder(self, name: str, entry: _Entry) -> None:
        if entry.holders == 0:
            self._held_bytes += entry.size_bytes
        entry.holders += 1
        self._entries.move_to_end(name)

    def _release(self, held: Iterable[_Entry], awaited: Iterable[_Download]) -> None:
        with self._lock:
            stored = []
            for download in awaited:
                if download.entry is not None:
                    stored.append(download.entry)
                else:
                    download.holders -= 1
            for entry in (*held, *stored):
                entry.holders -= 1
                if entry.holders == 0 and entry.known:
                    self._held_bytes -= entry.size_bytes
            self._evict()

    async def _fetch(self, instance_name: str, group: Sequence[_Download]) -> None:
        """Bring one group, which is several small files or one large, and tell all who wait."""
        outcome: dict[str, Exception] = {}
        try:
            async with self._slots:
                if digest_of(group[0].name).size_bytes <= SMALL_BLOB_BYTES:
                    outcome = await self._fetch_small(instance_name, group)
                else:
                    outcome = await self._fetch_large(instance_name, group)
        except (LatheError, OSError) as error:
            outcome = {download.name: error for download in group if download.entry is None}
        finally:
            with self._lock:
                for download in group:
                    self._downloads.pop(download.name, None)
            for download in group:
                unfinished = None if download.entry is not None else ConnectionError("the download was broken off")
                download.done.set_result(outcome.get(download.name, unfinished))

    async def _fetch_small(self, instance_name: str, group: Sequence[_Download]) -> dict[str, Exception]:
        digests = list(dict.fromkeys(digest_of(download.name) for download in group))
        contents = await self._blobs.read_many(instance_name, digests)
        found = [(download, contents.get(digest_of(download.name))) for download in group]
        await asyncio.to_thread(self._store_small, [(download, data) for download, data in found if data is not None])
        return {download.name: BlobNotFoundError(digest_of(download.name)) for download, data in found if data is None}

    def _store_small(self, files: Sequence[tuple[_Download, bytes]]) -> None:
        for download, data in files:
            path = self.path(download.name)
            with new_file(path, download.name) as fd:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            self._add(download, len(data))

    async def _fetch_large(self, instance_name: str, group: Sequence[_Download]) -> dict[str, Exception]:
        """Stream one blob to disk, and copy it if both of its forms are wanted."""
        first = group[0]
        digest = digest_of(first.name)
        target = self._directory / first.name[:2] / first.name
        target.unlink(missing_ok=True)
        try:
            await self._blobs.read_to_file(instance_name, digest, target)
        except BlobNotFoundError as error:
            target.unlink(missing_ok=True)
            return {download.name: error for download in group}
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        await asyncio.to_thread(self._store_large, group, digest.size_bytes)
        return {}

    def _store_large(self, group: Sequence[_Download], size_bytes: int) -> None:
        source = self.path(group[0].name)
        os.chmod(source, mode(group[0].name))
        for download in group[1:]:
            with new_file(self.path(download.name), download.name) as fd, open(source, "rb") as data:
                copy_contents(data.fileno(), fd)
        for download in group:
            self._add(download, size_bytes)

    def _add(self, download: _Download, size_bytes: int) -> None:
        """Make a written file known, held by all who wait for it."""
        with self._lock:
            download.entry = self._entries[download.name] = _Entry(size_bytes, download.holders)
            self.size_bytes += size_bytes
            self._held_bytes += size_bytes if download.holders else 0
            self.counters.downloads += 1
            self.counters.downloaded_bytes += size_bytes
            self._evict()

    def _evict(self) -> None:
        while self.size_bytes > self._max_size_bytes and self.size_bytes > self._held_bytes:
            name, entry = self._entries.popitem(last=False)
            if entry.holders:
                self._entries[name] = entry  # in use, so recently used
                continue
            self.size_bytes -= entry.size_bytes
            self.counters.evictions += 1
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(name))


def _grouped(downloads: Sequence[_Download]) -> list[list[_Download]]:
    """Put small files together into batches, and the forms of one large blob."""
    groups: list[list[_Download]] = []
    large: dict[str, list[_Download]] = {}
    batch: list[_Download] = []
    batch_bytes = 0
    for download in downloads:
        size_bytes = digest_of(download.name).size_bytes
        if size_bytes > SMALL_BLOB_BYTES:
            large.setdefault(download.name.removesuffix("x"), []).append(download)
            continue
        if batch_bytes + size_bytes > BATCH_BYTES or len(batch) == BATCH_COUNT:
            groups.append(batch)
            batch, batch_bytes = [], 0
        batch.append(download)
        batch_bytes += size_bytes
    return [*groups, *([batch] if batch else []), *large.values()]


def _combined(errors: Sequence[Exception]) -> Exception:
    """Return one error for several: all missing blobs together, unless something worse happened."""
    worse = [error for error in errors if not isinstance(error, BlobNotFoundError)]
    if worse:
        return worse[0]
    return MissingInputsError(dict.fromkeys(error.digest for error in errors if isinstance(error, BlobNotFoundError)))
