"""Keys and values of the LMDB databases, and the arithmetic of pages.

The one place that knows the bytes; ``docs/storage-format.md`` describes them for people. All integers are
big-endian, so that LMDB's byte order is numeric order.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

FORMAT_VERSION = 2
"""Version of everything in this module. A store of another version is refused, never guessed at."""

PAGE_BYTES = 4096
PAGE_HEADER_BYTES = 16
CHUNK_BYTES = 16 * PAGE_BYTES - PAGE_HEADER_BYTES
"""65,520: a value of this size fills sixteen LMDB overflow pages to the last byte."""

_LARGEST_LEAF_NODE_BYTES = (PAGE_BYTES - PAGE_HEADER_BYTES) // 2 - 2
"""LMDB moves a value to overflow pages when node header, key and value exceed this (me_nodemax)."""

_NODE_BYTES = 8 + 2
"""Node header and its pointer in the leaf page."""

CHUNK_KEY = struct.Struct(">QI8s")
CHUNK_PREFIX = struct.Struct(">QI")
STORAGE_ID = struct.Struct(">Q")
SIZE = struct.Struct(">Q")
STEP = struct.Struct(">I")

INDEX_OVERHEAD_BYTES = 192
"""Bytes on disk that one entry of an index and of the access log cost beside its data: about 85 and 40 bytes of
node in B-tree pages that are two thirds full."""

LAYOUT_PLAIN = 0
"""Every chunk but the last holds CHUNK_BYTES. Other numbers are free for other ways to cut."""

COMPRESSION_NONE = 0
COMPRESSION_ZSTD = 1
"""The chunks hold a zstd stream of any number of frames. The numbers are REAPI's for compressors."""


def _unpack(form: struct.Struct, value: bytes) -> tuple[int, ...]:
    """Unpack a record. One of another length is damaged: it is read as far as it goes, and its chunks will not match.

    What belongs to it is dropped for that, which an error here would prevent.
    """
    if len(value) != form.size:
        value = value[: form.size].ljust(form.size, b"\0")
    return form.unpack(value)


class BlobRecord(NamedTuple):
    """Value of ``blobs``. ``size`` and ``step`` come first so that look-ups compare slices, not numbers."""

    size_bytes: int
    step: int
    storage_id: int
    stored_bytes: int
    disk_bytes: int
    chunks: int
    layout: int = LAYOUT_PLAIN
    compression: int = COMPRESSION_NONE

    def pack(self) -> bytes:
        """Return the bytes that LMDB keeps."""
        return _BLOB.pack(*self)

    @classmethod
    def unpack(cls, value: bytes) -> BlobRecord:
        """Read the bytes that LMDB kept."""
        return cls._make(_unpack(_BLOB, value))


_BLOB = struct.Struct(">QIQQQIBB")
BLOB_SIZE = slice(0, 8)
BLOB_STEP = slice(8, 12)


class FreshRecords(dict[int, bytes]):
    """How the record of a blob begins that was touched in a step already, by the blob's size.

    Args:
        step: The touch step.
        first_step_leased_on: The first step whose leases last for another step at least.

    Attributes:
        step: As given.
        step_bytes: The same, as records hold it.
        leased_on_bytes: ``first_step_leased_on``, as records hold it.
    """

    _LIMIT = 1 << 16
    """Sizes remembered; a bound, since clients choose them."""

    def __init__(self, step: int, first_step_leased_on: int) -> None:
        super().__init__()
        self.step = step
        self.step_bytes = STEP.pack(step)
        self.leased_on_bytes = STEP.pack(first_step_leased_on)

    def __missing__(self, size_bytes: int) -> bytes:
        if len(self) >= self._LIMIT:
            self.clear()
        begin = self[size_bytes] = SIZE.pack(size_bytes) + self.step_bytes
        return begin


class UploadRecord(NamedTuple):
    """Value of ``uploads``: what has arrived of a blob that is not whole yet.

    ``committed_bytes`` are the client's, ``stored_bytes`` those in the chunks.
    ``owner`` is a random number of the session that writes; a second session for the same upload replaces it, and
    the first one then fails instead of mixing its bytes in.
    """

    storage_id: int
    committed_bytes: int
    disk_bytes: int
    chunks: int
    owner: int
    updated_at: int
    stored_bytes: int
    compression: int

    def pack(self) -> bytes:
        """Return the bytes that LMDB keeps."""
        return _UPLOAD.pack(*self)

    @classmethod
    def unpack(cls, value: bytes) -> UploadRecord:
        """Read the bytes that LMDB kept."""
        return cls._make(_unpack(_UPLOAD, value))


_UPLOAD = struct.Struct(">QQQIQQQB")

REFERENCES_INCOMPLETE = 1
"""Flag of an ActionResultRecord: the references lack what unread Trees name, so Get expands them itself."""


class ActionResultRecord(NamedTuple):
    """Value of ``action_results``. The payload (references, then the ActionResult) lies in ``chunks``."""

    step: int
    storage_id: int
    payload_bytes: int
    disk_bytes: int
    chunks: int
    references: int
    flags: int = 0

    def pack(self) -> bytes:
        """Return the bytes that LMDB keeps."""
        return _ACTION_RESULT.pack(*self)

    @classmethod
    def unpack(cls, value: bytes) -> ActionResultRecord:
        """Read the bytes that LMDB kept."""
        return cls._make(_unpack(_ACTION_RESULT, value))

    def identity(self, key: bytes) -> bytes:
        """Return what the checksums of its chunks are seeded with: all that says how to read them."""
        return action_result_identity(key, self.payload_bytes, self.references, self.flags)


