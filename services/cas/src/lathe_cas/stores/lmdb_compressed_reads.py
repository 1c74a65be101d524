"""Reads of blobs that are stored compressed: as they are stored, and decoded from any offset on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_cas.compression.zstd_decoder import ZstdDecoder, decode_whole
from lathe_cas.compression.zstd_framing import MalformedZstdError
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, blob_seed, read_chunks
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_shared.errors import BlobNotFoundError, UnavailableError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator

    from lathe_cas.stores.lmdb_storage import LmdbStorage
    from lathe_shared.digest import Digest

_SEGMENT_CHUNKS = 16
"""Chunks copied in one read transaction, as reads of plain blobs do."""


class StoredCompressedError(Exception):
    """A blob turned out to be stored compressed; whoever reads it as it is has to decode it.

    Args:
        record: The blob's record.
    """

    def __init__(self, record: records.BlobRecord) -> None:
        super().__init__(f"storage id {record.storage_id} holds a compressed blob")
        self.record = record


class StoredAnewError(UnavailableError):
    """What a read began with is gone, and what is there now may be another stream of the same blob."""


class CompressedReads:
    """Reads of one store's compressed blobs, each from the record that it had when the read began.

    All of them raise BlobNotFoundError if the blob was evicted meanwhile or is found damaged, which is reported, and
    StoredAnewError if it was evicted and stored anew.

    Args:
        storage: Where the blobs are.
        loop: The event loop.
        report_damage: Told on the loop of a blob whose bytes are not those that were written.
    """

    def __init__(
        self,
        storage: LmdbStorage,
        loop: asyncio.AbstractEventLoop,
        report_damage: Callable[[Digest, ChunkDamagedError], None],
    ) -> None:
        self._storage = storage
        self._loop = loop
        self._report_damage = report_damage

    def whole(self, digest: Digest, record: records.BlobRecord) -> bytes:
        """Return a blob; in any thread."""
        return b"".join(self._watched(digest, record, self._decode_whole(digest, record)))

    def stored(self, digest: Digest, record: records.BlobRecord) -> Iterator[bytes]:
        """Return what a blob is stored as, about a mebibyte at a time; in any thread."""
        return self._watched(digest, record, self._segments(digest, record))

    def stored_in_thread(self, digest: Digest, record: records.BlobRecord) -> AsyncIterator[bytes]:
        """Do the same for the loop."""
        return self._in_thread(self.stored(digest, record))

    def decoded(self, digest: Digest, record: records.BlobRecord, start: int, stop: int) -> AsyncIterator[bytes]:
        """Return ``[start, stop)`` of a blob, about a mebibyte at a time.

        What lies before ``start`` is decoded, too, except for frames whose headers tell that they end before it.
        """
        return self._in_thread(self._watched(digest, record, self._pieces(digest, record, start, stop)))

    def _segments(self, digest: Digest, record: records.BlobRecord) -> Iterator[bytes]:
        storage, environment, key = self._storage, self._storage.environment, digest.key
        seed = blob_seed(key, record.compression)
        for first in range(0, record.chunks, _SEGMENT_CHUNKS):
            # A snapshot for each step, since one that is held would pin what is freed meanwhile.
            with environment.read() as txn:
                try:
                    value = txn.get(key, b"", environment.blobs)
                except PAGE_ERRORS as error:
                    storage.note_index_damage(error)
                    raise BlobNotFoundError(digest) from error
                if value[records.BLOB_SIZE] != records.SIZE.pack(digest.size_bytes):
                    raise BlobNotFoundError(digest)
                if records.BlobRecord.unpack(value).storage_id != record.storage_id:
                    raise StoredAnewError(
                        f"blob {digest} was stored anew while it was read; read on from where this ends"
                    )
                if value[records.BLOB_STEP] < records.STEP.pack(storage.step()):
                    storage.touches.blobs.add(key)
                count = min(_SEGMENT_CHUNKS, record.chunks - first)
                segment = b"".join(read_chunks(txn, environment.chunks, record.storage_id, seed, first, count))
            yield segment

    def _decode_whole(self, digest: Digest, record: records.BlobRecord) -> Iterator[bytes]:
        yield decode_whole(b"".join(self._segments(digest, record)), digest.size_bytes, is_verified=True)

    def _pieces(self, digest: Digest, record: records.BlobRecord, start: int, stop: int) -> Iterator[bytes]:
        decoder = ZstdDecoder(digest.size_bytes, start, is_verified=True)
        for segment in self._segments(digest, record):
            for piece in decoder.decode(segment):
                end = decoder.decoded_bytes
                begin = end - len(piece)
                if end > start:
                    yield piece[max(0, start - begin) : stop - begin]
                if end >= stop:
                    return
        decoder.finish()

    def _watched(self, digest: Digest, record: records.BlobRecord, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Report a blob that is found damaged. One that does not decode is: it did when it was written."""
        try:
            yield from pieces
        except ChunkDamagedError as error:
            damage = error
        except MalformedZstdError as error:
            damage = ChunkDamagedError(record.storage_id, 0, str(error))
        else:
            return
        self._loop.call_soon_threadsafe(self._report_damage, digest, damage)
        raise BlobNotFoundError(digest) from damage

    async def _in_thread(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        """Step through an iterator that may block; the next piece is fetched while the last one is on its way."""
        executor = self._storage.executor
        fetched = self._loop.run_in_executor(executor, next, pieces, None)
        try:
            while (data := await fetched) is not None:
                fetched = self._loop.run_in_executor(executor, next, pieces, None)
                yield data
        finally:
            fetched.cancel()
