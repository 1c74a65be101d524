"""A full recount of an LMDB store, by its databases alone: what the totals, kept on the way, must agree with.

Written against ``docs/storage-format.md``'s rules rather than with the store's own functions, except for the records'
packing and the arithmetic of pages, which have tests of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import lmdb
import xxhash
import zstandard

from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_access_log import GROUP_KEY, decode_keys
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_cas.stores.lmdb_upload import STAGE_BYTES
from lathe_cas.upload_session import max_compressed_bytes
from lathe_shared.digest import Digest, DigestFunction

if TYPE_CHECKING:
    from lmdb import _Database as Database

KIND_ACTION_RESULT = 0
KIND_BLOB = 1


class Record(Protocol):
    """What the records have in common."""

    @classmethod
    def unpack(cls, value: bytes) -> Self: ...


T = TypeVar("T", bound=Record)


@dataclass
class Recount:
    """What is in a store.

    Attributes:
        totals: The totals as counted; the two running numbers are taken from the store.
        blobs: Digest and touch step of each blob.
        action_results: Touch step by key.
        uploads: Committed bytes by key.
    """

    totals: records.Totals
    blobs: dict[Digest, int] = field(default_factory=dict)
    action_results: dict[bytes, int] = field(default_factory=dict)
    uploads: dict[bytes, int] = field(default_factory=dict)


class _Chunks:
    """All chunks by storage id, each handed out once."""

    def __init__(self, txn: lmdb.Transaction[bytes], environment: LmdbEnvironment) -> None:
        self.pieces: dict[int, dict[int, tuple[bytes, bytes]]] = {}
        for key, value in txn.cursor(environment.chunks):
            storage_id, number, checksum = records.CHUNK_KEY.unpack(key)
            numbers = self.pieces.setdefault(storage_id, {})
            assert number not in numbers, "a chunk is there twice"
            numbers[number] = value, checksum

    def take(self, storage_id: int, count: int, owner: bytes) -> list[bytes]:
        numbers = self.pieces.pop(storage_id, {})
        assert sorted(numbers) == list(range(count)), f"storage id {storage_id}: {sorted(numbers)}, not {count} chunks"
        pieces = [numbers[number][0] for number in range(count)]
        seed = xxhash.xxh3_64_intdigest(owner)
        for number, piece in enumerate(pieces):
            assert xxhash.xxh3_64_digest(piece, (seed + number) % 2**64) == numbers[number][1]
        return pieces

    def take_plain(self, storage_id: int, count: int, owner: bytes, compression: int = 0) -> list[bytes]:
        """Return the chunks of a blob or an upload, which are all full but the last unless it is compressed."""
        pieces = self.take(storage_id, count, owner + bytes((compression,)) if compression else owner)
        assert compression or all(len(piece) == records.CHUNK_BYTES for piece in pieces[:-1])
        return pieces


def _decoded(stored: bytes, compression: int) -> bytes:
    if not compression:
        return stored
    assert compression == 1
    with zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True) as reader:
        return reader.read()


def _disk_bytes(pieces: list[bytes]) -> int:
    return sum(records.chunk_disk_bytes(len(piece)) for piece in pieces)


def recount(environment: LmdbEnvironment, left: Collection[int] = ()) -> Recount:
    """Count a store, and check on the way that all its parts agree.

    Every blob is whole and matches its digest, every chunk belongs to exactly one owner, everything that can be evicted
    is in the access log.

    Args:
        environment: The store.
        left: Storage ids of damaged chunks, which may belong to nothing: whose they were cannot be told.
    """
    with environment.read() as txn:
        stored = environment.totals_in(txn)
        count = Recount(records.Totals(stored.next_storage_id, stored.next_sequence))
        chunks = _Chunks(txn, environment)
        _count_blobs(txn, environment, chunks, count)
        _count_action_results(txn, environment, chunks, count)
        _count_uploads(txn, environment, chunks, count)
        _count_garbage(txn, environment, chunks, count)
        _count_log(txn, environment, count)
    assert chunks.pieces.keys() <= set(left), f"chunks that belong to nothing: {chunks.pieces.keys()}"
    assert count.totals == stored
    return count


def _count_blobs(txn: lmdb.Transaction[bytes], env: LmdbEnvironment, chunks: _Chunks, count: Recount) -> None:
    for key, record in _entries(txn, env.blobs, records.BlobRecord):
        pieces = chunks.take_plain(record.storage_id, record.chunks, key, record.compression)
        data = _decoded(b"".join(pieces), record.compression)
        digest = Digest.of(data, DigestFunction(key[0]))
        assert digest.key == key
        assert digest.size_bytes == record.size_bytes
        assert record.stored_bytes == sum(map(len, pieces))
        if record.compression:
            # What a client compressed stays as it came once it is staged, be it longer.
            assert record.stored_bytes < len(data) or (
                STAGE_BYTES <= record.stored_bytes <= max_compressed_bytes(len(data))
            )
        else:
            assert record.stored_bytes == len(data)
        assert record.disk_bytes == _disk_bytes(pieces) + records.INDEX_OVERHEAD_BYTES
        assert record.storage_id < count.totals.next_storage_id
        count.blobs[digest] = record.step
        count.totals.blobs += 1
        count.totals.blob_bytes += len(data)
        count.totals.stored_bytes += record.disk_bytes


def _count_action_results(txn: lmdb.Transaction[bytes], env: LmdbEnvironment, chunks: _Chunks, count: Recount) -> None:
    for key, record in _entries(txn, env.action_results, records.ActionResultRecord):
        pieces = chunks.take_plain(record.storage_id, record.chunks, record.identity(key))
        assert sum(map(len, pieces)) == record.payload_bytes
        assert record.disk_bytes == _disk_bytes(pieces) + records.INDEX_OVERHEAD_BYTES
        count.action_results[key] = record.step
        count.totals.action_results += 1
        count.totals.action_result_bytes += record.disk_bytes


def _count_uploads(txn: lmdb.Transaction[bytes], env: LmdbEnvironment, chunks: _Chunks, count: Recount) -> None:
    for key, record in _entries(txn, env.uploads, records.UploadRecord):
        blob_key = key[40 : 41 + DigestFunction(key[40]).hash_length // 2]
        pieces = chunks.take_plain(record.storage_id, record.chunks, blob_key, record.compression)
        assert record.stored_bytes == sum(map(len, pieces))
        assert record.compression or record.stored_bytes == record.committed_bytes
        assert record.disk_bytes == _disk_bytes(pieces)
        count.uploads[key] = record.committed_bytes
        count.totals.staged_bytes += record.disk_bytes + records.INDEX_OVERHEAD_BYTES


def _count_garbage(txn: lmdb.Transaction[bytes], env: LmdbEnvironment, chunks: _Chunks, count: Recount) -> None:
    for key, record in _entries(txn, env.garbage, records.GarbageRecord):
        (storage_id,) = records.STORAGE_ID.unpack(key)
        left = [piece for piece, _ in chunks.pieces.pop(storage_id, {}).values()]
        assert len(left) == record.chunks > 0
        assert record.disk_bytes >= _disk_bytes(left)
        count.totals.garbage_bytes += record.disk_bytes


def _count_log(txn: lmdb.Transaction[bytes], env: LmdbEnvironment, count: Recount) -> None:
    live: set[tuple[int, bytes, int]] = set()
    for raw_key, value in txn.cursor(env.access):
        step, kind, sequence = GROUP_KEY.unpack(raw_key)
        assert sequence < count.totals.next_sequence
        keys = decode_keys(value)
        assert keys, "an empty group"
        count.totals.log_entries += len(keys)
        live.update((kind, key, step) for key in keys)
    for digest, step in count.blobs.items():
        assert (KIND_BLOB, digest.key, step) in live, "a blob that eviction cannot see"
    for key, step in count.action_results.items():
        assert (KIND_ACTION_RESULT, key, step) in live, "an action result that eviction cannot see"


def _entries(txn: lmdb.Transaction[bytes], database: Database, kind: type[T]) -> Iterator[tuple[bytes, T]]:
    for key, value in txn.cursor(database):
        yield key, kind.unpack(value)
