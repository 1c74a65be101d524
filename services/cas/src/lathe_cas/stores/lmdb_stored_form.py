"""In which form bytes are stored: as they are, or compressed where that is worth it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import blob_seed, cut

if TYPE_CHECKING:
    from lathe_cas.compression.zstd_encoder import ZstdEncoder
    from lathe_cas.stores.lmdb_chunks import Chunk

MIN_COMPRESSED_BYTES = 512
"""Blobs below it are left alone: of so little, the index takes most of the disk."""

_MIN_SAVED_SHARE = 1 / 8
"""Of the disk, rounding to pages included. Each read has to decode, so a few per cent are no reason."""


class StoredForm(NamedTuple):
    """Bytes in the form in which they are stored.

    Attributes:
        chunks: What is written.
        compression: What the record says of it.
    """

    chunks: list[Chunk]
    compression: int


def plain(data: bytes | memoryview, key: bytes) -> StoredForm:
    """Return the bytes of the blob with this digest key as they are."""
    return _form(data, key, records.COMPRESSION_NONE)


def compressed_if_worth_it(data: bytes | memoryview, key: bytes, encoder: ZstdEncoder) -> StoredForm:
    """Return bytes compressed, or as they are if that saves too little; takes long, so in a thread."""
    if len(data) < MIN_COMPRESSED_BYTES:
        return plain(data, key)
    encoded = encoder.encode(data)
    wanted_disk_bytes = records.blob_disk_bytes(len(data)) * (1 - _MIN_SAVED_SHARE)
    if records.blob_disk_bytes(len(encoded)) > wanted_disk_bytes:
        return plain(data, key)
    return _form(encoded, key, records.COMPRESSION_ZSTD)


def as_it_came(encoded: bytes | memoryview, data: bytes, key: bytes) -> StoredForm:
    """Return what a client compressed as it came, or what it decodes to if that is less."""
    if saves(len(encoded), len(data)):
        return _form(encoded, key, records.COMPRESSION_ZSTD)
    return plain(data, key)


def _form(stored: bytes | memoryview, key: bytes, compression: int) -> StoredForm:
    return StoredForm(cut(stored, blob_seed(key, compression)), compression)


def saves(encoded_bytes: int, size_bytes: int) -> bool:
    """Tell whether keeping what a client compressed saves anything; it costs no encoding, so a byte is enough."""
    return encoded_bytes < size_bytes
