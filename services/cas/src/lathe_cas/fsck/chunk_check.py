"""The chunks, walked beside the records that own them: checksums, numbers, lengths, and what nothing refers to."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_cas.compression.zstd_decoder import ZstdDecoder
from lathe_cas.compression.zstd_framing import MalformedZstdError
from lathe_cas.fsck.entries import INSTANCE_BYTES, NEVER_REACHED, Owner, OwnerKind
from lathe_cas.fsck.findings import Note, Problem
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import checksum
from lathe_shared.digest import DigestFunction

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import lmdb

    from lathe_cas.fsck.findings import Findings
    from lathe_cas.fsck.progress import Progress
    from lathe_cas.fsck.repairs import Repairs
    from lathe_cas.stores.lmdb_environment import LmdbEnvironment
    from lathe_shared.digest import Hasher


class ChunkCheck:
    """Walks every chunk once.

    Args:
        txn: A read transaction whose values are buffers: nothing is copied that need not be.
        environment: The store.
        findings: Where to note what is bad.
        repairs: Where to note what has to be done.
        progress: Where to show how far it is.
        digests: Whether to hash every blob, too.

    Attributes:
        next_storage_id: The lowest number that the store's counter may have, as far as chunks tell.
    """

    def __init__(
        self,
        txn: lmdb.Transaction[memoryview],
        environment: LmdbEnvironment,
        findings: Findings,
        repairs: Repairs,
        progress: Progress,
        *,
        digests: bool,
    ) -> None:
        self.next_storage_id = 1
        self._txn = txn
        self._environment = environment
        self._findings = findings
        self._repairs = repairs
        self._progress = progress
        self._digests = digests
        self._size_bytes = 0

    def run(self, owners: Iterator[bytes]) -> None:
        """Walk the chunks.

        Args:
            owners: What the index check wrote down, in order.
        """
        database = self._environment.chunks
        count = self._txn.stat(database)["entries"]
        with self._progress.phase("chunks", count):
            self._walk(groupby(map(Owner.unpack, owners), key=lambda owner: owner.storage_id))
        self._findings.checked["chunks"] += count
        self._findings.checked_bytes["chunks"] += self._size_bytes

    def _walk(self, owners: Iterator[tuple[int, Iterator[Owner]]]) -> None:
        wanted, group = next(owners, (None, iter(())))
        for storage_id, chunks in groupby(self._entries(), key=lambda entry: entry[0]):
            if storage_id < NEVER_REACHED:
                self.next_storage_id = max(self.next_storage_id, storage_id + 1)
            while wanted is not None and wanted < storage_id:
                self._settle(wanted, [self._new_walk(owner) for owner in group])
                wanted, group = next(owners, (None, iter(())))
            if wanted != storage_id:
                size_bytes = sum(len(value) for _, _, _, value in chunks)
                self._findings.add(Problem.ORPHANS, f"storage id {storage_id}", size_bytes)
                self._repairs.drop_chunks(storage_id)
                continue
            walks = [self._new_walk(owner) for owner in group]
            for _, number, digest, value in chunks:
                for walk in walks:
                    walk.take(number, digest, value)
            self._settle(storage_id, walks)
            wanted, group = next(owners, (None, iter(())))
        while wanted is not None:
            self._settle(wanted, [self._new_walk(owner) for owner in group])
            wanted, group = next(owners, (None, iter(())))

    def _entries(self) -> Iterator[tuple[int, int, bytes, memoryview]]:
        """Give storage id, number, checksum and bytes of each chunk."""
        unpack = records.CHUNK_KEY.unpack
        step = self._progress.step
        for key, value in self._txn.cursor(self._environment.chunks):
            step()
            self._size_bytes += len(value)
            if len(key) != records.CHUNK_KEY.size:
                self._findings.add(Problem.CHUNK_KEY, f"key 0x{bytes(key).hex()}", len(value))
                self._repairs.drop_chunk(bytes(key))
                continue
            storage_id, number, digest = unpack(key)
            yield storage_id, number, digest, value

    def _new_walk(self, owner: Owner) -> _OwnedChunks:
        if owner.kind is OwnerKind.GARBAGE:
            return _Garbage(owner)
        if owner.kind is OwnerKind.ACTION_RESULT:
            return _ActionResult(owner)
        if owner.kind is OwnerKind.BLOB and self._digests:
            return _DecodedBlob(owner) if owner.is_compressed else _HashedBlob(owner)
        return _OwnedChunks(owner)

    def _settle(self, storage_id: int, walks: Sequence[_OwnedChunks]) -> None:
        """Decide who keeps the chunks, once all of them were seen."""
        keeper: _OwnedChunks | None = None
        for walk in walks:
            owner = walk.owner
            found = walk.problem()
            if found is None and keeper is not None:
                found = Problem.SHARED, f"storage id {storage_id}"
            if found is None:
                keeper = walk
                continue
            problem, text = found
            self._findings.add(problem, f"{owner.describe()}: {text}", walk.size_bytes)
            self._repairs.drop_record(owner.kind.database, owner.key)
        if keeper is None:
            self._repairs.drop_chunks(storage_id)
        elif isinstance(keeper, _ActionResult) and not self._is_complete(keeper):
            self._findings.notes[Note.INCOMPLETE] += 1

    def _is_complete(self, result: _ActionResult) -> bool:
        """Tell whether all that an action result names is there."""
        database = self._environment.blobs
        for key, size in result.references():
            value = self._txn.get(key, None, database)
            if value is None or value[records.BLOB_SIZE] != size:
                return False
        return True


class _OwnedChunks:
    """The chunks that a record says are its own, one after the other."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.size_bytes = 0
        self._disk_bytes = 0
        self._is_compressed = owner.is_compressed
        self._seed = owner.seed()
        self._next = 0
        self._problem: tuple[Problem, str] | None = None

    def take(self, number: int, digest: bytes, value: memoryview) -> None:
        """See the next chunk."""
        self.size_bytes += len(value)
        if self._problem is not None:
            return
        if number != self._next or number >= self.owner.chunks:
            self._problem = Problem.CHUNKS_WRONG, f"chunk {number} where {self._next} of {self.owner.chunks} should be"
        elif checksum(value, self._seed, number) != digest:
            self._problem = Problem.CHUNK_DAMAGED, f"chunk {number} does not match its checksum"
        elif len(value) != records.CHUNK_BYTES and number != self.owner.chunks - 1 and not self._is_compressed:
            self._problem = Problem.CHUNKS_WRONG, f"chunk {number} has {len(value)} bytes"
        else:
            self._next += 1
            if self._is_compressed:
                self._disk_bytes += records.chunk_disk_bytes(len(value))
            self.see(value)

    def see(self, value: memoryview) -> None:
        """See the bytes of a chunk that is in order."""

    def problem(self) -> tuple[Problem, str] | None:
        """Say what is wrong, now that all chunks were seen."""
        if self._problem is not None:
            return self._problem
        if self._next != self.owner.chunks:
            return Problem.CHUNKS_WRONG, f"{self._next} of {self.owner.chunks} chunks"
        if self.size_bytes != self.owner.size_bytes:
            return Problem.CHUNKS_WRONG, f"{self.size_bytes} bytes instead of {self.owner.size_bytes}"
        if self._is_compressed and self._disk_bytes != self.owner.disk_bytes:
            return Problem.CHUNKS_WRONG, f"its chunks count as {self.owner.disk_bytes} on disk, not {self._disk_bytes}"
        return None


