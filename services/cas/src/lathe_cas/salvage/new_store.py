"""The store that is written: everything in ascending storage ids, published when it is whole."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lathe_cas.stores import lmdb_access_log as access_log
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_chunks import Chunk, delete_chunks, put_chunks
from lathe_cas.stores.lmdb_environment import LmdbEnvironment, map_size_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lmdb import _Database as Database

UNFINISHED = "unfinished"
"""Folder inside the target where the file grows, so that nobody takes a part of a store for a store."""

_TRANSACTION_BYTES = 32 << 20
_TRANSACTION_ENTRIES = 16_384
"""Bounds of one transaction, whose changed pages LMDB keeps in memory."""

_LOG_KEYS = 100_000
"""Entries of the access log that are gathered by step before they are written, some 150 bytes of memory each."""


class NewStore:
    """An empty store that is filled.

    Args:
        environment: An environment that nobody else has open.

    Attributes:
        totals: What it counts so far.
    """

    def __init__(self, environment: LmdbEnvironment) -> None:
        self.totals = records.Totals()
        self._environment = environment
        self._txn = environment.env.begin(write=True)
        self._pending_bytes = 0
        self._pending_entries = 0
        self._log: dict[tuple[int, int], list[bytes]] = {}
        self._log_keys = 0
        self._storage_id = 0
        self._chunks = 0
        self._stored_bytes = 0
        self._disk_bytes = 0

    def has(self, kind: int, key: bytes) -> bool:
        """Tell whether a blob or an action result is there."""
        return self._txn.get(key, db=self._index(kind)) is not None

    def begin(self) -> None:
        """Begin with the chunks of a blob or of an action result."""
        self._storage_id = self.totals.next_storage_id
        self.totals.next_storage_id += 1
        self._chunks = self._stored_bytes = self._disk_bytes = 0

    def put(self, data: bytes, checksum: bytes) -> None:
        """Write the next chunk."""
        chunk = Chunk(data, checksum, records.chunk_disk_bytes(len(data)))
        put_chunks(self._txn, self._environment.chunks, self._storage_id, self._chunks, [chunk], newest=True)
        self._chunks += 1
        self._stored_bytes += len(data)
        self._disk_bytes += chunk.disk_bytes
        self._note(len(data))

    def abandon(self) -> None:
        """Take back the chunks that were put since ``begin``."""
        delete_chunks(self._txn, self._environment.chunks, self._storage_id, 0, self._chunks)

    def index_blob(self, key: bytes, size_bytes: int, step: int, compression: int) -> None:
        """Make a blob of the chunks that were put since ``begin``."""
        record = records.BlobRecord(
            size_bytes,
            step,
            self._storage_id,
            self._stored_bytes,
            self._disk_bytes + records.INDEX_OVERHEAD_BYTES,
            self._chunks,
            records.LAYOUT_PLAIN,
            compression,
        )
        self._txn.put(key, record.pack(), db=self._environment.blobs)
        self.totals.blobs += 1
        self.totals.blob_bytes += size_bytes
        self.totals.stored_bytes += record.disk_bytes
        self._log_use(step, KIND_BLOB, key)

    def index_action_result(self, key: bytes, step: int, references: int, flags: int) -> None:
        """Make an action result of the chunks that were put since ``begin``, in place of an older one."""
        disk_bytes = self._disk_bytes + records.INDEX_OVERHEAD_BYTES
        record = records.ActionResultRecord(
            step, self._storage_id, self._stored_bytes, disk_bytes, self._chunks, references, flags
        )
        old = self._txn.get(key, db=self._environment.action_results)
        if old is not None:
            older = records.ActionResultRecord.unpack(old)
            delete_chunks(self._txn, self._environment.chunks, older.storage_id, 0, older.chunks)
            self.totals.action_results -= 1
            self.totals.action_result_bytes -= older.disk_bytes
        self._txn.put(key, record.pack(), db=self._environment.action_results)
        self.totals.action_results += 1
        self.totals.action_result_bytes += disk_bytes
        self._log_use(step, KIND_ACTION_RESULT, key)

    def touch_blob(self, key: bytes, step: int) -> None:
        """Note that a blob that is there was used in this step, too."""
        value = self._txn.get(key, b"", self._environment.blobs)
        record = records.BlobRecord.unpack(value)
        if record.step < step:
            self._txn.put(key, record._replace(step=step).pack(), db=self._environment.blobs)
            self._log_use(step, KIND_BLOB, key)

    def finish(self) -> None:
        """Write what is left, and what it all counts."""
        self._write_log()
        self._environment.put_totals(self._txn, self.totals)
        self._txn.commit()

    def cancel(self) -> None:
        """End without having finished."""
        self._txn.abort()

    def _index(self, kind: int) -> Database:
        return self._environment.blobs if kind == KIND_BLOB else self._environment.action_results

    def _log_use(self, step: int, kind: int, key: bytes) -> None:
        self._log.setdefault((step, kind), []).append(key)
        self._log_keys += 1
        if self._log_keys >= _LOG_KEYS:
            self._write_log()
        self._note(0)

    def _write_log(self) -> None:
        totals = self.totals
        for (step, kind), keys in sorted(self._log.items()):
            totals.next_sequence = access_log.append_groups(
                self._txn, self._environment.access, step, kind, totals.next_sequence, keys
            )
            totals.log_entries += len(keys)
        self._log.clear()
        self._log_keys = 0

    def _note(self, size_bytes: int) -> None:
        self._pending_bytes += size_bytes
        self._pending_entries += 1
        if self._pending_bytes >= _TRANSACTION_BYTES or self._pending_entries >= _TRANSACTION_ENTRIES:
            self._txn.commit()
            self._txn = self._environment.env.begin(write=True)
            self._pending_bytes = self._pending_entries = 0


@contextmanager
def new_store(target: Path, limit_bytes: int, id_: bytes | None) -> Iterator[NewStore]:
    """Make a store in an empty folder; it is there when the context ends well, and else nothing is.

    Args:
        target: The folder, which is made if it is absent.
        limit_bytes: What it will hold at most.
        id_: The environment's id, if it is to have a certain one.

    Raises:
        lmdb.Error: It cannot be written.
        OSError: The folder cannot be made or written.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = target / UNFINISHED
    try:
        environment = LmdbEnvironment(folder, map_size_for(limit_bytes))
        try:
            if id_:
                with environment.env.begin(write=True) as txn:
                    environment.take_over_id(txn, id_)
            store = NewStore(environment)
            try:
                yield store
                store.finish()
            except BaseException:
                store.cancel()
                raise
        finally:
            environment.close()
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    (folder / "data.mdb").rename(target / "data.mdb")
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
