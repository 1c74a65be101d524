"""Blobs for these tests: seeded, so that every run has the same."""

from __future__ import annotations

import functools
import random

from lathe_cas.blob_store import BlobStore, Upload, UploadName
from lathe_cas.soon import settled
from lathe_shared.digest import Digest


# Many cases want the same few of several megabytes.
@functools.lru_cache(maxsize=64)
def content(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes of which half is redundant, so that a store which compresses does so."""
    return random.Random(f"{size_bytes} {seed}").randbytes(-(-size_bytes // 2)).hex().encode()[:size_bytes]


def blob(size_bytes: int, seed: int = 0) -> tuple[Digest, bytes]:
    data = content(size_bytes, seed)
    return Digest.of(data), data


def upload_name(digest: Digest, upload_id: str = "upload", instance_name: str = "main") -> UploadName:
    return UploadName(instance_name, upload_id, digest)


async def put(store: BlobStore, *blobs: bytes) -> list[Digest]:
    """Put blobs that must all be taken."""
    digests = [Digest.of(data) for data in blobs]
    outcomes = await store.put_many([(digest, memoryview(data)) for digest, data in zip(digests, blobs, strict=True)])
    assert outcomes == [None] * len(blobs)
    return digests


async def read(store: BlobStore, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> bytes:
    return b"".join([piece async for piece in store.read(digest, offset_bytes, limit_bytes)])


def missing(store: BlobStore, *digests: Digest) -> list[Digest]:
    """Ask for blobs whose leases, if they have any, are not over."""
    found = store.find_missing([(digest, digest.key, digest.size_bytes) for digest in digests])
    assert isinstance(found, list)
    return found


async def missing_soon(store: BlobStore, *digests: Digest) -> list[Digest]:
    """Ask for blobs whose leases may be over."""
    return await settled(store.find_missing([(digest, digest.key, digest.size_bytes) for digest in digests]))


async def feed(upload: Upload, data: bytes, piece_bytes: int = 100_000) -> None:
    """Append bytes in pieces, as they come from a stream."""
    for start in range(0, len(data), piece_bytes):
        piece = memoryview(data)[start : start + piece_bytes]
        await upload.append([piece], len(piece))