class _HashedBlob(_OwnedChunks):
    """A blob that is hashed on the way."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._hasher: Hasher = DigestFunction(owner.key[0]).new_hasher()

    @override
    def see(self, value: memoryview) -> None:
        self._hasher.update(value)

    @override
    def problem(self) -> tuple[Problem, str] | None:
        found = super().problem()
        if found is None and self._hasher.hexdigest() != self.owner.key[1:].hex():
            return Problem.DIGEST, f"its bytes are those of {self._hasher.hexdigest()}"
        return found


class _DecodedBlob(_HashedBlob):
    """A compressed blob that is decoded and hashed on the way."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._decoder = ZstdDecoder(owner.decoded_bytes, is_verified=True)
        self._malformed: str | None = None

    @override
    def see(self, value: memoryview) -> None:
        if self._malformed is not None:
            return
        try:
            for piece in self._decoder.decode(value):
                self._hasher.update(piece)
        except MalformedZstdError as error:
            self._malformed = str(error)

    @override
    def problem(self) -> tuple[Problem, str] | None:
        if self._problem is None and self._malformed is None and self._next == self.owner.chunks:
            try:
                self._decoder.finish()
            except MalformedZstdError as error:
                self._malformed = str(error)
        found = super().problem()
        if self._malformed is not None and (found is None or found[0] is Problem.DIGEST):
            return Problem.DIGEST, self._malformed
        return found


class _ActionResult(_OwnedChunks):
    """An action result, of which the references are kept."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self._key_bytes = len(owner.key) - INSTANCE_BYTES
        self._wanted = owner.references * (self._key_bytes + records.SIZE.size)
        self._references = bytearray()

    @override
    def see(self, value: memoryview) -> None:
        self._references += value[: self._wanted - len(self._references)]

    def references(self) -> Iterator[tuple[bytes, bytes]]:
        """Give key and packed size of all that it names."""
        step = self._key_bytes + records.SIZE.size
        for start in range(0, self._wanted, step):
            key_end = start + self._key_bytes
            yield bytes(self._references[start:key_end]), bytes(self._references[key_end : start + step])


class _Garbage(_OwnedChunks):
    """Chunks of something that was dropped: freed from the front, whatever they hold."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.size_bytes = 0
        self._count = 0

    @override
    def take(self, number: int, digest: bytes, value: memoryview) -> None:
        self.size_bytes += len(value)
        self._count += 1

    @override
    def problem(self) -> tuple[Problem, str] | None:
        if self._count != self.owner.chunks:
            return Problem.CHUNKS_WRONG, f"{self._count} of {self.owner.chunks} chunks"
        return None
