"""Uploads that the client compressed: verified decoded, stored as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_cas.blob_store import abandoned_on_failure
from lathe_cas.compression.zstd_decoder import ZstdDecoder, decode_whole
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import blob_seed, cut
from lathe_cas.stores.lmdb_stored_form import saves
from lathe_cas.stores.lmdb_upload import LmdbUpload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lathe_cas.blob_store import UploadName
    from lathe_cas.stores.lmdb_chunks import Chunk
    from lathe_cas.stores.lmdb_storage import LmdbStorage
    from lathe_shared.digest import Digest

STEP_PIECES = 32
"""Pieces of a mebibyte that are decoded and hashed before a thread takes the next job. A few bytes can stand for
gigabytes, and the threads are those that reads need, too."""


class LmdbZstdUpload(LmdbUpload):
    """One stream's hold on the upload of a zstd stream.

    What has arrived when it breaks is dropped: the offset at which a client resumes counts decoded bytes, and the new
    stream that it sends from there cannot go on with a frame that was begun.
    """

    def __init__(self, storage: LmdbStorage, active: dict[bytes, LmdbUpload], name: UploadName) -> None:
        super().__init__(storage, active, name)
        self._compression = records.COMPRESSION_ZSTD
        self._stream_seed = blob_seed(name.digest.key, records.COMPRESSION_ZSTD)
        self._decoder = ZstdDecoder(name.digest.size_bytes)
        self._is_finishing = False

    @override
    async def resume(self, *, restart: bool) -> None:
        await super().resume(restart=True)

    @override
    async def _hash_and_cut(self, pieces: list[memoryview], length: int) -> list[Chunk]:
        data = b"".join(pieces)
        decoded = self._decoder.decode(data)
        while await self._loop.run_in_executor(self._storage.executor, self._hash_some, decoded):
            pass
        if self._is_finishing and not self._staged_bytes and not saves(length, self._decoder.decoded_bytes):
            # All of it is here, and little, and as it came it would save nothing.
            return await self._loop.run_in_executor(self._storage.executor, self._cut_plain, data)
        return cut(data, self._stream_seed, self._staged_chunks)

    def _hash_some(self, decoded: Iterator[bytes]) -> bool:
        """Hash the next pieces; False if there is none left."""
        for number, piece in enumerate(decoded, 1):
            self._hasher.update(piece)
            if number == STEP_PIECES:
                return True
        return False

    def _cut_plain(self, data: bytes) -> list[Chunk]:
        plain = decode_whole(data, self._digest.size_bytes, is_verified=True)
        self._compression = records.COMPRESSION_NONE
        return cut(plain, self._seed)

    @override
    def _found(self, received_bytes: int) -> Digest:
        self._decoder.finish()
        return super()._found(self._decoder.decoded_bytes)

    @override
    async def finish(self) -> None:
        self._is_finishing = True
        # Nobody can go on with what is staged, and it would keep the room from others for a day.
        async with abandoned_on_failure(self):
            await super().finish()

    @override
    async def suspend(self, pieces: Sequence[memoryview] = (), length: int = 0) -> int:
        self._check_hold()
        await self.abandon()
        return 0
