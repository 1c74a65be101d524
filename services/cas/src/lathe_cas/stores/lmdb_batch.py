"""One write transaction: the changes that operations are made of.

Each method keeps index, chunks, access log and totals in step with one another; nothing else writes to the databases.
All of it runs in the writer's thread, inside one transaction that commits or vanishes as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import structlog

from lathe_cas.stores import lmdb_access_log as access_log
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_chunks import (
    blob_seed,
    chunk_seed,
    delete_chunks,
    has_exactly,
    is_owner,
    length_of,
    put_chunks,
)
from lathe_cas.stores.lmdb_eviction import EvictionEffort, evict
from lathe_shared.errors import ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lmdb
    from lmdb import _Database as Database

    from lathe_cas.eviction_policy import EvictionPolicy
    from lathe_cas.stores.lmdb_chunks import Chunk
    from lathe_cas.stores.lmdb_environment import LmdbEnvironment

FREE_AT_ONCE_CHUNKS = 64
"""Blobs of up to this many chunks (4 MiB) are freed where they are dropped; larger ones step by step."""

LARGE_WRITE_BYTES = 256 << 10
"""What needs more room than this is large. For small things, action results and most blobs, room is made apart, so that
they never wait for the room of large ones."""

MAX_EVICTED_FOR_ROOM = 1024
"""How many things go in one transaction to make room for large writes, and how many for small ones: some 25 ms each
time. As many as make room for the largest small write if each is no larger than what it costs in the index."""

VERIFIED_IN_EVICTION_BYTES = records.PAGE_BYTES - records.PAGE_HEADER_BYTES
"""Up to this length a chunk is verified before eviction deletes it: it lies in one page, which deleting reads anyway.
Longer ones would have to be read from the disk for that, since what is evicted was not used for long. Measured, with
nothing in memory: 65,520 bytes take 1.3 ms instead of 0.08, and 4,000 take no longer than before."""

_STORAGE_IDS_END = 1 << 62
"""No counter comes here. A storage id beyond it is damage, and others must not follow behind it."""

_INDEX = records.INDEX_OVERHEAD_BYTES

_log = structlog.get_logger(__name__)


class RoomNotYetError(Exception):
    """Room is being made, and more of it than one transaction has time for: the operation is to be put off."""


class WaitingWrite(NamedTuple):
    """A large write that was put off.

    Attributes:
        disk_bytes: The room that it needs, which no other write takes.
        freed_bytes: What was evicted for it so far.
    """

    disk_bytes: int
    freed_bytes: int


@dataclass(slots=True)
class BatchReport:
    """What a batch did besides what it was asked to; for metrics."""

    evicted_blobs: int = 0
    evicted_bytes: int = 0
    evicted_action_results: int = 0
    last_evicted_age_seconds: int | None = None
    least_evicted_age_seconds: int | None = None
    refused_writes: int = 0
    refused_bytes: int = 0
    written_blobs: int = 0
    written_bytes: int = 0
    compressed_blobs: int = 0
    compression_saved_bytes: int = 0
    touched: int = 0
    expired_uploads: int = 0

    def add(self, other: BatchReport) -> None:
        """Add another batch's figures to these."""
        self.evicted_blobs += other.evicted_blobs
        self.evicted_bytes += other.evicted_bytes
        self.evicted_action_results += other.evicted_action_results
        if other.last_evicted_age_seconds is not None and other.least_evicted_age_seconds is not None:
            self.note_evicted_age(other.least_evicted_age_seconds)
            self.last_evicted_age_seconds = other.last_evicted_age_seconds
        self.refused_writes += other.refused_writes
        self.refused_bytes += other.refused_bytes
        self.written_blobs += other.written_blobs
        self.written_bytes += other.written_bytes
        self.compressed_blobs += other.compressed_blobs
        self.compression_saved_bytes += other.compression_saved_bytes
        self.touched += other.touched
        self.expired_uploads += other.expired_uploads

    def note_evicted_age(self, age_seconds: int) -> None:
        """Note for how long something that was evicted had not been used."""
        least = self.least_evicted_age_seconds
        self.last_evicted_age_seconds = age_seconds
        self.least_evicted_age_seconds = age_seconds if least is None else min(least, age_seconds)


