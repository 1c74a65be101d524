"""Stores in memory: what the contract asks for, in the fewest words. The model that real stores are held against."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

from typing_extensions import override

from lathe_cas.action_result_store import ActionResultStore, FoundActionResult, StoredActionResult
from lathe_cas.blob_store import BlobStore, StoreStatus, UnnamedUpload, Upload, UploadName, UploadStatus
from lathe_cas.compression.zstd_decoder import decode_whole
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import (
    AbortedError,
    BlobNotFoundError,
    DigestMismatchError,
    LatheError,
    OutOfRangeError,
    ResourceExhaustedError,
)

T = TypeVar("T")

PIECE_BYTES = 1 << 20
EMPTY_KEYS = {Digest.of(b"", function).key for function in DigestFunction}


class MemoryBlobStore(BlobStore):
    """Blobs in a dict; a limit bounds what a single blob may have."""

    def __init__(self, limit_bytes: int = 1 << 40) -> None:
        self.blobs: dict[tuple[bytes, int], bytes] = {}
        self.staged: dict[UploadName, bytes] = {}
        self.held: dict[UploadName, MemoryUpload] = {}
        self.limit_bytes = limit_bytes

    def whole(self, digest: Digest) -> bytes | None:
        return b"" if digest.is_empty else self.blobs.get((digest.key, digest.size_bytes))

    @override
    def find_missing(self, wanted: Sequence[tuple[T, bytes, int]]) -> list[T]:
        return [
            token for token, key, size in wanted if (key, size) not in self.blobs and (size or key not in EMPTY_KEYS)
        ]

    @override
    def find_sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        sizes: dict[bytes, int | None] = dict(self.blobs.keys())
        return [sizes.get(key, 0 if key in EMPTY_KEYS else None) for key in keys]

    @override
    async def put_many(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        await asyncio.sleep(0)
        return [self.put(digest, bytes(data)) for digest, data in blobs]

    def put(self, digest: Digest, data: bytes) -> LatheError | None:
        got = Digest.of(data, digest.function)
        if got != digest:
            return DigestMismatchError(digest, str(got))
        if digest.size_bytes > self.limit_bytes:
            return ResourceExhaustedError("too large")
        if data:
            self.blobs[digest.key, digest.size_bytes] = data
        return None

    @override
    async def read_many(self, digests: Sequence[Digest]) -> list[bytes | None]:
        await asyncio.sleep(0)
        return [self.whole(digest) for digest in digests]

    @override
    async def read(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
        data = self.whole(digest)
        if data is None:
            raise BlobNotFoundError(digest)
        if offset_bytes > len(data):
            raise OutOfRangeError(f"{offset_bytes} is past the end of {digest}")
        end = min(len(data), offset_bytes + limit_bytes) if limit_bytes else len(data)
        for start in range(offset_bytes, end, PIECE_BYTES):
            yield data[start : min(end, start + PIECE_BYTES)]

    @override
    async def open_upload(self, name: UploadName, *, restart: bool = False) -> Upload:
        if name.digest.size_bytes > self.limit_bytes:
            raise ResourceExhaustedError("too large")
        await asyncio.sleep(0)
        self.held[name] = upload = MemoryUpload(self, name, b"" if restart else self.staged.get(name, b""))
        return upload

    @override
    async def open_unnamed_upload(self, function: DigestFunction, expected_hash: str | None = None) -> UnnamedUpload:
        return MemoryUnnamedUpload(self, function, expected_hash)

    @override
    async def upload_status(self, name: UploadName) -> UploadStatus:
        if self.whole(name.digest) is not None:
            return UploadStatus(name.digest.size_bytes, True)
        return UploadStatus(0 if name.compressor else len(self.staged.get(name, b"")), False)

    @override
    async def remove(self, digests: Sequence[Digest]) -> int:
        removed = [self.blobs.pop((digest.key, digest.size_bytes), None) for digest in digests]
        return len(removed) - removed.count(None)

    @override
    def status(self) -> StoreStatus:
        blob_bytes = sum(map(len, self.blobs.values()))
        staged_bytes = sum(map(len, self.staged.values()))
        return StoreStatus(
            len(self.blobs), blob_bytes, blob_bytes + staged_bytes, staged_bytes, 0, 0, self.limit_bytes, 0
        )


class MemoryUpload(Upload):
    def __init__(self, store: MemoryBlobStore, name: UploadName, staged: bytes) -> None:
        self.store = store
        self.name = name
        self.data = bytearray(staged)
        self.committed_at_open = len(staged)

    @property
    @override
    def committed_bytes(self) -> int:
        return self.committed_at_open

    @override
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        self.check_hold()
        self.data += b"".join(pieces)
        await asyncio.sleep(0)

    @override
    async def finish(self) -> None:
        self.check_hold()
        await self.abandon()
        digest, data = self.name.digest, bytes(self.data)
        error = self.store.put(digest, decode_whole(data, digest.size_bytes) if self.name.compressor else data)
        if error is not None:
            raise error

    @override
    async def suspend(self, pieces: Sequence[memoryview] = (), length: int = 0) -> int:
        self.suspend_soon(pieces, length)
        return 0 if self.name.compressor else len(self.data)

    @override
    def suspend_soon(self, pieces: Sequence[memoryview] = (), length: int = 0) -> None:
        self.check_hold()
        self.data += b"".join(pieces)
        if not self.name.compressor:
            self.store.staged[self.name] = bytes(self.data)
        del self.store.held[self.name]

    @override
    async def abandon(self) -> None:
        if self.store.held.get(self.name) is self:
            self.store.staged.pop(self.name, None)
            del self.store.held[self.name]

    def check_hold(self) -> None:
        if self.store.held.get(self.name) is not self:
            raise AbortedError("another stream took this upload over")


class MemoryUnnamedUpload(UnnamedUpload):
    def __init__(self, store: MemoryBlobStore, function: DigestFunction, expected_hash: str | None) -> None:
        self.store = store
        self.function = function
        self.expected_hash = expected_hash
        self.data = bytearray()

    @override
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        self.data += b"".join(pieces)
        await asyncio.sleep(0)

    @override
    async def finish(self) -> Digest:
        found = Digest.of(self.data, self.function)
        expected = Digest(self.expected_hash or found.hash, found.size_bytes, self.function)
        error = self.store.put(expected, bytes(self.data))
        if error is not None:
            raise error
        return found

    @override
    async def abandon(self) -> None:
        self.data.clear()

    @override
    def abandon_soon(self) -> None:
        self.data.clear()


class MemoryActionResultStore(ActionResultStore):
    """Action results in a dict, checked against a blob store when asked for."""

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs
        self.results: dict[tuple[str, Digest], StoredActionResult] = {}

    @override
    def get(self, instance_name: str, action_digest: Digest) -> FoundActionResult | None:
        stored = self.results.get((instance_name, action_digest))
        if stored is None or self.blobs.find_missing([(None, key, size) for key, size in stored.references]):
            return None
        return FoundActionResult(stored.action_result, stored.expanded)

    @override
    async def put(self, instance_name: str, action_digest: Digest, stored: StoredActionResult) -> None:
        await asyncio.sleep(0)
        self.results[instance_name, action_digest] = stored