_ACTION_RESULT = struct.Struct(">IQQQIIB")
_ACTION_RESULT_IDENTITY = struct.Struct(">QIB")
ACTION_RESULT_STEP = slice(0, 4)


class GarbageRecord(NamedTuple):
    """Value of ``garbage``, under a storage id: chunks that nothing refers to any more."""

    chunks: int
    disk_bytes: int

    def pack(self) -> bytes:
        """Return the bytes that LMDB keeps."""
        return _GARBAGE.pack(*self)

    @classmethod
    def unpack(cls, value: bytes) -> GarbageRecord:
        """Read the bytes that LMDB kept."""
        return cls._make(_unpack(_GARBAGE, value))


_GARBAGE = struct.Struct(">IQ")


@dataclass(slots=True)
class Totals:
    """The one record of ``meta`` that counts everything, kept exact so that a start reads no index.

    Attributes:
        next_storage_id: Storage ids are never used twice.
        next_sequence: Number of the next group in the access log.
        blobs: Blobs in the index.
        blob_bytes: Their logical bytes.
        stored_bytes: Their bytes on disk.
        staged_bytes: Bytes on disk of unfinished uploads.
        garbage_bytes: Bytes on disk that wait to be freed.
        action_results: Action results.
        action_result_bytes: Their bytes on disk.
        log_entries: Entries of the access log, live and stale.
    """

    next_storage_id: int = 1
    next_sequence: int = 1
    blobs: int = 0
    blob_bytes: int = 0
    stored_bytes: int = 0
    staged_bytes: int = 0
    garbage_bytes: int = 0
    action_results: int = 0
    action_result_bytes: int = 0
    log_entries: int = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes on disk of what is kept: the figure that the limit is about."""
        return self.stored_bytes + self.staged_bytes + self.action_result_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, with those that wait to be freed."""
        return self.kept_bytes + self.garbage_bytes

    def pack(self) -> bytes:
        """Return the bytes that LMDB keeps.

        A damaged record that is dropped may say that it counted for more than there was. That must not keep it from
        being dropped; fsck counts anew.
        """
        counts = (
            self.next_storage_id,
            self.next_sequence,
            self.blobs,
            self.blob_bytes,
            self.stored_bytes,
            self.staged_bytes,
            self.garbage_bytes,
            self.action_results,
            self.action_result_bytes,
            self.log_entries,
        )
        return _TOTALS.pack(*[max(0, count) for count in counts])

    @classmethod
    def unpack(cls, value: bytes) -> Totals:
        """Read the bytes that LMDB kept."""
        return cls(*_TOTALS.unpack(value))


_TOTALS = struct.Struct(">10Q")


def chunk_count(size_bytes: int) -> int:
    """Return how many chunks hold ``size_bytes``."""
    return -(-size_bytes // CHUNK_BYTES)


def chunk_disk_bytes(length: int) -> int:
    """Return what one chunk of ``length`` bytes takes on disk: whole overflow pages, or its part of a leaf."""
    node = _NODE_BYTES + CHUNK_KEY.size
    if node - 2 + length > _LARGEST_LEAF_NODE_BYTES:
        return -(-(length + PAGE_HEADER_BYTES) // PAGE_BYTES) * PAGE_BYTES + node + 8
    return node + length


def blob_disk_bytes(size_bytes: int) -> int:
    """Return what ``size_bytes`` cut into chunks take on disk, without the index."""
    whole, rest = divmod(size_bytes, CHUNK_BYTES)
    return whole * chunk_disk_bytes(CHUNK_BYTES) + (chunk_disk_bytes(rest) if rest else 0)


@functools.lru_cache(maxsize=1024)
def instance_name_hash(name: str) -> bytes:
    """Return ``name_hash``, remembered: each request names one of a few instances."""
    return name_hash(name)


def name_hash(name: str) -> bytes:
    """Return 16 bytes that stand for a name of any length in a key."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def upload_key(
    instance_name: str, upload_id: str, digest_key: bytes, size_bytes: int, compression: int = COMPRESSION_NONE
) -> bytes:
    """Return the key of ``uploads``. What a client compressed itself is another upload than what it did not."""
    key = instance_name_hash(instance_name) + name_hash(upload_id) + SIZE.pack(size_bytes) + digest_key
    return key + bytes((compression,)) if compression else key


UPLOAD_SIZE = slice(32, 40)
UPLOAD_BLOB = slice(40, None)
"""Where an upload's key has the blob's size and, unless the client compresses it, the blob's key."""


def action_result_key(instance_name: str, digest_key: bytes) -> bytes:
    """Return the key of ``action_results``."""
    return instance_name_hash(instance_name) + digest_key


def action_result_identity(key: bytes, payload_bytes: int, references: int, flags: int) -> bytes:
    """Return what the checksums of an action result's chunks are seeded with; see ``chunk_seed``."""
    return key + _ACTION_RESULT_IDENTITY.pack(payload_bytes, references, flags)


def upload_blob_key(key: bytes) -> bytes:
    """Return the key of the blob in an upload's key, without what says that the client compresses it."""
    blob = key[UPLOAD_BLOB]
    # The first byte says how long a hash is, but a hash has an even length, and so a digest key an odd one.
    return blob if len(blob) % 2 else blob[:-1]


ACTION_RESULT_DIGEST_KEY = slice(16, None)
