"""Who has a store open: a check may run beside a service, a repair must have it alone.

LMDB keeps the first byte of ``lock.mdb`` locked for reading as long as a process has the environment open. Who gets
that byte for writing is alone, and others that open the environment wait until it is released.

Spec: LMDB 0.9, mdb_env_setup_locks and mdb_env_excl_lock in mdb.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import lmdb

from lathe_cas.stores.lmdb_environment import LOCK_FILE_BYTES, LmdbEnvironment, StorageFormatError, map_size_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class StoreInUseError(Exception):
    """A process has the store open."""


@contextmanager
def opened_for_reading(path: Path, limit_bytes: int) -> Iterator[LmdbEnvironment]:
    """Open a store as one reader among others. Nothing of it is written, but for the reader's place in ``lock.mdb``."""
    # Without a lock file nobody has it open, and a look must not leave one behind.
    lock = os.access(path / "lock.mdb", os.R_OK | os.W_OK)
    environment = LmdbEnvironment(path, map_size_for(limit_bytes, path), create=False, readonly=True, lock=lock)
    try:
        yield environment
    finally:
        environment.close()


@contextmanager
def opened_alone(path: Path, limit_bytes: int) -> Iterator[LmdbEnvironment]:
    """Open a store for writing, with all others kept out; a service that starts meanwhile waits.

    Raises:
        StoreInUseError: A process has it open.
    """
    with held_alone(path) as lock_file:
        # It says which transaction was the last one, and will not hear of ours. Who waits for us would begin where it
        # says and write over what came later, so nobody may go by it any more, even if we are killed.
        if lock_file is not None:
            os.truncate(lock_file, 0)
            os.posix_fallocate(lock_file, 0, LOCK_FILE_BYTES)
        # LMDB's own locks would meet ours, and POSIX forgets ours when LMDB closes the same file.
        environment = LmdbEnvironment(path, map_size_for(limit_bytes, path), create=False, lock=False)
        try:
            yield environment
        finally:
            environment.close()
            # Made anew for who waits: LMDB takes our lock for its own here, and gives it back when it is through.
            with suppress(lmdb.Error, StorageFormatError):
                LmdbEnvironment(path, map_size_for(limit_bytes, path), create=False).close()


@contextmanager
def held_alone(path: Path) -> Iterator[int | None]:
    """Keep all others from opening a store, without opening it.

    Gives the descriptor of the lock file, which is to stay open meanwhile; None where nothing can be written anyway.

    Raises:
        StoreInUseError: A process has it open.
        OSError: It cannot be told.
    """
    try:
        descriptor = os.open(path / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        # Nobody can have opened it for writing where nothing can be written.
        yield None
        return
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except (BlockingIOError, PermissionError):
            raise StoreInUseError(f"{path} is in use: stop lathe-cas first") from None
        yield descriptor
    finally:
        os.close(descriptor)
