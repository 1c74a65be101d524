"""The old store's file, page by page, on a disk that may not give all of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lathe_cas.stores.lmdb_records import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

_BLOCK_PAGES = 256
"""A mebibyte is read at a time where pages follow each other."""


class PageFile:
    """Reads a file of pages. It is not mapped: there, a bad sector would end the process.

    Args:
        path: The file.

    Attributes:
        pages: How many whole pages it has.
        size_bytes: Its size.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._descriptor).st_size
        self.pages = self.size_bytes // PAGE_BYTES
        self._unreadable: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    @property
    def unreadable_pages(self) -> int:
        """Pages that the disk did not give, as far as they were read as pages."""
        return len(self._unreadable)

    def read(self, place: int, length: int) -> bytes:
        """Read bytes; fewer than ``length`` where the file ends or the disk gives no more."""
        if not 0 <= place < self.size_bytes:
            return b""
        try:
            return os.pread(self._descriptor, min(length, self.size_bytes - place), place)
        except OSError:
            return b""

    def page(self, number: int) -> bytes:
        """Read a page; one that cannot be read is all zeros, which is no page."""
        page = self.read(number * PAGE_BYTES, PAGE_BYTES)
        if len(page) == PAGE_BYTES:
            return page
        self._unreadable.add(number)
        return bytes(PAGE_BYTES)

    def run(self, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Read pages that follow each other, and give each with its number."""
        while first < stop:
            count = min(_BLOCK_PAGES, stop - first)
            block = self.read(first * PAGE_BYTES, count * PAGE_BYTES)
            whole = len(block) // PAGE_BYTES
            for index in range(whole):
                yield first + index, block[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
            if whole < count:
                # A bad sector fails the whole block: its pages one by one.
                for number in range(first + whole, first + count):
                    yield number, self.page(number)
            first += count
