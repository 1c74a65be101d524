"""Reads of blobs: small ones where they are asked for, large ones in threads, segment by segment, from any offset on.

Bytes are verified before anybody has them. What is found damaged is dropped before anybody is told that it is missing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import structlog

from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, chunk_seed, read_chunks
from lathe_cas.stores.lmdb_compressed_reads import CompressedReads, StoredAnewError, StoredCompressedError
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_operations import DropDamagedBlob
from lathe_cas.stores.lmdb_quick_work import INLINE_BYTES, is_quick
from lathe_cas.stores.lmdb_writer import log_failure
from lathe_shared.compressor import Compressor
from lathe_shared.errors import BlobNotFoundError, OutOfRangeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from lathe_cas.stores.lmdb_look_ups import LmdbLookUps
    from lathe_cas.stores.lmdb_storage import LmdbStorage
    from lathe_shared.digest import Digest

R = TypeVar("R")

SEGMENT_CHUNKS = 16
"""Chunks copied in one read transaction, 1,048,320 bytes: what a read holds in memory twice (one goes out, the next is
being fetched). Measured: larger segments are no faster through grpclib, smaller ones pay for more thread switches."""

_log = structlog.get_logger(__name__)


class LmdbReads:
    """Reads from one store; what ``BlobStore`` has under the same names.

    Args:
        storage: The environment with its writer.
        look_ups: Those of the same store.
    """

    def __init__(self, storage: LmdbStorage, look_ups: LmdbLookUps) -> None:
        self._storage = storage
        self._environment = storage.environment
        self._look_ups = look_ups
        self._loop = asyncio.get_running_loop()
        self._drops: dict[bytes, asyncio.Future[bool]] = {}
        self._compressed_reads = CompressedReads(storage, self._loop, self._drop_damaged)

    async def read_many(self, digests: Sequence[Digest]) -> list[bytes | None]:
        """Read blobs whole; see ``BlobStore``."""
        return await self._read_each(digests, self._read_whole)

    async def _read_each(
        self, digests: Sequence[Digest], read: Callable[[Digest, list[bytes]], R | None]
    ) -> list[R | None]:
        """Read blobs on the loop or in a thread, and renew what leases are over, before anyone has the bytes."""
        over: list[bytes] = []
        if is_quick([digest.size_bytes for digest in digests]):
            found = [read(digest, over) for digest in digests]
        else:
            found = await self._loop.run_in_executor(
                self._storage.executor, lambda: [read(digest, over) for digest in digests]
            )
        if None in found:
            await self._until_dropped(*[digest for digest, data in zip(digests, found, strict=True) if data is None])
        if over:
            await self._storage.renew(over)
        return found

    def _read_whole(self, digest: Digest, over: list[bytes]) -> bytes | None:
        found = self._read_as_stored(digest, over, decodes=True)
        return None if found is None else found[1]

    async def read_many_as_stored(self, digests: Sequence[Digest]) -> list[tuple[Compressor, bytes] | None]:
        """Read blobs in the form that they are stored in; see ``BlobStore``."""
        return await self._read_each(digests, self._read_as_stored)

    def _read_as_stored(
        self, digest: Digest, over: list[bytes], *, decodes: bool = False
    ) -> tuple[Compressor, bytes] | None:
        if digest.is_empty:
            return Compressor.IDENTITY, b""
        while True:
            try:
                return Compressor.IDENTITY, b"".join(self._read_segment(digest, 0, digest.size_bytes, over))
            except BlobNotFoundError:
                return None
            except StoredCompressedError as compressed:
                reads, record = self._compressed_reads, compressed.record
                try:
                    # A stream that was staged may be longer than the blob, and so than a batch that has room for it.
                    if decodes or record.stored_bytes > digest.size_bytes:
                        return Compressor.IDENTITY, reads.whole(digest, record)
                    return Compressor.ZSTD, b"".join(reads.stored(digest, record))
                except BlobNotFoundError:
                    return None
                except StoredAnewError:
                    continue

    def read_at_once(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> bytes | None:
        """Read a small part of a blob without waiting, if that can be done; see ``BlobStore``."""
        over: list[bytes] = []
        try:
            data = self._read_now(digest, offset_bytes, limit_bytes, over)
        except BlobNotFoundError as error:
            if isinstance(error.__cause__, ChunkDamagedError):
                return None  # nobody is told before it is dropped
            raise
        return None if over else data

    def _read_now(self, digest: Digest, offset_bytes: int, limit_bytes: int, over: list[bytes]) -> bytes | None:
        size_bytes = digest.size_bytes
        end = min(size_bytes, offset_bytes + limit_bytes) if limit_bytes else size_bytes
        if end - offset_bytes > INLINE_BYTES:
            return None
        if end <= offset_bytes:
            # Nothing to fetch; whether the blob is there is to be told all the same.
            self._check_readable(digest, offset_bytes, over)
            return b""
        try:
            pieces = self._read_segment(digest, offset_bytes, end, over)
        except StoredCompressedError as compressed:
            return self._decode_at_once(digest, compressed.record, offset_bytes, end)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _decode_at_once(self, digest: Digest, record: records.BlobRecord, start: int, end: int) -> bytes | None:
        if digest.size_bytes > INLINE_BYTES or record.stored_bytes > INLINE_BYTES:
            return None
        data = self._read_whole(digest, [])
        # If it turns out to be damaged, whoever waits until it is dropped tells.
        return None if data is None else data[start:end]

    def _check_readable(self, digest: Digest, offset_bytes: int, over: list[bytes]) -> None:
        if not digest.is_empty and self._look_ups.missing_now([(digest, digest.key, digest.size_bytes)], over):
            raise BlobNotFoundError(digest)
        if offset_bytes > digest.size_bytes:
            # Used all the same; nobody builds on it, so nobody has to wait for the renewal.
            self._storage.touches.blobs.update(over)
            raise OutOfRangeError(f"read_offset {offset_bytes} is past the end of blob {digest}")

    async def read(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
        """Read a blob from an offset on; see ``BlobStore``."""
        over: list[bytes] = []
        try:
            data = self._read_now(digest, offset_bytes, limit_bytes, over)
            if data is None:
                self._check_readable(digest, offset_bytes, over)
        except BlobNotFoundError:
            await self._until_dropped(digest)
            raise
        if over:
            await self._storage.renew(over)
        if data is not None:
            if data:
                yield data
            return
        end = min(digest.size_bytes, offset_bytes + limit_bytes) if limit_bytes else digest.size_bytes
        position = offset_bytes
        fetched = self._fetch(digest, position, end)
        try:
            while position < end:
                data = await fetched
                position += len(data)
                if position < end:
                    fetched = self._fetch(digest, position, end)
                yield data
        except StoredCompressedError as compressed:
            async for data in self._read_compressed(digest, compressed.record, position, end):
                yield data
        except BlobNotFoundError:
            await self._until_dropped(digest)
            raise
        finally:
            fetched.cancel()

    async def _read_compressed(
        self, digest: Digest, record: records.BlobRecord, position: int, end: int
    ) -> AsyncIterator[bytes]:
        try:
            async for data in self._compressed_reads.decoded(digest, record, position, end):
                position += len(data)
                yield data
        except StoredAnewError:
            async for data in self.read(digest, position, end - position):
                yield data
        except BlobNotFoundError:
            await self._until_dropped(digest)
            raise

    async def read_zstd(self, digest: Digest, offset_bytes: int = 0) -> AsyncIterator[bytes]:
        """Read a blob as a zstd stream; see ``BlobStore``."""
        record = None if offset_bytes or digest.is_empty else self._look_ups.record(digest)
        if record is not None and record.compression:
            if record.step < self._storage.first_step_leased_on():
                await self._storage.renew([digest.key])
            try:
                async for stored in self._compressed_reads.stored_in_thread(digest, record):
                    yield stored
            except BlobNotFoundError:
                await self._until_dropped(digest)
                raise
            return
        is_empty = True
        async for data in self.read(digest, offset_bytes):
            is_empty = False
            yield await self._loop.run_in_executor(self._storage.executor, self._storage.encoder.encode, data)
        if is_empty:
            yield self._storage.encoder.encode(b"")

    def _fetch(self, digest: Digest, start: int, end: int) -> asyncio.Future[bytes]:
        """Begin to read the next segment in a thread; it ends with a chunk."""
        stop = min(end, (start // records.CHUNK_BYTES + SEGMENT_CHUNKS) * records.CHUNK_BYTES)
        return self._loop.run_in_executor(
            self._storage.executor, lambda: b"".join(self._read_segment(digest, start, stop))
        )

    def _read_segment(self, digest: Digest, start: int, stop: int, over: list[bytes] | None = None) -> list[bytes]:
        """Copy ``[start, stop)`` of a blob, verified, from one snapshot; in any thread.

        Its key is added to ``over`` if the lease has to be renewed before anyone has the bytes.

        The record is looked up again each time: between two segments the blob may have been evicted, or evicted and
        stored again under another storage id.
        """
        first = start // records.CHUNK_BYTES
        count = -(-stop // records.CHUNK_BYTES) - first
        key = digest.key
        environment = self._environment
        with environment.env.begin() as txn:
            try:
                value = txn.get(key, b"", environment.blobs)
            except PAGE_ERRORS as error:
                self._storage.note_index_damage(error)
                raise BlobNotFoundError(digest) from error
            if value[records.BLOB_SIZE] != records.SIZE.pack(digest.size_bytes):
                raise BlobNotFoundError(digest)
            self._look_ups.note_use(key, value[records.BLOB_STEP], over)
            record = records.BlobRecord.unpack(value)
            if record.compression:
                raise StoredCompressedError(record)
            try:
                pieces = read_chunks(txn, environment.chunks, record.storage_id, chunk_seed(key), first, count)
            except ChunkDamagedError as error:
                self._loop.call_soon_threadsafe(self._drop_damaged, digest, error)
                raise BlobNotFoundError(digest) from error
        skip = start - first * records.CHUNK_BYTES
        surplus = min((first + count) * records.CHUNK_BYTES, digest.size_bytes) - stop
        if surplus:
            pieces[-1] = pieces[-1][: len(pieces[-1]) - surplus]
        if skip:
            pieces[0] = pieces[0][skip:]
        return pieces

    def _drop_damaged(self, digest: Digest, error: ChunkDamagedError) -> None:
        key = digest.key
        if key in self._drops:
            return
        self._storage.damaged_blobs += 1
        _log.error("blob_damaged", digest=str(digest), error=str(error))
        drop = self._storage.writer.submit_nowait(DropDamagedBlob(key, error.storage_id, error.unreadable))
        drop.add_done_callback(log_failure)
        self._drops[key] = drop
        drop.add_done_callback(lambda _: self._drops.pop(key))

    async def _until_dropped(self, *digests: Digest) -> None:
        """Wait until blobs are dropped that were just found damaged, if they were; or until that has failed.

        Who is told that a blob is not there may upload it at once. As long as its record is there, that would end with
        the answer that the blob is there already; and then it would be dropped.
        """
        # What was found by now, in whatever thread, has been reported when this goes on.
        await asyncio.sleep(0)
        drops = [self._drops[digest.key] for digest in digests if digest.key in self._drops]
        if drops:
            await asyncio.wait(drops)
