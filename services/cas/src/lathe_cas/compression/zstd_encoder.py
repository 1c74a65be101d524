"""Encodes bytes as zstd frames that can be decoded one without the other."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

DEFAULT_LEVEL = 3
"""The library's own default, at some 250 MB/s on one core."""

MAX_LEVEL = 19
"""Higher levels use windows that decoders need not accept; see ``MAX_WINDOW_BYTES``."""

FRAME_BYTES = 1 << 20
"""What one frame holds at most. Larger ones compress hardly better, and a read from the middle of a blob has to begin
at a frame."""


class ZstdEncoder:
    """Encodes at one level; from any number of threads, each of which has its own state of the library.

    Args:
        level: From 1 to MAX_LEVEL.
    """

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        self._level = level
        self._local = threading.local()

    def encode(self, data: Buffer) -> bytes:
        """Return a stream of frames; one, empty frame for no bytes."""
        library = self._library()
        view = memoryview(data)
        if len(view) <= FRAME_BYTES:
            return library.compress(view)
        return b"".join(
            [library.compress(view[start : start + FRAME_BYTES]) for start in range(0, len(view), FRAME_BYTES)]
        )

    def _library(self) -> zstandard.ZstdCompressor:
        library: zstandard.ZstdCompressor | None = getattr(self._local, "library", None)
        if library is None:
            # No checksum: the blob's digest and the store's own checksums cover the same bytes.
            library = zstandard.ZstdCompressor(level=self._level, write_checksum=False, write_content_size=True)
            self._local.library = library
        return library
