"""One write transaction: the changes that operations are made of.

Each method keeps index, chunks, access log and totals in step with one another; nothing else writes to the databases.
All of it runs in the writer's thread, inside one transaction that commits or vanishes as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_cas.stores import lmdb_access_log as access_log
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_chunks import delete_chunks, length_of, put_chunks
from lathe_cas.stores.lmdb_eviction import evict
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

_INDEX = records.INDEX_OVERHEAD_BYTES


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
    """

    def __init__(
        self,
        environment: LmdbEnvironment,
        txn: lmdb.Transaction[bytes],
        step: int,
        policy: EvictionPolicy,
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
        self._log_entries: dict[int, list[bytes]] = {KIND_ACTION_RESULT: [], KIND_BLOB: []}

    def finish(self) -> None:
        """Write the access log's new entries and the totals; the last call before the commit."""
        self.flush_log()
        # A transaction that changes nothing costs no fsync.
        if self.totals.pack() != self._totals_before or self.changes:
            self.environment.put_totals(self.txn, self.totals)

    # Room

    def reserve(self, disk_bytes: int) -> None:
        """Make room for ``disk_bytes`` more, by eviction if need be. Called before an operation's first change.

        Raises:
            ResourceExhaustedError: Not even eviction makes enough room.
        """
        limit_bytes = self.policy.limit_bytes
        if self.totals.staged_bytes + disk_bytes > limit_bytes:
            raise ResourceExhaustedError(
                f"{disk_bytes} bytes more do not fit into the store: of its limit of {limit_bytes} bytes (setting "
                f"max_size_bytes), unfinished uploads hold {self.totals.staged_bytes}"
            )
        changes = self.changes
        # After the limit was lowered background eviction brings the store down to it, and nobody waits for that: until
        # then each brings no more than it pushes out.
        excess = min(disk_bytes, self.policy.excess_for(self.totals.kept_bytes, disk_bytes))
        if excess:
            excess -= evict(self, excess)
        if excess > 0:
            self.flush_log()
            excess -= evict(self, excess)
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
            self.report.refused_writes += 1
            self.report.refused_bytes += disk_bytes
            raise ResourceExhaustedError(self._nothing_may_go(disk_bytes))

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
        storage_id = self.totals.next_storage_id
        self.totals.next_storage_id += 1
        return storage_id

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
        put_chunks(self.txn, self.environment.chunks, storage_id, 0, chunks, newest=True)
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

    def drop_blob(self, key: bytes, record: records.BlobRecord, *, keep_chunks: bool = False) -> None:
        """Make a blob vanish. What takes long to free becomes garbage.

        Args:
            key: The blob.
            record: Its record.
            keep_chunks: Leave its chunks where they are, since LMDB cannot go there; fsck finds them.
        """
        self.changes += 1
        self.txn.delete(key, db=self.environment.blobs)
        totals = self.totals
        totals.blobs -= 1
        totals.blob_bytes -= record.size_bytes
        totals.stored_bytes -= record.disk_bytes
        if not keep_chunks:
            self._discard(record.storage_id, record.chunks, record.disk_bytes)

    # Uploads

    def upload(self, upload_key: bytes) -> records.UploadRecord | None:
        """Return an unfinished upload's record."""
        value = self.txn.get(upload_key, db=self.environment.uploads)
        return None if value is None else records.UploadRecord.unpack(value)

    def put_upload(self, upload_key: bytes, old: records.UploadRecord | None, new: records.UploadRecord) -> None:
        """Store what is known of an unfinished upload."""
        self.changes += 1
        self.txn.put(upload_key, new.pack(), db=self.environment.uploads)
        self.totals.staged_bytes += new.disk_bytes - (old.disk_bytes if old else -_INDEX)

    def stage_chunks(self, storage_id: int, first_number: int, chunks: Sequence[Chunk], *, newest: bool) -> None:
        """Write chunks of an unfinished upload. Room is reserved already."""
        self.changes += 1
        put_chunks(self.txn, self.environment.chunks, storage_id, first_number, chunks, newest=newest)

    def unstage_chunk(self, storage_id: int, number: int) -> None:
        """Delete one chunk of an unfinished upload: a part chunk that is about to be written whole."""
        self.changes += 1
        delete_chunks(self.txn, self.environment.chunks, storage_id, number, 1)

    def drop_upload(self, upload_key: bytes, record: records.UploadRecord) -> None:
        """Forget an unfinished upload."""
        self.changes += 1
        self.txn.delete(upload_key, db=self.environment.uploads)
        self.totals.staged_bytes -= record.disk_bytes + _INDEX
        self._discard(record.storage_id, record.chunks, record.disk_bytes)

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
        self.changes += 1
        storage_id = self.new_storage_id()
        put_chunks(self.txn, self.environment.chunks, storage_id, 0, chunks, newest=True)
        disk_bytes = sum(chunk.disk_bytes for chunk in chunks) + _INDEX
        record = records.ActionResultRecord(
            self.step, storage_id, payload_bytes, disk_bytes, len(chunks), references, flags
        )
        self.txn.put(key, record.pack(), db=self.environment.action_results)
        self._log_entries[KIND_ACTION_RESULT].append(key)
        self.totals.action_results += 1
        self.totals.action_result_bytes += disk_bytes

    def drop_action_result(self, key: bytes, record: records.ActionResultRecord, *, keep_chunks: bool = False) -> None:
        """Make an action result vanish; the arguments are those of ``drop_blob``."""
        self.changes += 1
        self.txn.delete(key, db=self.environment.action_results)
        self.totals.action_results -= 1
        self.totals.action_result_bytes -= record.disk_bytes
        if not keep_chunks:
            self._discard(record.storage_id, record.chunks, record.disk_bytes)

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

    def _discard(self, storage_id: int, chunks: int, disk_bytes: int) -> None:
        if chunks <= FREE_AT_ONCE_CHUNKS:
            delete_chunks(self.txn, self.environment.chunks, storage_id, 0, chunks)
            return
        record = records.GarbageRecord(chunks, disk_bytes)
        self.txn.put(records.STORAGE_ID.pack(storage_id), record.pack(), db=self.environment.garbage)
        self.totals.garbage_bytes += disk_bytes
