"""One LMDB environment: its databases, how it is opened, and what it counts.

Opened only after the last fork of the process, and at most once in each process, as LMDB asks. Other processes may
have it open at the same time; LMDB's lock file keeps them apart.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import lmdb

from lathe_cas.stores import lmdb_records as records

if TYPE_CHECKING:
    from pathlib import Path

    from lmdb import _Database as Database


_FORMAT_KEY = b"format"
_TOTALS_KEY = b"totals"
_ID_KEY = b"id"
_ID_BYTES = 16
_DATABASES = 8

_MAX_READERS = 4096
"""Places for read transactions, of all processes together: 64 bytes each in the lock file."""

LOCK_FILE_BYTES = _MAX_READERS * 64 + records.PAGE_BYTES
"""Those places, and room for what stands before them."""

_SPARE_TRANSACTIONS = 16
"""Ended read transactions that are kept for the next ones, which makes beginning one nearly free."""

_MAP_HEADROOM_BYTES = 16 << 30
"""Address space beyond the limit: free pages between data, and what waits to be freed. It is not disk."""


PAGE_ERRORS = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadTxnError)
"""What LMDB raises when it comes upon a page that makes no sense, and afterwards for the rest of the transaction. LMDB
has no checksums: other damage to its pages shows as entries that are gone, or that lead to the wrong place."""


class StorageFormatError(Exception):
    """The data directory holds a store of another format, or something that is no store. The operator can fix it."""


class LmdbEnvironment:
    """An open environment and its databases.

    Args:
        path: The folder; made if absent, readable by its owner alone.
        map_size_bytes: Address space to reserve, and so a hard bound on the file.
        create: Whether to make what is absent. Tools that inspect pass False.
        readonly: Whether nothing may be written, as suits who only looks.
        lock: Whether LMDB keeps other processes apart from this one; if not, the caller does.

    Attributes:
        id: Random, of this environment alone: what a ``ShardMap`` goes by.

    Raises:
        StorageFormatError: The folder holds a store of a format that this version does not know.
    """

    def __init__(
        self, path: Path, map_size_bytes: int, *, create: bool = True, readonly: bool = False, lock: bool = True
    ) -> None:
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        if lock and not readonly:
            _reserve_lock_file(path / "lock.mdb")
        self.env = lmdb.Environment(
            str(path),
            map_size=map_size_bytes,
            max_dbs=_DATABASES,
            max_readers=_MAX_READERS,
            max_spare_txns=_SPARE_TRANSACTIONS,
            # Look-ups jump about, so the kernel's readahead would fill memory with neighbours that nobody asks for.
            readahead=False,
            meminit=False,
            mode=0o600,
            create=create,
            readonly=readonly,
            lock=lock,
        )
        try:
            if lock:
                # Readers that were killed hold their snapshot, and with it every page freed since, until now.
                self.env.reader_check()
            if readonly:
                self._open_to_read()
            else:
                with self.env.begin(write=True) as txn:
                    self._open_to_write(txn, create=create)
        except BaseException:
            self.env.close()
            raise

    def _open_to_write(self, txn: lmdb.Transaction[bytes], *, create: bool) -> None:
        is_new = create and not self.env.stat()["entries"]
        self.meta = self._database(b"meta", txn, create=is_new)
        if is_new:
            txn.put(_FORMAT_KEY, records.FORMAT_VERSION.to_bytes(4, "big"), db=self.meta)
            txn.put(_TOTALS_KEY, records.Totals().pack(), db=self.meta)
            txn.put(_ID_KEY, os.urandom(_ID_BYTES), db=self.meta)
        else:
            self._check_format(txn)
        self.id = self._read_id(txn)
        self._open_databases(txn, create=is_new)

    def _open_to_read(self) -> None:
        # LMDB forgets a database that was opened in a read transaction, unless that is of open_db's own.
        self.meta = self._database(b"meta", None, create=False)
        with self.env.begin() as txn:
            self._check_format(txn)
            self.id = self._read_id(txn)
        self._open_databases(None, create=False)

    def _read_id(self, txn: lmdb.Transaction[bytes]) -> bytes:
        return txn.get(_ID_KEY, b"", self.meta)

    def _open_databases(self, txn: lmdb.Transaction[bytes] | None, *, create: bool) -> None:
        self.blobs = self._database(b"blobs", txn, create=create)
        self.chunks = self._database(b"chunks", txn, create=create)
        self.access = self._database(b"access", txn, create=create)
        self.action_results = self._database(b"action_results", txn, create=create)
        self.uploads = self._database(b"uploads", txn, create=create)
        self.garbage = self._database(b"garbage", txn, create=create)

    def _database(self, name: bytes, txn: lmdb.Transaction[bytes] | None, *, create: bool) -> Database:
        try:
            return self.env.open_db(name, txn=txn, create=create)
        except lmdb.NotFoundError:
            # Made all at once, so it was there: what is left must not be served as if it were a smaller store.
            raise StorageFormatError(
                f"{self.path} lacks its database {name.decode()}: the file is damaged, or is not a store that "
                "lathe-cas wrote; lathe-cas fsck tells more"
            ) from None

    def _check_format(self, txn: lmdb.Transaction[bytes]) -> None:
        value = txn.get(_FORMAT_KEY, db=self.meta)
        if value is None:
            raise StorageFormatError(f"{self.path} has no format version: not a store that lathe-cas wrote")
        stored = int.from_bytes(value, "big")
        if stored == records.FORMAT_VERSION:
            return
        found = f"{self.path} holds a store of format {stored}, and this version of lathe-cas knows format"
        if stored > records.FORMAT_VERSION:
            raise StorageFormatError(
                f"{found} {records.FORMAT_VERSION} only: start the newer version that wrote it, or choose another "
                "data_dir"
            )
        raise StorageFormatError(
            f"{found} {records.FORMAT_VERSION}, which has checksums that older stores lack: remove data.mdb and "
            "lock.mdb from there, or choose another data_dir; builds fill the cache again"
        )

    def read(self) -> lmdb.Transaction[bytes]:
        """Begin a read transaction: a consistent snapshot. Hold it for moments only; it pins every page freed since."""
        return self.env.begin()

    def read_totals(self) -> records.Totals:
        """Return what the store counts, as of the last commit of any process."""
        with self.read() as txn:
            return self.totals_in(txn)

    def totals_in(self, txn: lmdb.Transaction[bytes] | lmdb.Transaction[memoryview]) -> records.Totals:
        """Return what the store counts, as of ``txn``."""
        value = txn.get(_TOTALS_KEY, db=self.meta)
        if value is None:
            raise StorageFormatError(f"{self.path} has no totals: not a store that lathe-cas wrote")
        return records.Totals.unpack(bytes(value))

    def put_totals(self, txn: lmdb.Transaction[bytes], totals: records.Totals) -> None:
        """Write what the store counts."""
        txn.put(_TOTALS_KEY, totals.pack(), db=self.meta)

    def take_over_id(self, txn: lmdb.Transaction[bytes], id_: bytes) -> None:
        """Become the environment with this id, which must be gone: of ``data_dirs`` no two may have the same."""
        txn.put(_ID_KEY, id_, db=self.meta)
        self.id = id_

    def file_bytes(self) -> int:
        """Return the size of the data file."""
        return (self.path / "data.mdb").stat().st_size

    def free_bytes(self) -> int:
        """Return what the file system has left."""
        return shutil.disk_usage(self.path).free

    def close(self) -> None:
        """Unmap the file. No transaction may be open."""
        self.env.close()


def _reserve_lock_file(path: Path) -> None:
    """Have the disk give all of the lock file before LMDB opens it.

    LMDB makes a file of holes and writes it through a map. Where a full disk has no room for a page of that, the
    process ends by SIGBUS.

    Raises:
        OSError: There is no room for its beginning.
    """
    if path.exists() and path.stat().st_blocks * 512 >= LOCK_FILE_BYTES:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, LOCK_FILE_BYTES)
    except OSError:
        # What was there is enough for a few readers, and a store on a full disk should be read.
        if not os.fstat(descriptor).st_blocks:
            raise
    finally:
        os.close(descriptor)


def map_size_for(limit_bytes: int, path: Path | None = None) -> int:
    """Return the address space to reserve for a store.

    Args:
        limit_bytes: What it holds at most.
        path: Its folder, where there may be a store that was written under a higher limit. Nothing can be deleted in a
            map that has no room beyond the file, since LMDB writes changed pages elsewhere.
    """
    file = None if path is None else path / "data.mdb"
    file_bytes = file.stat().st_size if file is not None and file.exists() else 0
    return 2 * max(limit_bytes, file_bytes) + _MAP_HEADROOM_BYTES
