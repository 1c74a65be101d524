"""What was used since the writer last looked, kept in memory until its next batch.

A crash loses these: what was used in the last seconds then counts as used when it was before. So only that is noted
here whose lease lasts for another step at least, minutes in which the writer comes by many times. A lease that ends
sooner is renewed by an operation, and whoever asked waits for its commit: see ``LmdbStorage.renew``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

MAX_WAITING = 1 << 18
"""Keys that may wait, some 25 MB. The writer notes so many in a fraction of a touch step, be the disk a slow one; so
what waits is noted before its lease can end. While as many do, uses are noted by operations that clients wait for."""

KIND_ACTION_RESULT: Final = 0
KIND_BLOB: Final = 1
"""Kinds in the access log; at the same step an action result sorts, and so is evicted, before the blobs it names."""


class Touches:
    """Collects keys on the event loop and hands them to the writer's thread.

    Relies on the operations of sets being atomic, so neither side takes a lock.

    Args:
        step: Returns the current touch step. Only what was last touched in an earlier step needs a touch.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self.step = step
        self.blobs: set[bytes] = set()
        self.action_results: set[bytes] = set()

    def __bool__(self) -> bool:
        return bool(self.blobs or self.action_results)

    def __len__(self) -> int:
        return len(self.blobs) + len(self.action_results)

    def has_room(self, count: int = 1) -> bool:
        """Tell whether so many keys more may wait."""
        return len(self) + count <= MAX_WAITING

    def take(self, limit: int) -> list[tuple[int, bytes]]:
        """Remove and return up to ``limit`` keys, each with its kind, action results before blobs."""
        taken: list[tuple[int, bytes]] = []
        for kind, keys in ((KIND_ACTION_RESULT, self.action_results), (KIND_BLOB, self.blobs)):
            while keys and len(taken) < limit:
                taken.append((kind, keys.pop()))
        return taken

    def give_back(self, taken: list[tuple[int, bytes]]) -> None:
        """Take keys again whose batch failed."""
        for kind, key in taken:
            (self.blobs if kind == KIND_BLOB else self.action_results).add(key)
