"""What has to be done to a store, noted down by the check and carried out afterwards, alone."""

from __future__ import annotations

import enum
import struct
import tempfile
from typing import TYPE_CHECKING, BinaryIO, cast

from lathe_cas.stores import lmdb_access_log as access_log
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_BLOB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import lmdb
    from lmdb import _Database as Database

    from lathe_cas.fsck.findings import Findings
    from lathe_cas.fsck.progress import Progress
    from lathe_cas.stores.lmdb_environment import LmdbEnvironment

TRANSACTION_ACTIONS = 1000
TRANSACTION_CHUNKS = 4096
"""Bounds of one transaction: some 256 MiB of freed chunks at most, of which LMDB keeps page numbers in memory."""


class Action(enum.IntEnum):
    """What can be done; the target is a key."""

    DROP_RECORD = 1
    """Target: the number of a database, then the key in it."""
    DROP_CHUNKS = 2
    """Target: a storage id."""
    DROP_CHUNK = 3
    """Target: a chunk's key."""
    DROP_LOG_GROUP = 4
    """Target: a group's key."""
    LOG = 5
    """Target: the kind, then the key of a record that the access log lacks."""


DROPPED_RECORDS = "records dropped"
FREED_CHUNKS = "chunks freed"
DROPPED_GROUPS = "groups of the access log dropped"
ADDED_ENTRIES = "entries added to the access log"
CORRECTED_TOTALS = "totals corrected"

_DATABASES = ("blobs", "action_results", "uploads", "garbage")
_HEAD = struct.Struct(">BH")


class Repairs:
    """A list of actions in a temporary file.

    Args:
        folder: Where that file is made.
    """

    def __init__(self, folder: Path) -> None:
        self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 -- closed by __exit__
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def drop_record(self, database: str, key: bytes) -> None:
        """Note that a record has to go."""
        self._add(Action.DROP_RECORD, bytes((_DATABASES.index(database),)) + key)

    def drop_chunks(self, storage_id: int) -> None:
        """Note that all chunks under a storage id have to go."""
        self._add(Action.DROP_CHUNKS, records.STORAGE_ID.pack(storage_id))

    def drop_chunk(self, key: bytes) -> None:
        """Note that one entry of ``chunks`` has to go."""
        self._add(Action.DROP_CHUNK, key)

    def drop_log_group(self, key: bytes) -> None:
        """Note that a group of the access log has to go."""
        self._add(Action.DROP_LOG_GROUP, key)

    def log(self, kind: int, key: bytes) -> None:
        """Note that a record has to be put into the access log."""
        self._add(Action.LOG, bytes((kind,)) + key)

    def _add(self, action: Action, target: bytes) -> None:
        self._file.write(_HEAD.pack(action, len(target)) + target)
        self.count += 1

    def __iter__(self) -> Iterator[tuple[Action, bytes]]:
        self._file.seek(0)
        while head := self._file.read(_HEAD.size):
            action, length = _HEAD.unpack(head)
            yield Action(action), self._file.read(length)


class Repair:
    """Carries a list of actions out, a bounded part in each transaction: what was done is done if it is interrupted.

    Args:
        environment: The store, which nobody else has open.
        step: The current touch step.
        next_sequence: Number for the next group of the access log.
        findings: Where to count what was done.
        progress: Where to show it.
    """

    def __init__(
        self, environment: LmdbEnvironment, step: int, next_sequence: int, findings: Findings, progress: Progress
    ) -> None:
        self._environment = environment
        self._step = step
        self._next_sequence = next_sequence
        self._done = findings.repairs
        self._progress = progress

    def run(self, repairs: Repairs) -> None:
        """Do all that was noted."""
        pending = iter(repairs)
        with self._progress.phase("repairing", repairs.count):
            while self._run_some(pending):
                pass

    def _run_some(self, pending: Iterator[tuple[Action, bytes]]) -> bool:
        freed = self._done[FREED_CHUNKS]
        with self._environment.env.begin(write=True) as txn:
            for _ in range(TRANSACTION_ACTIONS):
                action, target = next(pending, (None, b""))
                if action is None:
                    return False
                self._do(txn, action, target)
                self._progress.step()
                if self._done[FREED_CHUNKS] - freed > TRANSACTION_CHUNKS:
                    break
        return True

    def _do(self, txn: lmdb.Transaction[bytes], action: Action, target: bytes) -> None:
        environment = self._environment
        if action is Action.DROP_RECORD:
            database: Database = getattr(environment, _DATABASES[target[0]])
            self._done[DROPPED_RECORDS] += txn.delete(target[1:], db=database)
        elif action is Action.DROP_CHUNKS:
            self._drop_chunks(txn, target)
        elif action is Action.DROP_CHUNK:
            self._done[FREED_CHUNKS] += txn.delete(target, db=environment.chunks)
        elif action is Action.DROP_LOG_GROUP:
            self._done[DROPPED_GROUPS] += txn.delete(target, db=environment.access)
        else:
            self._log(txn, target[0], target[1:])

    def _drop_chunks(self, txn: lmdb.Transaction[bytes], prefix: bytes) -> None:
        cursor = txn.cursor(self._environment.chunks)
        found = cursor.set_range(prefix)
        while found and cursor.key()[:8] == prefix:
            cursor.delete()
            self._done[FREED_CHUNKS] += 1
            found = bool(cursor.key())

    def _log(self, txn: lmdb.Transaction[bytes], kind: int, key: bytes) -> None:
        """Put a record into the access log under its own step; one that lies in the future becomes now."""
        environment = self._environment
        if kind == KIND_BLOB:
            database, place = environment.blobs, records.BLOB_STEP
        else:
            database, place = environment.action_results, records.ACTION_RESULT_STEP
        value = txn.get(key, db=database)
        if value is None:
            return
        (step,) = records.STEP.unpack(value[place])
        if step > self._step:
            step = self._step
            txn.put(key, value[: place.start] + records.STEP.pack(step) + value[place.stop :], db=database)
        self._next_sequence = access_log.append_groups(txn, environment.access, step, kind, self._next_sequence, [key])
        self._done[ADDED_ENTRIES] += 1
