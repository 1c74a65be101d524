"""One LMDB environment: its databases, how it is opened, and what it counts.

Opened only after the last fork of the process, and at most once in each process, as LMDB asks. Other processes may
have it open at the same time; LMDB's lock file keeps them apart.
"""

from __future__ import annotations

import os
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

_SPARE_TRANSACTIONS = 16
"""Ended read transactions that are kept for the next ones, which makes beginning one nearly free."""

_MAP_HEADROOM_BYTES = 16 << 30
"""Address space beyond the limit: free pages between data, and what waits to be freed. It is not disk."""


class StorageFormatError(Exception):
    """The data directory holds a store of another format, or something that is no store. The operator can fix it."""


class LmdbEnvironment:
    """An open environment and its databases.

    Args:
        path: The folder; made if absent, readable by its owner alone.
        map_size_bytes: Address space to reserve, and so a hard bound on the file.
        create: Whether to make what is absent. Tools that inspect pass False.

    Attributes:
        id: Random, of this environment alone: what a ``ShardMap`` goes by.

    Raises:
        StorageFormatError: The folder holds a store of a format that this version does not know.
    """

    def __init__(self, path: Path, map_size_bytes: int, *, create: bool = True) -> None:
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
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
        )
        try:
            # Readers that were killed hold their snapshot, and with it every page freed since, until this is called.
            self.env.reader_check()
            with self.env.begin(write=True) as txn:
                self._open_databases(txn)
        except BaseException:
            self.env.close()
            raise

    def _open_databases(self, txn: lmdb.Transaction[bytes]) -> None:
        self.meta = self._database(b"meta", txn)
        stored = txn.get(_FORMAT_KEY, db=self.meta)
        if stored is None:
            txn.put(_FORMAT_KEY, records.FORMAT_VERSION.to_bytes(4, "big"), db=self.meta)
            txn.put(_TOTALS_KEY, records.Totals().pack(), db=self.meta)
        elif int.from_bytes(stored, "big") != records.FORMAT_VERSION:
            raise StorageFormatError(
                f"{self.path} holds a store of format {int.from_bytes(stored, 'big')}, and this version of lathe-cas "
                f"knows format {records.FORMAT_VERSION}: use the version that wrote it, or another data_dir"
            )
        # Stores of earlier versions have none: it is made when first needed, and older versions pass it by.
        self.id: bytes = txn.get(_ID_KEY, b"", self.meta) or os.urandom(_ID_BYTES)
        txn.put(_ID_KEY, self.id, db=self.meta, overwrite=False)
        self.blobs = self._database(b"blobs", txn)
        self.chunks = self._database(b"chunks", txn)
        self.access = self._database(b"access", txn)
        self.action_results = self._database(b"action_results", txn)
        self.uploads = self._database(b"uploads", txn)
        self.garbage = self._database(b"garbage", txn)

    def _database(self, name: bytes, txn: lmdb.Transaction[bytes]) -> Database:
        return self.env.open_db(name, txn=txn)

    def read(self) -> lmdb.Transaction[bytes]:
        """Begin a read transaction: a consistent snapshot. Hold it for moments only; it pins every page freed since."""
        return self.env.begin()

    def read_totals(self) -> records.Totals:
        """Return what the store counts, as of the last commit of any process."""
        with self.read() as txn:
            return self.totals_in(txn)

    def totals_in(self, txn: lmdb.Transaction[bytes]) -> records.Totals:
        """Return what the store counts, as of ``txn``."""
        value = txn.get(_TOTALS_KEY, db=self.meta)
        if value is None:
            raise StorageFormatError(f"{self.path} has no totals: not a store that lathe-cas wrote")
        return records.Totals.unpack(value)

    def put_totals(self, txn: lmdb.Transaction[bytes], totals: records.Totals) -> None:
        """Write what the store counts."""
        txn.put(_TOTALS_KEY, totals.pack(), db=self.meta)

    def file_bytes(self) -> int:
        """Return the size of the data file."""
        return (self.path / "data.mdb").stat().st_size

    def close(self) -> None:
        """Unmap the file. No transaction may be open."""
        self.env.close()


def map_size_for(limit_bytes: int) -> int:
    """Return the address space to reserve for a store of ``limit_bytes``."""
    return 2 * limit_bytes + _MAP_HEADROOM_BYTES
