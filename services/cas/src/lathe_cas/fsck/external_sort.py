"""Sorting more than memory holds: sorted runs in one temporary file, merged as they are read."""

from __future__ import annotations

import heapq
import struct
import tempfile
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

RUN_ITEMS = 500_000
"""Items in memory, some 100 bytes each. 50 million blobs make 100 runs, which one merge takes."""

READ_BYTES = 1 << 18
"""Bytes of each run in memory during the merge."""

_LENGTH = struct.Struct(">H")


class ExternalSort:
    """Takes bytes of up to 65,535 each in any order, and gives them in ascending order, once.

    Args:
        folder: Where the temporary file is made. It has no name there, and is gone with the process.
        run_items: How many items are sorted in memory.
    """

    def __init__(self, folder: Path, run_items: int = RUN_ITEMS) -> None:
        self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 -- closed by __exit__
        self._run_items = run_items
        self._items: list[bytes] = []
        self._runs: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, item: bytes) -> None:
        """Take one item."""
        self._items.append(item)
        if len(self._items) >= self._run_items:
            self._spill()

    def _spill(self) -> None:
        self._items.sort()
        start = self._file.tell()
        pack = _LENGTH.pack
        self._file.writelines(pack(len(item)) + item for item in self._items)
        self._runs.append((start, self._file.tell()))
        self._items.clear()

    def sorted(self) -> Iterator[bytes]:
        """Give all items in order. Nothing may be added any more."""
        self._items.sort()
        if not self._runs:
            return iter(self._items)
        self._file.flush()
        return heapq.merge(*(self._read(start, stop) for start, stop in self._runs), self._items)

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        """Give the items of one run; other runs are read from the same file in between."""
        rest = b""
        while start < stop:
            self._file.seek(start)
            block = self._file.read(min(READ_BYTES, stop - start))
            start += len(block)
            block = rest + block
            position = 0
            while position + 2 <= len(block):
                (length,) = _LENGTH.unpack_from(block, position)
                if position + 2 + length > len(block):
                    break
                yield block[position + 2 : position + 2 + length]
                position += 2 + length
            rest = block[position:]
