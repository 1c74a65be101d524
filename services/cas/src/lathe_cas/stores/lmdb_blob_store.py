"""Blobs in LMDB: the adapter behind ``BlobStore``.

Nothing about blobs is remembered in the process. Several processes may serve one environment, and what LMDB says is
true at once for all of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import structlog
from typing_extensions import override

from lathe_cas.blob_store import BlobStore, StoreStatus, UnnamedUpload, Upload, UploadName, UploadStatus
from lathe_cas.compression.zstd_decoder import decode_whole
from lathe_cas.soon import Soon, settled
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, chunk_seed, read_chunks
from lathe_cas.stores.lmdb_compressed_reads import CompressedReads, StoredAnewError, StoredCompressedError
from lathe_cas.stores.lmdb_compressing_upload import LmdbCompressingUpload
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_operations import DropDamagedBlob, NewBlob, PutBlob, PutUpload, RemoveBlobs
from lathe_cas.stores.lmdb_shared_upload import SHARED_FROM_BYTES, SharedUploads
from lathe_cas.stores.lmdb_stored_form import MIN_COMPRESSED_BYTES, as_it_came, compressed_if_worth_it, plain
from lathe_cas.stores.lmdb_upload import LmdbUpload, begin_upload, find_upload, open_unnamed_lmdb_upload, upload_key_of
from lathe_cas.stores.lmdb_writer import log_failure
from lathe_cas.stores.lmdb_zstd_upload import LmdbZstdUpload
from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    LatheError,
    OutOfRangeError,
    ResourceExhaustedError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from lathe_cas.compression.zstd_encoder import ZstdEncoder
    from lathe_cas.stores.lmdb_storage import LmdbStorage

T = TypeVar("T")
R = TypeVar("R")

EMPTY_KEYS = frozenset(Digest.of(b"", function).key for function in DigestFunction)

SEGMENT_CHUNKS = 16
"""Chunks copied in one read transaction, 1,048,320 bytes: what a read holds in memory twice (one goes out, the next is
being fetched). Measured: larger segments are no faster through grpclib, smaller ones pay for more thread switches."""

INLINE_BYTES = 2 * records.CHUNK_BYTES
"""Up to this size work is done on the event loop: a thread switch costs more than copying or hashing 128 KiB."""

INLINE_BLOBS = 200
"""And up to so many blobs: each takes 10 us or more however small it is, so a full batch of tiny ones would keep all
other requests waiting for a second."""

_log = structlog.get_logger(__name__)


class LmdbBlobStore(BlobStore):
    """Blobs in one LMDB environment.

    Args:
        storage: The environment with its writer.
    """

    def __init__(self, storage: LmdbStorage) -> None:
        self.active_uploads: dict[bytes, LmdbUpload] = {}
        self._storage = storage
        self._environment = storage.environment
        self._loop = asyncio.get_running_loop()
        self._fresh = records.FreshRecords(storage.step(), storage.first_step_leased_on())
        self._compresses = storage.options.compress_stored
        self._shared_uploads = SharedUploads(
            storage, self._open_alone, self._upload_record, self.upload_status, self._has
        )
        self._drops: dict[bytes, asyncio.Future[bool]] = {}
        self._compressed_reads = CompressedReads(storage, self._loop, self._drop_damaged)

    @override
    def find_missing(self, wanted: Sequence[tuple[T, bytes, int]]) -> Soon[list[T]]:
        over: list[bytes] = []
        missing = self._find_missing(wanted, over)
        return self._find_renewed(wanted, missing, over) if over else missing

    async def _find_renewed(
        self, wanted: Sequence[tuple[T, bytes, int]], missing: list[T], over: list[bytes]
    ) -> list[T]:
        """Renew leases, and look again if something went before that could be done."""
        return missing if await self._storage.renew(over) else self._find_missing(wanted, [])

    def _find_missing(self, wanted: Sequence[tuple[T, bytes, int]], over: list[bytes]) -> list[T]:
        """Return the tokens of what is missing, and add to ``over`` the keys of what is there and to be renewed."""
        try:
            return self._look_up(wanted, over)
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            over.clear()
            return [item[0] for item in wanted if self._is_lost(item, over)]

    def _is_lost(self, item: tuple[T, bytes, int], over: list[bytes]) -> bool:
        """Look one blob up, apart from others; what LMDB cannot look up is not there."""
        try:
            return bool(self._look_up((item,), over))
        except PAGE_ERRORS:
            return True

    def _look_up(self, wanted: Sequence[tuple[T, bytes, int]], over: list[bytes]) -> list[T]:
        missing: list[T] = []
        database = self._environment.blobs
        fresh = self._fresh_records()
        with self._environment.env.begin() as txn:
            get = txn.get
            for token, key, size_bytes in wanted:
                value = get(key, b"", database)
                # The way of nearly all look-ups: the blob is there and was used a moment ago.
                if value[:12] != fresh[size_bytes] and not self._is_there(key, size_bytes, value, over):
                    missing.append(token)
        self._storage.writer.look_at_touches()
        return missing

    def _has(self, digest: Digest) -> bool:
        try:
            self._record(digest)
        except BlobNotFoundError:
            return False
        return True

    def _fresh_records(self) -> records.FreshRecords:
        step = self._storage.step()
        if self._fresh.step != step:
            self._fresh = records.FreshRecords(step, self._storage.first_step_leased_on())
        return self._fresh

    def _is_there(self, key: bytes, size_bytes: int, value: bytes, over: list[bytes]) -> bool:
        """Tell whether a record, or none, is that of a blob with this size, and note its use."""
        if value[records.BLOB_SIZE] != records.SIZE.pack(size_bytes):
            return not size_bytes and key in EMPTY_KEYS
        self._note_use(key, value[records.BLOB_STEP], over)
        return True

    def _note_use(self, key: bytes, step_bytes: bytes, over: list[bytes] | None) -> None:
        """Touch a blob if that is due; add its key to ``over`` instead where that would be too late."""
        fresh = self._fresh_records()
        if step_bytes < fresh.leased_on_bytes and over is not None:
            over.append(key)
        elif step_bytes < fresh.step_bytes:
            self._storage.touches.blobs.add(key)

    @override
    def find_sizes(self, keys: Sequence[bytes]) -> Soon[list[int | None]]:
        over: list[bytes] = []
        sizes = self._find_sizes(keys, over)
        return self._find_renewed_sizes(keys, sizes, over) if over else sizes

    async def _find_renewed_sizes(
        self, keys: Sequence[bytes], sizes: list[int | None], over: list[bytes]
    ) -> list[int | None]:
        return sizes if await self._storage.renew(over) else self._find_sizes(keys, [])

    def _find_sizes(self, keys: Sequence[bytes], over: list[bytes]) -> list[int | None]:
        try:
            return self._look_up_sizes(keys, over)
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            # What LMDB cannot look up is not there; others are looked up apart from it.
            if len(keys) == 1:
                return [None]
            over.clear()
            return [self._find_sizes([key], over)[0] for key in keys]

    def _look_up_sizes(self, keys: Sequence[bytes], over: list[bytes]) -> list[int | None]:
        sizes: list[int | None] = []
        with self._environment.env.begin() as txn:
            for key in keys:
                value = txn.get(key, b"", self._environment.blobs)
                size_bytes = int.from_bytes(value[records.BLOB_SIZE], "big")
                sizes.append(size_bytes if self._is_there(key, size_bytes, value, over) else None)
        self._storage.writer.look_at_touches()
        return sizes

    @override
    async def put_many(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        sizes_bytes = [len(data) for _, data in blobs]
        if _is_quick(sizes_bytes) and not self._may_compress(sizes_bytes):
            prepared = [_prepare(digest, data) for digest, data in blobs]
        else:
            prepared = await self._loop.run_in_executor(
                self._storage.executor, lambda: [self._prepare(digest, data) for digest, data in blobs]
            )
        return await self._put_prepared(prepared)

    @override
    async def put_many_zstd(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        if not blobs:
            return []
        prepared = await self._loop.run_in_executor(
            self._storage.executor, lambda: [_prepare_zstd(digest, data) for digest, data in blobs]
        )
        return await self._put_prepared(prepared)

    def _may_compress(self, sizes_bytes: Sequence[int]) -> bool:
        """Tell whether bytes are going to be compressed, which no loop should wait for."""
        return self._compresses and any(size_bytes >= MIN_COMPRESSED_BYTES for size_bytes in sizes_bytes)

    def _prepare(self, digest: Digest, data: memoryview) -> NewBlob | LatheError | None:
        return _prepare(digest, data, self._storage.encoder if self._compresses else None)

    async def _put_prepared(self, prepared: list[NewBlob | LatheError | None]) -> list[LatheError | None]:
        new = [PutBlob(item) for item in prepared if isinstance(item, NewBlob)]
        errors = iter(await self._storage.writer.submit_each(new) if new else [])
        return [next(errors) if isinstance(item, NewBlob) else item for item in prepared]

    @override
    async def read_many(self, digests: Sequence[Digest]) -> list[bytes | None]:
        return await self._read_each(digests, self._read_whole)

    async def _read_each(
        self, digests: Sequence[Digest], read: Callable[[Digest, list[bytes]], R | None]
    ) -> list[R | None]:
        """Read blobs on the loop or in a thread, and renew what leases are over, before anyone has the bytes."""
        over: list[bytes] = []
        if _is_quick([digest.size_bytes for digest in digests]):
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

    @override
    async def read_many_as_stored(self, digests: Sequence[Digest]) -> list[tuple[Compressor, bytes] | None]:
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

    @override
    def read_at_once(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> bytes | None:
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
        if not digest.is_empty and self._find_missing([(digest, digest.key, digest.size_bytes)], over):
            raise BlobNotFoundError(digest)
        if offset_bytes > digest.size_bytes:
            # Used all the same; nobody builds on it, so nobody has to wait for the renewal.
            self._storage.touches.blobs.update(over)
            raise OutOfRangeError(f"read_offset {offset_bytes} is past the end of blob {digest}")

    @override
    async def read(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
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

    @override
    async def read_zstd(self, digest: Digest, offset_bytes: int = 0) -> AsyncIterator[bytes]:
        record = None if offset_bytes or digest.is_empty else self._record(digest)
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

    def _record(self, digest: Digest) -> records.BlobRecord:
        with self._environment.read() as txn:
            try:
                value = txn.get(digest.key, b"", self._environment.blobs)
            except PAGE_ERRORS as error:
                self._storage.note_index_damage(error)
                raise BlobNotFoundError(digest) from error
        if value[records.BLOB_SIZE] != records.SIZE.pack(digest.size_bytes):
            raise BlobNotFoundError(digest)
        return records.BlobRecord.unpack(value)

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
            self._note_use(key, value[records.BLOB_STEP], over)
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

    @override
    async def open_upload(self, name: UploadName, *, restart: bool = False) -> Upload:
        limit_bytes = self._storage.options.policy.limit_bytes
        if records.blob_disk_bytes(name.digest.size_bytes) > limit_bytes:
            raise ResourceExhaustedError(
                f"blob {name.digest} does not fit into a store of {limit_bytes} bytes (setting max_size_bytes)"
            )
        if name.compressor is Compressor.ZSTD or name.digest.size_bytes < SHARED_FROM_BYTES:
            return await self._open_alone(name, restart=restart)
        return await self._shared_uploads.open(name, restart=restart)

    async def _open_alone(self, name: UploadName, *, restart: bool = False) -> LmdbUpload:
        return await begin_upload(self._new_upload(name), restart=restart)

    def _new_upload(self, name: UploadName) -> LmdbUpload:
        if name.compressor is Compressor.ZSTD:
            return LmdbZstdUpload(self._storage, self.active_uploads, name)
        # What was staged compressed goes on so, whatever the setting is now.
        if self._compresses or self._is_staged_compressed(name):
            return LmdbCompressingUpload(self._storage, self.active_uploads, name, self._storage.encoder)
        return LmdbUpload(self._storage, self.active_uploads, name)

    def _is_staged_compressed(self, name: UploadName) -> bool:
        record = self._upload_record(name)
        return record is not None and record.compression != records.COMPRESSION_NONE

    def _upload_record(self, name: UploadName) -> records.UploadRecord | None:
        return find_upload(self._storage, upload_key_of(name))

    @override
    async def open_unnamed_upload(self, function: DigestFunction, expected_hash: str | None = None) -> UnnamedUpload:
        return await open_unnamed_lmdb_upload(self._storage, self.active_uploads, function, expected_hash)

    @override
    async def put_upload(self, name: UploadName, data: memoryview) -> None:
        if max(len(data), name.digest.size_bytes) > INLINE_BYTES:
            await super().put_upload(name, data)
            return
        # Whether it is there already is for the writer to see. Each look into LMDB lets go of the GIL, and getting it
        # back from a writer at work takes longer than all else that there is to do here.
        if name.compressor is Compressor.ZSTD:
            blob = await self._loop.run_in_executor(self._storage.executor, _prepare_zstd, name.digest, data)
        elif self._may_compress([len(data)]):
            blob = await self._loop.run_in_executor(self._storage.executor, self._prepare, name.digest, data)
        else:
            blob = _prepare(name.digest, data)
        if isinstance(blob, LatheError):
            raise blob
        if blob is not None:
            await self._storage.writer.submit(PutUpload(name, blob))

    @override
    def put_at_once(self, name: UploadName, data: memoryview) -> asyncio.Future[None] | None:
        writer = self._storage.writer
        if len(data) > INLINE_BYTES or not writer.has_room:
            return None
        if name.compressor is not Compressor.IDENTITY or self._may_compress([len(data)]):
            return None
        blob = _prepare(name.digest, data)
        if isinstance(blob, LatheError):
            raise blob
        return None if blob is None else writer.submit_nowait(PutUpload(name, blob))

    @override
    async def upload_status(self, name: UploadName) -> UploadStatus:
        digest = name.digest
        if not await settled(self.find_missing([(digest, digest.key, digest.size_bytes)])):
            return UploadStatus(digest.size_bytes, True)
        record = None if name.compressor is Compressor.ZSTD else self._upload_record(name)
        return UploadStatus(0 if record is None else record.committed_bytes, False)

    @override
    async def remove(self, digests: Sequence[Digest]) -> int:
        wanted = [(digest.key, digest.size_bytes) for digest in digests]
        return await self._storage.writer.submit(RemoveBlobs(wanted))

    async def aclose(self) -> None:
        """Take the uploads away from streams that still hold them; what is staged stays."""
        await self._shared_uploads.aclose()
        for upload in list(self.active_uploads.values()):
            await upload.give_up()

    @override
    def status(self) -> StoreStatus:
        totals = self._environment.read_totals()
        committer = self._storage.committer
        report = committer.report
        return StoreStatus(
            blobs=totals.blobs,
            blob_bytes=totals.blob_bytes,
            stored_bytes=totals.kept_bytes,
            staged_bytes=totals.staged_bytes,
            garbage_bytes=totals.garbage_bytes,
            action_results=totals.action_results,
            limit_bytes=self._storage.options.policy.limit_bytes,
            file_bytes=self._environment.file_bytes(),
            oldest_evicted_age_seconds=report.last_evicted_age_seconds,
            least_evicted_age_seconds=report.least_evicted_age_seconds,
            counters={
                "written_blobs": report.written_blobs,
                "written_bytes": report.written_bytes,
                "compressed_blobs": report.compressed_blobs,
                "compression_saved_bytes": report.compression_saved_bytes,
                "evicted_blobs": report.evicted_blobs,
                "evicted_bytes": report.evicted_bytes,
                "evicted_action_results": report.evicted_action_results,
                "refused_writes": report.refused_writes,
                "refused_bytes": report.refused_bytes,
                "expired_uploads": report.expired_uploads,
                "damaged_blobs": self._storage.damaged_blobs,
                "damaged_action_results": self._storage.damaged_action_results,
                "commits": committer.commits,
                "failed_commits": committer.failed_commits,
            },
        )


def _is_quick(sizes_bytes: Sequence[int]) -> bool:
    """Tell whether blobs of these sizes are read or verified in less time than a thread switch is worth."""
    return len(sizes_bytes) <= INLINE_BLOBS and sum(sizes_bytes) <= INLINE_BYTES


def _prepare(digest: Digest, data: memoryview, encoder: ZstdEncoder | None = None) -> NewBlob | LatheError | None:
    """Verify a blob and cut it, compressed if there is an encoder; None for the empty blob, which needs no storing."""
    hasher = digest.function.new_hasher()
    hasher.update(data)
    got = hasher.hexdigest()
    if got != digest.hash or len(data) != digest.size_bytes:
        return DigestMismatchError(digest, f"{got}/{len(data)}")
    if not digest.size_bytes:
        return None
    key = digest.key
    chunks, compression = plain(data, key) if encoder is None else compressed_if_worth_it(data, key, encoder)
    return NewBlob(key, digest.size_bytes, chunks, compression)


def _prepare_zstd(digest: Digest, encoded: memoryview) -> NewBlob | LatheError | None:
    """Do the same with a blob that the client compressed; in a thread."""
    try:
        data = decode_whole(encoded, digest.size_bytes)
    except LatheError as error:
        return error
    got = Digest.of(data, digest.function)
    if got != digest:
        return DigestMismatchError(digest, str(got))
    key = digest.key
    return NewBlob(key, digest.size_bytes, *as_it_came(encoded, data, key)) if digest.size_bytes else None
