"""Blobs in files: read piece by piece for an upload, written and verified for a download. Blocks only in threads."""

from __future__ import annotations

import asyncio
import os
import secrets
from typing import TYPE_CHECKING

from lathe_shared.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from lathe_shared.digest import Digest

PIECE_BYTES = 1 << 20
"""Bytes handed to a thread at once: hashing them takes 0.6 ms, against 0.05 ms for the hand-over."""


class FileSource:
    """A file to upload; a context manager.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    async def read_at(self, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on."""
        return await asyncio.to_thread(os.pread, self._file, size, offset)


class FileTarget:
    """A file that comes into being whole and verified, or not at all.

    Args:
        path: Its name once committed.
        digest: What its bytes must match.
        mode: Its permissions.
    """

    def __init__(self, path: Path, digest: Digest, mode: int) -> None:
        self._path = path
        self._temporary: Path | None = path.with_name(f".{secrets.token_hex(8)}.tmp")
        self._digest = digest
        self._hasher = digest.function.new_hasher()
        self._size = 0
        self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(self._file, mode)

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Append and hash bytes; blocks."""
        for piece in pieces:
            self._size += len(piece)
            self._hasher.update(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(self._file, rest) :]

    async def write_all(self, pieces: AsyncIterator[memoryview]) -> None:
        """Append and hash all bytes that come, in threads."""
        waiting: list[memoryview] = []
        size = 0
        async for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= PIECE_BYTES:
                await asyncio.to_thread(self.write, waiting)
                waiting, size = [], 0
        await asyncio.to_thread(self.write, waiting)

    def commit(self) -> None:
        """Give the file its name; blocks.

        Raises:
            InternalError: The bytes do not match the digest; there is no file.
        """
        hash_ = self._hasher.hexdigest()
        if self._size != self._digest.size_bytes or hash_ != self._digest.hash:
            raise InternalError(f"the CAS sent {hash_}/{self._size} in place of {self._digest}")
        os.close(self._file)
        self._file = -1
        if self._temporary is not None:
            os.replace(self._temporary, self._path)
            self._temporary = None

    def close(self) -> None:
        """Remove what was not committed. Closing twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None


def write_file(path: Path, digest: Digest, mode: int, data: bytes) -> None:
    """Make a file of a blob's bytes; blocks.

    Raises:
        InternalError: The bytes do not match the digest; there is no file.
    """
    target = FileTarget(path, digest, mode)
    try:
        target.write([data])
        target.commit()
    finally:
        target.close()
