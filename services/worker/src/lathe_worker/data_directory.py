"""The worker's directory on disk, and the lock that keeps it to one worker."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class DataDirectoryError(Exception):
    """The directory cannot be used; the message says why."""


class DataDirectoryInUseError(DataDirectoryError):
    """Another worker has the directory."""


MAX_SHARING_WORKERS = 1000
"""Workers that share one directory at most; only a bound on the search."""


def take_data_directory(path: Path, *, shared: bool) -> DataDirectory:
    """Open a worker's data directory, or the first free one of those that workers share.

    A replica that comes back, under whatever name, finds a warm cache again, and what is on disk is bounded by the
    number of workers that ever ran at once.

    Args:
        path: The directory, or the one that holds those of all workers, numbered.
        shared: Whether it is the latter.

    Raises:
        DataDirectoryError: It cannot be made, or is in use.
    """
    if not shared:
        return DataDirectory(path)
    for number in range(1, MAX_SHARING_WORKERS + 1):
        try:
            return DataDirectory(path / str(number))
        except DataDirectoryInUseError:
            continue
    raise DataDirectoryError(f"data_dir {path} is shared by {MAX_SHARING_WORKERS} workers already")


class DataDirectory:
    """``cache`` for inputs and ``work`` for running actions, under one lock.

    Args:
        path: The directory; made if absent.

    Raises:
        DataDirectoryError: Another worker has it, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            # The cache is the worker's alone; the way to the work directory is open to those who know where they go.
            path.chmod(0o711)
            self.cache.mkdir(mode=0o700, exist_ok=True)
            self.work.mkdir(mode=0o711, exist_ok=True)
            self._lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirectoryError(f"data_dir {path} cannot be used: {error.strerror}: {error.filename}") from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock_fd, 32, 0).decode(errors="replace").strip()
            os.close(self._lock_fd)
            raise DataDirectoryInUseError(
                f"data_dir {path} is in use by another worker (process {holder}); give each worker one of its own"
            ) from None
        os.truncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    @property
    def cache(self) -> Path:
        """Holds input files."""
        return self.path / "cache"

    @property
    def work(self) -> Path:
        """Holds running actions."""
        return self.path / "work"

    def close(self) -> None:
        """Give the directory up."""
        os.close(self._lock_fd)
