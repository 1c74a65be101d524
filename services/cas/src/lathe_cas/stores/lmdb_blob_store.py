"""Blobs in LMDB: the adapter behind ``BlobStore``, and how blobs are put."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import override

from lathe_cas.blob_store import BlobStore, StoreStatus, UnnamedUpload, Upload, UploadName, UploadStatus
from lathe_cas.compression.zstd_decoder import decode_whole
from lathe_cas.soon import Soon, settled
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_compressing_upload import LmdbCompressingUpload
from lathe_cas.stores.lmdb_look_ups import LmdbLookUps
from lathe_cas.stores.lmdb_operations import NewBlob, PutBlob, PutUpload, RemoveBlobs
from lathe_cas.stores.lmdb_quick_work import INLINE_BYTES, is_quick
from lathe_cas.stores.lmdb_reads import LmdbReads
from lathe_cas.stores.lmdb_shared_upload import SHARED_FROM_BYTES, SharedUploads
from lathe_cas.stores.lmdb_stored_form import MIN_COMPRESSED_BYTES, as_it_came, compressed_if_worth_it, plain
from lathe_cas.stores.lmdb_upload import LmdbUpload, begin_upload, find_upload, open_unnamed_lmdb_upload, upload_key_of
from lathe_cas.stores.lmdb_zstd_upload import LmdbZstdUpload
from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import (
    DigestMismatchError,
    LatheError,
    ResourceExhaustedError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lathe_cas.compression.zstd_encoder import ZstdEncoder
    from lathe_cas.stores.lmdb_storage import LmdbStorage

T = TypeVar("T")


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
        self._look_ups = LmdbLookUps(storage)
        self._reads = LmdbReads(storage, self._look_ups)
        self._compresses = storage.options.compress_stored
        self._shared_uploads = SharedUploads(
            storage, self._open_alone, self._upload_record, self.upload_status, self._look_ups.has
        )

    @override
    def find_missing(self, wanted: Sequence[tuple[T, bytes, int]]) -> Soon[list[T]]:
        return self._look_ups.find_missing(wanted)

    @override
    def find_sizes(self, keys: Sequence[bytes]) -> Soon[list[int | None]]:
        return self._look_ups.find_sizes(keys)

    @override
    async def read_many(self, digests: Sequence[Digest]) -> list[bytes | None]:
        return await self._reads.read_many(digests)

    @override
    async def read_many_as_stored(self, digests: Sequence[Digest]) -> list[tuple[Compressor, bytes] | None]:
        return await self._reads.read_many_as_stored(digests)

    @override
    def read_at_once(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> bytes | None:
        return self._reads.read_at_once(digest, offset_bytes, limit_bytes)

    @override
    def read(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
        return self._reads.read(digest, offset_bytes, limit_bytes)

    @override
    def read_zstd(self, digest: Digest, offset_bytes: int = 0) -> AsyncIterator[bytes]:
        return self._reads.read_zstd(digest, offset_bytes)

    @override
    async def put_many(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        sizes_bytes = [len(data) for _, data in blobs]
        if is_quick(sizes_bytes) and not self._may_compress(sizes_bytes):
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
