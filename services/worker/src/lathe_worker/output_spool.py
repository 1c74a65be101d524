"""Standard output and error of a running action: from a pipe to a bounded file.

A pipe keeps the bound exact, which a file that the action writes by itself would not. The file is made with the first
byte, since most actions print nothing.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lathe_worker.sandbox import ActionUser

READ_BYTES = 1 << 16
"""Capacity of a Linux pipe: one read can empty it."""


class OutputSpool:
    """Copies what arrives in a pipe into a file, until the end or a limit.

    Args:
        path: The file.
        limit_bytes: At most this much is kept.
        on_stop: Called once if the limit is passed or the file cannot be written; the writer must then be stopped,
            since nobody empties the pipe any longer.

    Attributes:
        size_bytes: What is in the file.
        exceeded: Whether the writer tried to write more than the limit.
        error: Why the file could not be written, if so.
    """

    def __init__(self, path: Path, limit_bytes: int, on_stop: Callable[[], None]) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._on_stop = on_stop
        self._read_fd = -1
        self._file_fd = -1
        self.size_bytes = 0
        self.exceeded = False
        self.error: OSError | None = None

    def open(self, user: ActionUser | None) -> int:
        """Make the pipe, watch its read end, and return its write end for the child.

        Args:
            user: Owner of the pipe, if other than the worker, who can then open ``/dev/stdout`` as programs expect.
        """
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_fd, False)
        if user is not None:
            os.fchown(write_fd, user.uid, user.gid)
        asyncio.get_running_loop().add_reader(self._read_fd, self._on_readable)
        return write_fd

    def finish(self) -> None:
        """Take what is still in the pipe and close both ends; called when the writers are dead.

        Stops at an empty pipe, not only at its end: a process that outlived the action may hold the other end open for
        ever.
        """
        while self._read_fd >= 0 and self._take():
            pass
        self.close()

    def close(self) -> None:
        """Close pipe and file, dropping what was not taken."""
        if self._read_fd >= 0:
            self._stop_reading()
        if self._file_fd >= 0:
            os.close(self._file_fd)
            self._file_fd = -1

    def _on_readable(self) -> None:
        self._take()

    def _take(self) -> bool:
        """Move one read's worth; return False if nothing is there now."""
        try:
            chunk = os.read(self._read_fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self._stop_reading()
            return False
        room = self._limit_bytes - self.size_bytes
        if len(chunk) > room:
            chunk = chunk[:room]
            self.exceeded = True
        self._write(chunk)
        if self.exceeded or self.error is not None:
            self._stop_reading()
            self._on_stop()
        return True

    def _write(self, chunk: bytes) -> None:
        try:
            if self._file_fd < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._file_fd = os.open(self._path, flags, 0o600)
            while chunk:
                written = os.write(self._file_fd, chunk)
                self.size_bytes += written
                chunk = chunk[written:]
        except OSError as error:
            self.error = error

    def _stop_reading(self) -> None:
        asyncio.get_running_loop().remove_reader(self._read_fd)
        os.close(self._read_fd)
        self._read_fd = -1
