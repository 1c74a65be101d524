"""What the indexes say about chunks and about the access log, as bytes that sort the way the databases do.

The indexes are ordered by digest, the chunks by storage id, the access log by time. So each pass writes down what it
saw in the order that the next one needs (``external_sort``), and the two are walked side by side: no pass looks
anything up, and none keeps more than a moment's worth in memory.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_chunks import blob_seed, chunk_seed
from lathe_cas.stores.lmdb_records import COMPRESSION_NONE, COMPRESSION_ZSTD, action_result_identity
from lathe_shared.digest import DigestFunction


class OwnerKind(enum.IntEnum):
    """What chunks can belong to; garbage last, since it yields to anything else that wants the same chunks."""

    BLOB = 1
    ACTION_RESULT = 2
    UPLOAD = 3
    GARBAGE = 4

    @property
    def database(self) -> str:
        """Name of the database with its records."""
        return _DATABASES[self]


_DATABASES = {
    OwnerKind.BLOB: "blobs",
    OwnerKind.ACTION_RESULT: "action_results",
    OwnerKind.UPLOAD: "uploads",
    OwnerKind.GARBAGE: "garbage",
}

_OWNER = struct.Struct(">QBIQIBQQ")

_UPLOAD_BLOB = slice(40, None)
UPLOAD_SIZE = slice(32, 40)
INSTANCE_BYTES = 16

NEVER_REACHED = 1 << 63
"""No counter of a store comes here: a number beyond it is damage."""


class Owner(NamedTuple):
    """A record that chunks belong to.

    Attributes:
        storage_id: Where its chunks are.
        kind: What it is.
        chunks: How many.
        size_bytes: Bytes in them; not known of garbage.
        references: Of an action result.
        flags: Of an action result; of a blob or an upload its compression.
        decoded_bytes: What the bytes of a blob or an upload stand for; other than ``size_bytes`` if compressed.
        disk_bytes: What its chunks count for, where that is to be checked; zero if it was.
        key: The record's key.
    """

    storage_id: int
    kind: OwnerKind
    chunks: int
    size_bytes: int
    references: int
    flags: int
    decoded_bytes: int
    disk_bytes: int
    key: bytes

    def pack(self) -> bytes:
        """Return bytes that sort by storage id, then by kind."""
        return _OWNER.pack(*self[:8]) + self.key

    @classmethod
    def unpack(cls, item: bytes) -> Owner:
        """Read what ``pack`` made."""
        storage_id, kind, chunks, size_bytes, references, flags, decoded_bytes, disk_bytes = _OWNER.unpack_from(item)
        key = item[_OWNER.size :]
        return cls(storage_id, OwnerKind(kind), chunks, size_bytes, references, flags, decoded_bytes, disk_bytes, key)

    @property
    def is_compressed(self) -> bool:
        """Whether its chunks hold a stream that decodes to it."""
        return self.kind in (OwnerKind.BLOB, OwnerKind.UPLOAD) and self.flags != COMPRESSION_NONE

    def seed(self) -> int:
        """Return what the checksums of its chunks are seeded with."""
        if self.kind is OwnerKind.ACTION_RESULT:
            return chunk_seed(action_result_identity(self.key, self.size_bytes, self.references, self.flags))
        return blob_seed(upload_digest_key(self.key) if self.kind is OwnerKind.UPLOAD else self.key, self.flags)

    def describe(self) -> str:
        """Name it for people."""
        if self.kind is OwnerKind.BLOB:
            return f"blob {describe_digest_key(self.key)}/{self.decoded_bytes}"
        if self.kind is OwnerKind.ACTION_RESULT:
            return describe_action_result(self.key)
        if self.kind is OwnerKind.UPLOAD:
            return f"unfinished upload of {describe_digest_key(upload_digest_key(self.key))}"
        return f"garbage of storage id {self.storage_id}"


def describe_record(kind: int, key: bytes) -> str:
    """Name a record by the kind and the key that the access log has for it."""
    return f"blob {describe_digest_key(key)}" if kind == KIND_BLOB else describe_action_result(key)


def describe_action_result(key: bytes) -> str:
    """Name an action result for people; of its instance only a hash is there."""
    return f"action result {describe_digest_key(key[INSTANCE_BYTES:])}"


def describe_digest_key(key: bytes) -> str:
    """Write a digest key for people, be it well-formed or not."""
    if is_digest_key(key):
        return key[1:].hex()
    return f"0x{key.hex()}"


def is_digest_key(key: bytes) -> bool:
    """Tell whether these bytes are a digest key."""
    return bool(key) and _DIGEST_KEY_BYTES.get(key[0]) == len(key)


_DIGEST_KEY_BYTES = {int(function): 1 + function.hash_length // 2 for function in DigestFunction}


def upload_digest_key(key: bytes) -> bytes:
    """Return the digest key in an upload's key, without what says that the client compresses it."""
    blob = key[_UPLOAD_BLOB]
    return blob[:-1] if is_compressed_by_client(key) else blob


def is_compressed_by_client(key: bytes) -> bool:
    """Tell by an upload's key whether its bytes come compressed."""
    blob = key[_UPLOAD_BLOB]
    return is_digest_key(blob[:-1]) and blob[-1] == COMPRESSION_ZSTD


def log_item(kind: int, key: bytes, step: bytes) -> bytes:
    """Return an entry of the access log as bytes that sort like the indexes, action results first."""
    return (b"\0" if kind == KIND_ACTION_RESULT else b"\1") + key + step
