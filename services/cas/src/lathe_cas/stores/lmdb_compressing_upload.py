"""Uploads that the store compresses while they arrive, a frame for each mebibyte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_cas.compression.zstd_decoder import ZstdDecoder
from lathe_cas.compression.zstd_framing import MalformedZstdError
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, blob_seed, cut, read_chunks
from lathe_cas.stores.lmdb_stored_form import compressed_if_worth_it
from lathe_cas.stores.lmdb_upload import LmdbUpload

if TYPE_CHECKING:
    from lathe_cas.blob_store import UploadName
    from lathe_cas.compression.zstd_encoder import ZstdEncoder
    from lathe_cas.stores.lmdb_chunks import Chunk
    from lathe_cas.stores.lmdb_storage import LmdbStorage

_GROUP_CHUNKS = 16


class LmdbCompressingUpload(LmdbUpload):
    """One stream's hold on an upload that comes as it is and may be stored compressed.

    The first mebibyte decides: if compressing it is not worth it, the upload goes on as a plain one. Each stage is a
    whole frame, so an upload can be resumed behind any of them.

    Args:
        storage: Where to.
        active: The uploads that streams of this process hold.
        name: Which upload.
        encoder: What compresses.
    """

    def __init__(
        self, storage: LmdbStorage, active: dict[bytes, LmdbUpload], name: UploadName, encoder: ZstdEncoder
    ) -> None:
        super().__init__(storage, active, name)
        self._encoder = encoder
        self._compression = records.COMPRESSION_ZSTD
        self._stream_seed = blob_seed(name.digest.key, records.COMPRESSION_ZSTD)

    @override
    def _hash_staged(self, record: records.UploadRecord) -> bytes:
        if not record.compression:
            return super()._hash_staged(record)
        environment = self._storage.environment
        decoder = ZstdDecoder(record.committed_bytes, is_verified=True)
        try:
            for first in range(0, record.chunks, _GROUP_CHUNKS):
                with environment.read() as txn:
                    count = min(_GROUP_CHUNKS, record.chunks - first)
                    pieces = read_chunks(txn, environment.chunks, record.storage_id, self._stream_seed, first, count)
                for piece in decoder.decode(b"".join(pieces)):
                    self._hasher.update(piece)
            decoder.finish()
        except MalformedZstdError as error:
            raise ChunkDamagedError(record.storage_id, 0, str(error)) from error
        return b""

    @override
    async def _hash_and_cut(self, pieces: list[memoryview], length: int) -> list[Chunk]:
        if not self._compression:
            return await super()._hash_and_cut(pieces, length)
        is_first = not self._staged_bytes
        return await self._loop.run_in_executor(self._storage.executor, self._hash_and_encode, pieces, is_first)

    def _hash_and_encode(self, pieces: list[memoryview], is_first: bool) -> list[Chunk]:
        data = b"".join(pieces)
        self._hasher.update(data)
        if not is_first:
            return cut(self._encoder.encode(data), self._stream_seed, self._staged_chunks)
        form = compressed_if_worth_it(data, self._digest.key, self._encoder)
        self._compression = form.compression
        return form.chunks

    @override
    async def _cut_rest(self, pieces: list[memoryview], length: int) -> list[Chunk]:
        if not self._compression:
            return await super()._cut_rest(pieces, length)
        return await self._hash_and_cut(pieces, length)