class WriteBatch:
    """The changes that one write transaction may make.

    Args:
        environment: The store.
        txn: A write transaction of it.
        step: The current touch step.
        policy: The size limit.
        waiting: The large write that an earlier transaction put off, and that comes before other large ones in this.

    Attributes:
        waiting: The large write that this transaction puts off, as ``waiting`` for the next one.
    """

    def __init__(
        self,
        environment: LmdbEnvironment,
        txn: lmdb.Transaction[bytes],
        step: int,
        policy: EvictionPolicy,
        waiting: WaitingWrite | None = None,
    ) -> None:
        self.environment = environment
        self.txn = txn
        self.step = step
        self.policy = policy
        self.report = BatchReport()
        self.totals = environment.totals_in(txn)
        self._totals_before = self.totals.pack()
        self.changes = 0
        """Counts changes by operations, so that one which fails after its first change is noticed."""
        self._step_bytes = records.STEP.pack(step)
        self._appends: bool | None = None
        self._log_entries: dict[int, list[bytes]] = {KIND_ACTION_RESULT: [], KIND_BLOB: []}
        self.waiting: WaitingWrite | None = None
        self._waited = waiting
        self._small_ones_wait = False
        self._large_effort = EvictionEffort(MAX_EVICTED_FOR_ROOM)
        self._small_effort = EvictionEffort(MAX_EVICTED_FOR_ROOM)

    @property
    def evicted_for_room(self) -> int:
        """How many evictions the room that was made so far is worth."""
        return self._large_effort.evicted + self._small_effort.evicted

    def finish(self) -> None:
        """Write the access log's new entries and the totals; the last call before the commit."""
        self.flush_log()
        # A transaction that changes nothing costs no fsync.
        if self.totals.pack() != self._totals_before or self.changes:
            self.environment.put_totals(self.txn, self.totals)

    # Room

    def reserve(self, disk_bytes: int) -> None:
        """Make room for ``disk_bytes`` more, by eviction if need be. Called before an operation's first change.

        However small what has to go is, it is a bounded piece of work: what is not done then is for the next
        transaction. What has gone until then stays gone.

        Raises:
            RoomNotYetError: That is the case, or an operation before this one waits for room.
            ResourceExhaustedError: Not even eviction makes enough room.
        """
        limit_bytes = self.policy.limit_bytes
        if self.totals.staged_bytes + disk_bytes > limit_bytes:
            self._note_refused(disk_bytes)
            raise ResourceExhaustedError(
                f"{disk_bytes} bytes more do not fit into the store: of its limit of {limit_bytes} bytes (setting "
                f"max_size_bytes), unfinished uploads hold {self.totals.staged_bytes}"
            )
        changes = self.changes
        excess = self._make_large_room(disk_bytes) if disk_bytes > LARGE_WRITE_BYTES else self._make_room(disk_bytes)
        freed = 0
        while (
            self.totals.garbage_bytes
            and freed < disk_bytes
            and self.policy.excess_for(self.totals.used_bytes, disk_bytes)
        ):
            freed += self.free_garbage(FREE_AT_ONCE_CHUNKS)
        # Eviction may stay, whatever becomes of the operation that asked for room.
        self.changes = changes
        if excess > 0:
            self._note_refused(disk_bytes)
            raise ResourceExhaustedError(self._nothing_may_go(disk_bytes))

    def _note_refused(self, disk_bytes: int) -> None:
        self.report.refused_writes += 1
        self.report.refused_bytes += disk_bytes

    def _make_room(self, disk_bytes: int) -> int:
        """Evict for a small write; return the bytes that are lacking though nothing more may go, or nothing."""
        if self._small_ones_wait:
            raise RoomNotYetError
        waiting = self.waiting or self._waited
        excess = self._evict_excess(disk_bytes, waiting.disk_bytes if waiting else 0, 0, self._small_effort)
        if excess > 0 and self._small_effort.is_spent:
            self._small_ones_wait = True
            raise RoomNotYetError
        # What can't be kept for a large write, since nothing more may go, is not kept for it.
        return min(excess, self.policy.excess_for(self.totals.kept_bytes, disk_bytes)) if waiting else excess

    def _make_large_room(self, disk_bytes: int) -> int:
        """Do the same for a large write: the one that waited longest, and then others, as far as the effort goes."""
        if self.waiting is not None:
            raise RoomNotYetError
        freed_bytes = self._waited.freed_bytes if self._waited else 0
        self._waited = None
        kept_bytes = self.totals.kept_bytes
        excess = self._evict_excess(disk_bytes, 0, freed_bytes, self._large_effort)
        if excess > 0 and self._large_effort.is_spent:
            self.waiting = WaitingWrite(disk_bytes, freed_bytes + kept_bytes - self.totals.kept_bytes)
            raise RoomNotYetError
        return excess

    def _evict_excess(self, disk_bytes: int, others_bytes: int, freed_bytes: int, effort: EvictionEffort) -> int:
        """Evict until ``disk_bytes`` fit beside ``others_bytes``; return how many bytes are lacking, if any.

        Args:
            disk_bytes: What is to fit.
            others_bytes: Room to be left for other writes.
            freed_bytes: What was evicted before for the same write.
            effort: What may be spent.
        """
        excess = self.policy.excess_for(self.totals.kept_bytes + others_bytes, disk_bytes)
        if self.totals.kept_bytes > self.policy.limit_bytes:
            # After the limit was lowered background eviction brings the store down to it, and nobody waits for that:
            # until then each brings no more than it pushes out.
            excess = disk_bytes - freed_bytes
        excess = min(disk_bytes, excess)
        if excess > 0:
            excess -= evict(self, excess, effort)
        if excess > 0 and not effort.is_spent:
            self.flush_log()
            excess -= evict(self, excess, effort)
        return excess

    def _nothing_may_go(self, disk_bytes: int) -> str:
        """Say why there is no room, with the figures that an operator needs."""
        totals = self.totals
        policy = self.policy
        unfinished = f"unfinished uploads hold {totals.staged_bytes} of them"
        text = (
            f"the store is full: {disk_bytes} bytes more do not fit, {totals.kept_bytes} bytes are kept, the limit is "
            f"{policy.limit_bytes} (setting max_size_bytes), and nothing may be evicted now: {unfinished}"
        )
        if not policy.lease_seconds:
            return text
        oldest = access_log.first_group(self.txn, self.environment.access)
        seconds = 0 if oldest is None else policy.seconds_until_free(oldest.step, self.step)
        return (
            f"{text}, and the rest was used within the last {policy.lease_seconds} seconds (setting lease_seconds); "
            f"the first of it may go in {seconds} seconds. Raise max_size_bytes or lower lease_seconds"
        )

    def new_storage_id(self) -> int:
        """Return a storage id that was never used."""
        if self._appends is None:
            self._appends = self._check_storage_ids()
        storage_id = self.totals.next_storage_id
        self.totals.next_storage_id += 1
        return storage_id

    def _check_storage_ids(self) -> bool:
        """Have new storage ids begin behind all that have chunks, whatever the totals say, since those may be damaged.

        Returns:
            Whether chunks with such an id come last in the database. They do not if a damaged key stands there.
        """
        cursor = self.txn.cursor(self.environment.chunks)
        is_last = True
        found = cursor.last()
        if found and cursor.key() >= records.STORAGE_ID.pack(_STORAGE_IDS_END):
            is_last = False
            cursor.set_range(records.STORAGE_ID.pack(_STORAGE_IDS_END))
            found = cursor.prev()
        largest = int.from_bytes(cursor.key()[:8].ljust(8, b"\0"), "big") if found else 0
        totals = self.totals
        if not largest < totals.next_storage_id < _STORAGE_IDS_END:
            _log.error("storage_ids_damaged", next=totals.next_storage_id, largest=largest)
            totals.next_storage_id = largest + 1
        return is_last

    # Blobs

    def blob(self, key: bytes) -> records.BlobRecord | None:
        """Return a blob's record."""
        value = self.txn.get(key, db=self.environment.blobs)
        return None if value is None else records.BlobRecord.unpack(value)

    def add_blob(
        self, key: bytes, size_bytes: int, chunks: Sequence[Chunk], compression: int = records.COMPRESSION_NONE
    ) -> None:
        """Store a whole, verified blob that is not there. Room is reserved already."""
        storage_id = self.new_storage_id()
        self.stage_chunks(storage_id, 0, chunks, newest=True)
        disk_bytes = sum(chunk.disk_bytes for chunk in chunks)
        stored_bytes = length_of(chunks) if compression else size_bytes
        self._index_blob(key, size_bytes, storage_id, len(chunks), disk_bytes, stored_bytes, compression)

    def publish_upload(self, key: bytes, size_bytes: int, upload_key: bytes, upload: records.UploadRecord) -> bool:
        """Turn a whole, verified upload into a blob: one record put, one deleted.

        Returns:
            Whether the blob is new; if it was there, the upload's chunks become garbage.
        """
        if self.has_blob(key, size_bytes):
            self.drop_upload(upload_key, upload)
            return False
        self.changes += 1
        self.txn.delete(upload_key, db=self.environment.uploads)
        self.totals.staged_bytes -= upload.disk_bytes + _INDEX
        self._index_blob(
            key,
            size_bytes,
            upload.storage_id,
            upload.chunks,
            upload.disk_bytes,
            upload.stored_bytes,
            upload.compression,
        )
        return True

    def _index_blob(
        self,
        key: bytes,
        size_bytes: int,
        storage_id: int,
        chunks: int,
        disk_bytes: int,
        stored_bytes: int,
        compression: int,
    ) -> None:
        self.changes += 1
        record = records.BlobRecord(
            size_bytes,
            self.step,
            storage_id,
            stored_bytes,
            disk_bytes + _INDEX,
            chunks,
            records.LAYOUT_PLAIN,
            compression,
        )
        self.txn.put(key, record.pack(), db=self.environment.blobs)
        self._log_entries[KIND_BLOB].append(key)
        totals = self.totals
        totals.blobs += 1
        totals.blob_bytes += size_bytes
        totals.stored_bytes += record.disk_bytes
        self.report.written_blobs += 1
        self.report.written_bytes += size_bytes
        if compression:
            self.report.compressed_blobs += 1
            self.report.compression_saved_bytes += records.blob_disk_bytes(size_bytes) - disk_bytes

    def has_blob(self, key: bytes, size_bytes: int) -> bool:
        """Tell whether a blob is there, and touch it. A record that says another size is damaged, and goes."""
        record = self.blob(key)
        if record is None:
            return False
        if record.size_bytes != size_bytes:
            self.drop_blob(key, record)
            return False
        return self.touch(KIND_BLOB, key)

    def drop_blob(
        self, key: bytes, record: records.BlobRecord, *, keep_chunks: bool = False, is_cold: bool = False
    ) -> None:
        """Make a blob vanish. What takes long to free becomes garbage.

        Args:
            key: The blob.
            record: Its record.
            keep_chunks: Leave its chunks where they are, since LMDB cannot go there; fsck finds them.
            is_cold: Whether its chunks are hardly in memory, so that they should not be read if they are long.
        """
        self.changes += 1
        self.txn.delete(key, db=self.environment.blobs)
        totals = self.totals
        totals.blobs -= 1
        totals.blob_bytes -= record.size_bytes
        totals.stored_bytes -= record.disk_bytes
        if not keep_chunks:
            # What is compressed has chunks of any length.
            is_cut_evenly = record.chunks == 1 or not record.compression
            last_bytes = _last_chunk_bytes(record.chunks, record.stored_bytes) if is_cut_evenly else records.CHUNK_BYTES
            seed = blob_seed(key, record.compression)
            self._discard(
                record.storage_id, record.chunks, record.disk_bytes, seed, cold_bytes=last_bytes if is_cold else None
            )

    # Uploads

    def upload(self, upload_key: bytes) -> records.UploadRecord | None:
        """Return an unfinished upload's record."""
        value = self.txn.get(upload_key, db=self.environment.uploads)
        return None if value is None else records.UploadRecord.unpack(value)

    def is_superfluous(self, upload_key: bytes) -> bool:
        """Tell whether the blob of an unfinished upload is there, by whatever way: nobody goes on with it then."""
        value = self.txn.get(upload_key[records.UPLOAD_BLOB], b"", self.environment.blobs)
        return value[records.BLOB_SIZE] == upload_key[records.UPLOAD_SIZE]

    def put_upload(self, upload_key: bytes, old: records.UploadRecord | None, new: records.UploadRecord) -> None:
        """Store what is known of an unfinished upload."""
        self.changes += 1
        self.txn.put(upload_key, new.pack(), db=self.environment.uploads)
        self.totals.staged_bytes += new.disk_bytes - (old.disk_bytes if old else -_INDEX)

    def stage_chunks(self, storage_id: int, first_number: int, chunks: Sequence[Chunk], *, newest: bool) -> None:
        """Write chunks, of an unfinished upload or of anything else. Room is reserved already."""
        self.changes += 1
        appends = newest and bool(self._appends)
        put_chunks(self.txn, self.environment.chunks, storage_id, first_number, chunks, newest=appends)

    def unstage_chunk(self, storage_id: int, number: int) -> None:
        """Delete one chunk of an unfinished upload: a part chunk that is about to be written whole."""
        self.changes += 1
        delete_chunks(self.txn, self.environment.chunks, storage_id, number, 1)

    def drop_upload(self, upload_key: bytes, record: records.UploadRecord) -> None:
        """Forget an unfinished upload."""
        self.changes += 1
        self.txn.delete(upload_key, db=self.environment.uploads)
        self.totals.staged_bytes -= record.disk_bytes + _INDEX
        seed = blob_seed(records.upload_blob_key(upload_key), record.compression)
        self._discard(record.storage_id, record.chunks, record.disk_bytes, seed)

    # Action results

    def action_result(self, key: bytes) -> records.ActionResultRecord | None:
        """Return an action result's record."""
        value = self.txn.get(key, db=self.environment.action_results)
        return None if value is None else records.ActionResultRecord.unpack(value)

    def put_action_result(
        self, key: bytes, payload_bytes: int, chunks: Sequence[Chunk], references: int, flags: int
    ) -> None:
        """Store an action result in place of what was there. Room is reserved already."""
        old = self.action_result(key)
        if old is not None:
            self.drop_action_result(key, old)
        storage_id = self.new_storage_id()
        self.stage_chunks(storage_id, 0, chunks, newest=True)
        disk_bytes = sum(chunk.disk_bytes for chunk in chunks) + _INDEX
        record = records.ActionResultRecord(
            self.step, storage_id, payload_bytes, disk_bytes, len(chunks), references, flags
        )
        self.txn.put(key, record.pack(), db=self.environment.action_results)
        self._log_entries[KIND_ACTION_RESULT].append(key)
        self.totals.action_results += 1
        self.totals.action_result_bytes += disk_bytes

    def drop_action_result(
        self, key: bytes, record: records.ActionResultRecord, *, keep_chunks: bool = False, is_cold: bool = False
    ) -> None:
        """Make an action result vanish; the arguments are those of ``drop_blob``."""
        self.changes += 1
        self.txn.delete(key, db=self.environment.action_results)
        self.totals.action_results -= 1
        self.totals.action_result_bytes -= record.disk_bytes
        if not keep_chunks:
            last_bytes = _last_chunk_bytes(record.chunks, record.payload_bytes)
            seed = chunk_seed(record.identity(key))
            self._discard(
                record.storage_id, record.chunks, record.disk_bytes, seed, cold_bytes=last_bytes if is_cold else None
            )

    # Access order and eviction

    def touch(self, kind: int, key: bytes) -> bool:
        """Note that a key is used now; False if it is not there."""
        database, place = self.index_of(kind)
        value = self.txn.get(key, db=database)
        if value is None:
            return False
        if value[place] < self._step_bytes:
            self.txn.put(key, value[: place.start] + self._step_bytes + value[place.stop :], db=database)
            self._log_entries[kind].append(key)
            self.report.touched += 1
        return True

    def index_of(self, kind: int) -> tuple[Database, slice]:
        """Return the index that an access log entry of this kind points into, and where its records hold the step."""
        if kind == KIND_BLOB:
            return self.environment.blobs, records.BLOB_STEP
        return self.environment.action_results, records.ACTION_RESULT_STEP

    def flush_log(self) -> None:
        """Write the access log's new entries, which eviction can then see."""
        totals = self.totals
        for kind, keys in self._log_entries.items():
            totals.next_sequence = access_log.append_groups(
                self.txn, self.environment.access, self.step, kind, totals.next_sequence, keys
            )
            totals.log_entries += len(keys)
            keys.clear()

    # Garbage

    def free_garbage(self, max_chunks: int) -> int:
        """Free up to ``max_chunks`` chunks that nothing refers to, and return their bytes on disk."""
        cursor = self.txn.cursor(self.environment.garbage)
        if not cursor.first():
            self.totals.garbage_bytes = 0
            return 0
        key, value = cursor.item()
        record = records.GarbageRecord.unpack(value)
        (storage_id,) = records.STORAGE_ID.unpack(key)
        count = min(max_chunks, record.chunks)
        # Fewer than there should be: a damaged record, or chunks that went otherwise. There are no others behind them.
        whole = delete_chunks(self.txn, self.environment.chunks, storage_id, 0, count) == count
        left = record.chunks - count if whole else 0
        freed = record.disk_bytes if not left else record.disk_bytes * count // record.chunks
        if left:
            rest = records.GarbageRecord(left, record.disk_bytes - freed)
            self.txn.put(key, rest.pack(), db=self.environment.garbage)
        else:
            self.txn.delete(key, db=self.environment.garbage)
        self.totals.garbage_bytes -= freed
        return freed

    def _discard(
        self, storage_id: int, chunks: int, disk_bytes: int, seed: int, *, cold_bytes: int | None = None
    ) -> None:
        """Delete chunks, or make them garbage, if they belong to what had the record.

        The record may be damaged, and its storage id that of something whole. What is not proved to be its own is left,
        since nothing tells damaged bytes from another's; fsck can, and finds what belongs to nobody.

        Args:
            storage_id: Where the record says that they are.
            chunks: How many.
            disk_bytes: What they count for.
            seed: What the checksums of its chunks are seeded with.
            cold_bytes: Length of the last one, which may be more than it has, if they are hardly in memory.
        """
        if not chunks:
            return
        if not self._may_delete(storage_id, chunks, seed, cold_bytes):
            _log.error("chunks_left", storage_id=storage_id, chunks=chunks, effect="run lathe-cas fsck --repair")
            return
        if chunks <= FREE_AT_ONCE_CHUNKS:
            delete_chunks(self.txn, self.environment.chunks, storage_id, 0, chunks)
            return
        record = records.GarbageRecord(chunks, disk_bytes)
        self.txn.put(records.STORAGE_ID.pack(storage_id), record.pack(), db=self.environment.garbage)
        self.totals.garbage_bytes += disk_bytes

    def _may_delete(self, storage_id: int, chunks: int, seed: int, cold_bytes: int | None) -> bool:
        database = self.environment.chunks
        if cold_bytes is not None:
            if cold_bytes > VERIFIED_IN_EVICTION_BYTES:
                return has_exactly(self.txn, database, storage_id, chunks)
            if is_owner(self.txn, database, storage_id, seed, (chunks - 1,)):
                return True
        # If the first one is damaged or gone, another one is as good a proof.
        return is_owner(self.txn, database, storage_id, seed, range(min(chunks, FREE_AT_ONCE_CHUNKS)))


def _last_chunk_bytes(chunks: int, size_bytes: int) -> int:
    """Return the length of the last chunk if all others are full."""
    return size_bytes - (chunks - 1) * records.CHUNK_BYTES
