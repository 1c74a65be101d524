"""Bytes on their way into the store whose digest is known only when all have come."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from typing import IO, TYPE_CHECKING

from lathe_cas.blob_store import UploadName
from lathe_cas.soon import settled
from lathe_shared.digest import Digest
from lathe_shared.errors import ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from lathe_cas.blob_store import BlobStore
    from lathe_shared.digest import DigestFunction

_PIECE_BYTES = 1 << 20

_INSTANCE = "//assets"
"""Uploads from here have this instance name, which no client can send."""


class Spool:
    """A file without a name. What is written to it is hashed on the way.

    Args:
        directory: Where it takes disk space.
        functions: How to hash.
    """

    def __init__(self, directory: Path, functions: Iterable[DigestFunction]) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 -- closed by __exit__
        self.size_bytes = 0
        self._hashers = {function: function.new_hasher() for function in functions}
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    async def write(self, piece: bytes) -> None:
        """Take in the next bytes."""
        self._gathered.append(piece)
        self._gathered_bytes += len(piece)
        if self._gathered_bytes >= _PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write and hash what was gathered."""
        data = b"".join(self._gathered)
        self._gathered, self._gathered_bytes = [], 0
        await asyncio.to_thread(self.write_now, data)

    def write_now(self, data: bytes) -> None:
        """Write and hash bytes in this thread.

        Raises:
            ResourceExhaustedError: The disk is full.
        """
        try:
            self.file.write(data)
        except OSError as error:
            raise ResourceExhaustedError(f"no room for what was downloaded: {error.strerror}") from error
        self.size_bytes += len(data)
        for hasher in self._hashers.values():
            hasher.update(data)

    def digest(self, function: DigestFunction) -> Digest:
        """Return the digest of all that was written, by one of the functions."""
        return Digest(self._hashers[function].hexdigest(), self.size_bytes, function)

    async def store(self, blobs: BlobStore, digest: Digest) -> None:
        """Put the bytes into a store, unless they are there.

        Args:
            blobs: The store; it verifies them.
            digest: What ``digest`` returned.

        Raises:
            ResourceExhaustedError: No room is left.
        """
        if not await settled(blobs.find_missing([(digest, digest.key, digest.size_bytes)])):
            return
        upload = await blobs.open_upload(UploadName(_INSTANCE, str(uuid.uuid4()), digest), restart=True)
        try:
            self.file.seek(0)
            while piece := await asyncio.to_thread(self.file.read, _PIECE_BYTES):
                await upload.append([memoryview(piece)], len(piece))
            await upload.finish()
        except BaseException:
            await asyncio.shield(upload.abandon())
            raise
