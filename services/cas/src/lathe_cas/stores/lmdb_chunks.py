"""Chunks: bytes cut for LMDB, their checksums, and the walk over them.

LMDB has no checksums for its own pages. So a chunk's checksum is seeded with what the chunk belongs to and where: bytes
that a damaged key or record leads to by mistake are as wrong as bytes that were damaged themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import xxhash

from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_records import CHUNK_BYTES, CHUNK_KEY, CHUNK_PREFIX, STORAGE_ID, chunk_disk_bytes
from lathe_shared.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import lmdb
    from lmdb import _Database as Database
    from typing_extensions import Buffer


class ChunkDamagedError(Exception):
    """A chunk is absent or its bytes are not those that were written. The blob it belongs to is lost.

    Attributes:
        storage_id: Whose chunk it is.
        unreadable: Whether LMDB cannot go where the chunk is. Then it cannot be deleted either.
    """

    def __init__(self, storage_id: int, number: int, reason: str, *, unreadable: bool = False) -> None:
        super().__init__(f"chunk {number} of storage id {storage_id}: {reason}")
        self.storage_id = storage_id
        self.unreadable = unreadable


class Chunk(NamedTuple):
    """Bytes ready to be put: at most CHUNK_BYTES, with the checksum that goes into their key."""

    data: Buffer
    checksum: bytes
    disk_bytes: int


def chunk_seed(owner: bytes) -> int:
    """Return what seeds the checksum of chunk 0, from what the chunks belong to; chunk n has this and n.

    Args:
        owner: The digest key of a blob, see ``blob_seed``; ``ActionResultRecord.identity`` of an action result.
    """
    return xxhash.xxh3_64_intdigest(owner)


def blob_seed(key: bytes, compression: int) -> int:
    """Return what seeds the checksum of a blob's chunk 0: it says, too, whether they hold the blob or a stream.

    Else a record whose ``compression`` is damaged would have the stream given away as the blob.
    """
    return chunk_seed(key + bytes((compression,)) if compression else key)


def checksum(data: Buffer, seed: int, number: int) -> bytes:
    """Return the checksum of chunk ``number``."""
    return xxhash.xxh3_64_digest(data, (seed + number) & _SEED_MASK)


_SEED_MASK = (1 << 64) - 1


def cut(data: bytes | bytearray | memoryview, seed: int, first_number: int = 0) -> list[Chunk]:
    """Cut bytes into chunks without copying them, and compute the checksums.

    The chunks refer to ``data``, which must not change until they are written.

    Args:
        data: What to cut.
        seed: What the chunks belong to; see ``chunk_seed``.
        first_number: Number of the first chunk.
    """
    length = len(data)
    if length <= CHUNK_BYTES:
        return [Chunk(data, checksum(data, seed, first_number), chunk_disk_bytes(length))] if length else []
    view = memoryview(data)
    pieces = (view[start : start + CHUNK_BYTES] for start in range(0, length, CHUNK_BYTES))
    return [
        Chunk(piece, checksum(piece, seed, number), chunk_disk_bytes(len(piece)))
        for number, piece in enumerate(pieces, first_number)
    ]


def cut_pieces(pieces: Sequence[memoryview], seed: int, first_number: int = 0) -> list[Chunk]:
    """Cut bytes that are in pieces as ``cut`` would cut all of them together, copying only what spans two pieces."""
    chunks: list[Chunk] = []
    begun: list[memoryview] = []
    begun_bytes = 0
    for piece in pieces:
        position = 0
        if begun:
            position = min(CHUNK_BYTES - begun_bytes, len(piece))
            begun.append(piece[:position])
            begun_bytes += position
            if begun_bytes < CHUNK_BYTES:
                continue
            chunks += cut(b"".join(begun), seed, first_number + len(chunks))
            begun = []
        end = len(piece) - (len(piece) - position) % CHUNK_BYTES
        chunks += cut(piece[position:end], seed, first_number + len(chunks))
        begun_bytes = len(piece) - end
        if begun_bytes:
            begun = [piece[end:]]
    return chunks + cut(b"".join(begun), seed, first_number + len(chunks))


def length_of(chunks: Sequence[Chunk]) -> int:
    """Return how many bytes chunks hold together."""
    return sum(memoryview(chunk.data).nbytes for chunk in chunks)


def put_chunks(
    txn: lmdb.Transaction[bytes],
    database: Database,
    storage_id: int,
    first_number: int,
    chunks: Sequence[Chunk],
    *,
    newest: bool,
) -> None:
    """Write chunks one after the other.

    Args:
        txn: A write transaction.
        database: The ``chunks`` database.
        storage_id: Whose chunks they are.
        first_number: Number of the first one.
        chunks: What to write.
        newest: Whether no larger storage id has chunks. The pages of the B-tree are then filled to the brim, since
            LMDB appends instead of splitting pages in the middle.

    Raises:
        InternalError: There are chunks of a larger storage id after all. What was written before has to be taken back
            with the transaction.
    """
    pack = CHUNK_KEY.pack
    put = txn.put
    for number, chunk in enumerate(chunks, first_number):
        # LMDB appends no key that is not the largest: it says so, and stores nothing.
        if not put(pack(storage_id, number, chunk.checksum), chunk.data, append=newest, db=database):
            raise InternalError(f"chunk {number} of storage id {storage_id} is not the last of all")


def read_chunks(
    txn: lmdb.Transaction[bytes], database: Database, storage_id: int, seed: int, first_number: int, count: int
) -> list[bytes]:
    """Copy chunks out and verify each, that it is one of those that ``seed`` stands for included.

    Raises:
        ChunkDamagedError: One of them is absent or damaged.
    """
    if not count:
        return []
    try:
        return _read_chunks(txn, database, storage_id, seed, first_number, count)
    except PAGE_ERRORS as error:
        raise ChunkDamagedError(storage_id, first_number, f"LMDB cannot read it: {error}", unreadable=True) from error


def _read_chunks(
    txn: lmdb.Transaction[bytes], database: Database, storage_id: int, seed: int, first_number: int, count: int
) -> list[bytes]:
    cursor = txn.cursor(database)
    prefix = CHUNK_PREFIX.pack(storage_id, first_number)
    found = cursor.set_range(prefix)
    pieces: list[bytes] = []
    number = first_number
    while True:
        # Behind the last entry both are empty.
        key, data = cursor.item() if found else (b"", b"")
        if key[:12] != prefix:
            raise ChunkDamagedError(storage_id, number, "not there")
        if checksum(data, seed, number) != key[12:]:
            raise ChunkDamagedError(storage_id, number, "its bytes do not match their checksum")
        pieces.append(data)
        if len(pieces) == count:
            return pieces
        number += 1
        prefix = CHUNK_PREFIX.pack(storage_id, number)
        found = cursor.next()


def is_owner(
    txn: lmdb.Transaction[bytes], database: Database, storage_id: int, seed: int, numbers: Iterable[int]
) -> bool:
    """Tell whether one of these chunks is there and proves that its storage id belongs to what ``seed`` stands for.

    A storage id has one owner. So the first chunk that verifies is proof for all of them.
    """
    cursor = txn.cursor(database)
    for number in numbers:
        prefix = CHUNK_PREFIX.pack(storage_id, number)
        if cursor.set_range(prefix):
            key, data = cursor.item()
            if key[:12] == prefix and checksum(data, seed, number) == key[12:]:
                return True
    return False


def has_exactly(txn: lmdb.Transaction[bytes], database: Database, storage_id: int, count: int) -> bool:
    """Tell whether a storage id has a last chunk with the number that it has if there are ``count``.

    Looks at keys alone, so no page is read that holds bytes of a chunk.
    """
    cursor = txn.cursor(database)
    prefix = CHUNK_PREFIX.pack(storage_id, count - 1)
    if not cursor.set_range(prefix) or cursor.key()[:12] != prefix:
        return False
    return not cursor.next() or cursor.key()[:8] != prefix[:8]


def delete_chunks(
    txn: lmdb.Transaction[bytes], database: Database, storage_id: int, first_number: int, count: int
) -> int:
    """Delete up to ``count`` chunks from ``first_number`` on, and return how many there were."""
    cursor = txn.cursor(database)
    prefix = STORAGE_ID.pack(storage_id)
    found = cursor.set_range(CHUNK_PREFIX.pack(storage_id, first_number))
    deleted = 0
    # After a delete the cursor stands on the next entry, and its key is empty behind the last one.
    while found and deleted < count and cursor.key()[:8] == prefix:
        cursor.delete()
        deleted += 1
    return deleted
