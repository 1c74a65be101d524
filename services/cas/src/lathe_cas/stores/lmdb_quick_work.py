"""What is done on the event loop, and what in a thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_cas.stores import lmdb_records as records

if TYPE_CHECKING:
    from collections.abc import Sequence

INLINE_BYTES = 2 * records.CHUNK_BYTES
"""Up to this size work is done on the event loop: a thread switch costs more than copying or hashing 128 KiB."""

INLINE_BLOBS = 200
"""And up to so many blobs: each takes 10 us or more however small it is, so a full batch of tiny ones would keep all
other requests waiting for a second."""


def is_quick(sizes_bytes: Sequence[int]) -> bool:
    """Tell whether blobs of these sizes are read or verified in less time than a thread switch is worth."""
    return len(sizes_bytes) <= INLINE_BLOBS and sum(sizes_bytes) <= INLINE_BYTES
