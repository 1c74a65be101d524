"""The indexes and the access log: what each record says by itself, and whether eviction sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lathe_cas.fsck.entries import (
    INSTANCE_BYTES,
    NEVER_REACHED,
    UPLOAD_SIZE,
    Owner,
    OwnerKind,
    describe_record,
    is_compressed_by_client,
    is_digest_key,
    log_item,
    upload_digest_key,
)
from lathe_cas.fsck.findings import Note, Problem
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_access_log import GROUP_KEY, MAX_GROUP_ENTRIES, decode_keys, encode_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lmdb
    from lmdb import _Database as Database

    from lathe_cas.fsck.external_sort import ExternalSort
    from lathe_cas.fsck.findings import Findings
    from lathe_cas.fsck.progress import Progress
    from lathe_cas.fsck.repairs import Repairs
    from lathe_cas.stores.lmdb_environment import LmdbEnvironment

BLOB_BYTES = 42
ACTION_RESULT_BYTES = 37
UPLOAD_BYTES = 53
GARBAGE_BYTES = 12
"""Lengths of the records, as docs/storage-format.md has them."""

_INDEX = records.INDEX_OVERHEAD_BYTES


class _Misfit(Exception):  # noqa: N818 -- never leaves this module
    """A record that contradicts itself; the text says how."""


class _Checked(NamedTuple):
    """A record that makes sense."""

    owner: Owner
    step: bytes
    disk_bytes: int


class IndexCheck:
    """Walks every record once, in the order of the databases.

    Args:
        txn: A read transaction.
        environment: The store.
        findings: Where to note what is bad.
        repairs: Where to note what has to be done.
        progress: Where to show how far it is.

    Attributes:
        totals: What the records that make sense add up to, with the lowest numbers that the counters may have.
    """

    def __init__(
        self,
        txn: lmdb.Transaction[memoryview],
        environment: LmdbEnvironment,
        findings: Findings,
        repairs: Repairs,
        progress: Progress,
    ) -> None:
        self.totals = records.Totals()
        self._txn = txn
        self._environment = environment
        self._findings = findings
        self._repairs = repairs
        self._progress = progress

    def read_log(self, entries: ExternalSort) -> None:
        """Walk the access log, and write its entries down for ``check``."""
        for key, value in self._walk("access log", self._environment.access):
            keys = _group_keys(key, value)
            if keys is None:
                self._findings.add(Problem.LOG_GROUP, f"group 0x{key.hex()} of the access log")
                self._repairs.drop_log_group(key)
                continue
            _, kind, sequence = GROUP_KEY.unpack(key)
            self.totals.next_sequence = max(self.totals.next_sequence, sequence + 1)
            self.totals.log_entries += len(keys)
            step = key[:4]
            for entry in keys:
                entries.add(log_item(kind, entry, step))

    def check(self, entries: Iterator[bytes], owners: ExternalSort) -> None:
        """Walk all records, and write down which chunks they own.

        Args:
            entries: What ``read_log`` wrote down, in order.
            owners: Where to write it.
        """
        environment = self._environment
        log = _LogWalk(entries)
        for key, record in self._check_all("action results", environment.action_results, _action_result, owners):
            self._look_for_entry(log, KIND_ACTION_RESULT, key, record.step)
            self.totals.action_results += 1
            self.totals.action_result_bytes += record.disk_bytes
        for key, record in self._check_all("blobs", environment.blobs, _blob, owners):
            self._look_for_entry(log, KIND_BLOB, key, record.step)
            self.totals.blobs += 1
            self.totals.blob_bytes += record.owner.decoded_bytes
            self.totals.stored_bytes += record.disk_bytes
        for _, record in self._check_all("uploads", environment.uploads, _upload, owners):
            self.totals.staged_bytes += record.disk_bytes + _INDEX
            self._findings.notes[Note.UPLOADS] += 1
        for _, record in self._check_all("garbage", environment.garbage, _garbage, owners):
            self.totals.garbage_bytes += record.disk_bytes
            self._findings.notes[Note.GARBAGE] += 1
        self._findings.notes[Note.STALE] += self.totals.log_entries - log.matched

    def _look_for_entry(self, log: _LogWalk, kind: int, key: bytes, step: bytes) -> None:
        if not log.has(log_item(kind, key, step)):
            self._findings.add(Problem.LOG_ENTRY, describe_record(kind, key))
            self._repairs.log(kind, key)

    def _check_all(
        self, name: str, database: Database, check: Callable[[bytes, bytes], _Checked], owners: ExternalSort
    ) -> Iterator[tuple[bytes, _Checked]]:
        """Give the records that make sense; the others are noted, and their chunks are left without an owner."""
        for key, value in self._walk(name, database):
            try:
                record = check(key, value)
            except _Misfit as misfit:
                self._findings.add(Problem.RECORD, f"{name}, key 0x{key.hex()}: {misfit}")
                self._repairs.drop_record(name.replace(" ", "_"), key)
                continue
            self.totals.next_storage_id = max(self.totals.next_storage_id, record.owner.storage_id + 1)
            owners.add(record.owner.pack())
            yield key, record

    def _walk(self, name: str, database: Database) -> Iterator[tuple[bytes, bytes]]:
        count = self._txn.stat(database)["entries"]
        with self._progress.phase(name, count):
            for key, value in self._txn.cursor(database):
                yield bytes(key), bytes(value)
                self._progress.step()
        self._findings.checked[name] += count


class _LogWalk:
    """The access log in the order of the indexes, walked beside them."""

    def __init__(self, entries: Iterator[bytes]) -> None:
        self.matched = 0
        self._entries = entries
        self._entry = next(entries, None)

    def has(self, item: bytes) -> bool:
        """Tell whether an entry is there. To be asked in ascending order."""
        entry = self._entry
        while entry is not None and entry < item:
            entry = next(self._entries, None)
        self._entry = entry
        if entry != item:
            return False
        self.matched += 1
        return True


def _group_keys(key: bytes, value: bytes) -> list[bytes] | None:
    """Return the keys of a group; None if it makes no sense."""
    if len(key) != GROUP_KEY.size:
        return None
    _, kind, sequence = GROUP_KEY.unpack(key)
    keys = decode_keys(value)
    if kind not in (KIND_BLOB, KIND_ACTION_RESULT) or sequence >= NEVER_REACHED:
        return None
    if not 0 < len(keys) <= MAX_GROUP_ENTRIES or encode_keys(keys) != value:
        return None
    skip = 0 if kind == KIND_BLOB else INSTANCE_BYTES
    return keys if all(is_digest_key(entry[skip:]) for entry in keys) else None


def _check_length(value: bytes, length: int) -> None:
    if len(value) != length:
        raise _Misfit(f"{len(value)} bytes instead of {length}")


def _check_storage_id(storage_id: int) -> None:
    if not 0 < storage_id < NEVER_REACHED:
        raise _Misfit(f"storage id {storage_id}")


def _check_chunks(storage_id: int, chunks: int, size_bytes: int) -> None:
    _check_storage_id(storage_id)
    if chunks != records.chunk_count(size_bytes):
        raise _Misfit(f"{size_bytes} bytes in {chunks} chunks")


def _check_stream(storage_id: int, chunks: int, stored_bytes: int, compression: int) -> None:
    """Check what can be said of a stream whose chunks may have any length."""
    _check_storage_id(storage_id)
    if compression != records.COMPRESSION_ZSTD:
        raise _Misfit(f"compression {compression}")
    if not records.chunk_count(stored_bytes) <= chunks <= stored_bytes:
        raise _Misfit(f"{stored_bytes} bytes in {chunks} chunks")


def _blob(key: bytes, value: bytes) -> _Checked:
    _check_length(value, BLOB_BYTES)
    record = records.BlobRecord.unpack(value)
    size_bytes, stored_bytes, compression = record.size_bytes, record.stored_bytes, record.compression
    if not is_digest_key(key):
        raise _Misfit("the key is no digest")
    if record.layout != records.LAYOUT_PLAIN:
        raise _Misfit(f"layout {record.layout}")
    to_check_bytes = 0
    if compression:
        _check_stream(record.storage_id, record.chunks, stored_bytes, compression)
        to_check_bytes = record.disk_bytes - _INDEX
    else:
        _check_chunks(record.storage_id, record.chunks, size_bytes)
    if not size_bytes or not (compression or size_bytes == stored_bytes):
        raise _Misfit(f"{size_bytes} bytes, {stored_bytes} stored")
    if to_check_bytes < 0 or not (compression or record.disk_bytes == records.blob_disk_bytes(size_bytes) + _INDEX):
        raise _Misfit(f"{size_bytes} bytes count as {record.disk_bytes} on disk")
    owner = Owner(
        record.storage_id,
        OwnerKind.BLOB,
        record.chunks,
        stored_bytes,
        0,
        compression,
        size_bytes,
        to_check_bytes,
        key,
    )
    return _Checked(owner, value[records.BLOB_STEP], record.disk_bytes)


def _action_result(key: bytes, value: bytes) -> _Checked:
    _check_length(value, ACTION_RESULT_BYTES)
    record = records.ActionResultRecord.unpack(value)
    _check_chunks(record.storage_id, record.chunks, record.payload_bytes)
    digest_key = key[INSTANCE_BYTES:]
    if not is_digest_key(digest_key):
        raise _Misfit("the key is no instance and digest")
    if record.references * (len(digest_key) + records.SIZE.size) > record.payload_bytes:
        raise _Misfit(f"{record.references} references in {record.payload_bytes} bytes")
    if record.disk_bytes != records.blob_disk_bytes(record.payload_bytes) + _INDEX:
        raise _Misfit(f"{record.payload_bytes} bytes count as {record.disk_bytes} on disk")
    if record.flags & ~records.REFERENCES_INCOMPLETE:
        raise _Misfit(f"flags {record.flags}")
    owner = Owner(
        record.storage_id,
        OwnerKind.ACTION_RESULT,
        record.chunks,
        record.payload_bytes,
        record.references,
        record.flags,
        0,
        0,
        key,
    )
    return _Checked(owner, value[records.ACTION_RESULT_STEP], record.disk_bytes)


def _upload(key: bytes, value: bytes) -> _Checked:
    _check_length(value, UPLOAD_BYTES)
    record = records.UploadRecord.unpack(value)
    committed_bytes, stored_bytes, compression = record.committed_bytes, record.stored_bytes, record.compression
    if not is_digest_key(upload_digest_key(key)):
        raise _Misfit("the key has no digest")
    (size_bytes,) = records.SIZE.unpack(key[UPLOAD_SIZE])
    comes_compressed = is_compressed_by_client(key)
    if comes_compressed and not compression:
        raise _Misfit("the key is that of a compressed upload, the record is not")
    # What a client compresses counts as it came, and may be a little longer than the blob.
    if not comes_compressed and committed_bytes > size_bytes:
        raise _Misfit(f"{committed_bytes} bytes of {size_bytes}")
    if (comes_compressed or not compression) and committed_bytes != stored_bytes:
        raise _Misfit(f"{committed_bytes} bytes, {stored_bytes} stored")
    if compression:
        _check_stream(record.storage_id, record.chunks, stored_bytes, compression)
    else:
        _check_chunks(record.storage_id, record.chunks, committed_bytes)
        if record.disk_bytes != records.blob_disk_bytes(committed_bytes):
            raise _Misfit(f"{committed_bytes} bytes count as {record.disk_bytes} on disk")
    to_check_bytes = record.disk_bytes if compression else 0
    owner = Owner(
        record.storage_id,
        OwnerKind.UPLOAD,
        record.chunks,
        stored_bytes,
        0,
        compression,
        committed_bytes,
        to_check_bytes,
        key,
    )
    return _Checked(owner, b"", record.disk_bytes)


def _garbage(key: bytes, value: bytes) -> _Checked:
    _check_length(value, GARBAGE_BYTES)
    record = records.GarbageRecord.unpack(value)
    if len(key) != records.STORAGE_ID.size:
        raise _Misfit("the key is no storage id")
    (storage_id,) = records.STORAGE_ID.unpack(key)
    if not 0 < storage_id < NEVER_REACHED or not record.chunks:
        raise _Misfit(f"{record.chunks} chunks of storage id {storage_id}")
    return _Checked(Owner(storage_id, OwnerKind.GARBAGE, record.chunks, 0, 0, 0, 0, 0, key), b"", record.disk_bytes)
