"""Compressed files, read forwards in bounded memory.

The standard library's file objects let a file say how much memory they take, and begin anew to go back by one byte.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_INPUT_BYTES = 64 << 10

_LZMA_MEMORY_BYTES = 128 << 20
"""xz at its highest setting needs 65 MiB; a file may ask for 4 GiB."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    """zlib's object with the interface that the others have."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


_BY_MAGIC: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_BYTES),
}


class ForwardReader:
    """A file's bytes, decompressed, to be read forwards; seeking forwards passes over bytes.

    Args:
        file: The file, at its beginning.
        max_read_bytes: Bound on one read: whoever asks for more does so because the file says so.
    """

    def __init__(self, file: IO[bytes], max_read_bytes: int) -> None:
        magic = file.read(6)
        file.seek(0)
        self._file = file
        self._make = next((make for start, make in _BY_MAGIC.items() if magic.startswith(start)), None)
        self._decompressor = None if self._make is None else self._make()
        self._max_read_bytes = max_read_bytes
        self._input = b""
        self._position = 0

    def tell(self) -> int:
        """Return how many bytes were read or passed over."""
        return self._position

    def seek(self, position: int) -> int:
        """Pass over bytes.

        Raises:
            ValueError: The position is behind.
        """
        if position < self._position:
            raise ValueError("this can be read forwards only")
        while self._position < position and self.read(min(position - self._position, 1 << 20)):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        """Return as many bytes, or fewer at the end.

        Raises:
            ValueError: So many may not be read at once.
            EOFError: The compressed bytes are cut off.
            OSError: They are malformed; also zlib.error and lzma.LZMAError.
        """
        if not 0 <= size <= self._max_read_bytes:
            raise ValueError(f"{size} bytes are asked for at once, more than {self._max_read_bytes}")
        parts: list[bytes] = []
        missing = size
        while missing:
            part = self._file.read(missing) if self._decompressor is None else self._decompress(missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        self._position += size - missing
        return b"".join(parts)

    def _decompress(self, max_length: int) -> bytes:
        while True:
            decompressor = self._decompressor
            if decompressor is None or self._make is None:
                raise RuntimeError("nothing is compressed")
            if decompressor.eof:
                rest = decompressor.unused_data or self._file.read(_INPUT_BYTES)
                # Streams may follow one another; zeros behind the last one are padding.
                if not rest.strip(b"\0"):
                    return b""
                self._decompressor = self._make()
                self._input = rest
                continue
            part = decompressor.decompress(self._input, max_length)
            self._input = b""
            if part or decompressor.eof:
                if part:
                    return part
                continue
            self._input = self._file.read(_INPUT_BYTES)
            if not self._input:
                raise EOFError("the compressed data is cut off")
