"""What was used since the writer last looked, kept in memory until its next batch.

Losing these in a crash costs nothing but a little of the eviction order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

KIND_ACTION_RESULT: Final = 0
KIND_BLOB: Final = 1
"""Kinds in the access log; at the same step an action result sorts, and so is evicted, before the blobs it names."""


class Touches:
    """Collects keys on the event loop and hands them to the writer's thread.

    Relies on ``set.add`` and ``set.pop`` being atomic, so neither side takes a lock.

    Args:
        step: Returns the current touch step. Only what was last touched in an earlier step needs a touch.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self.step = step
        self.blobs: set[bytes] = set()
        self.action_results: set[bytes] = set()

    def __bool__(self) -> bool:
        return bool(self.blobs or self.action_results)

    def take(self, limit: int) -> list[tuple[int, bytes]]:
        """Remove and return up to ``limit`` keys, each with its kind."""
        taken: list[tuple[int, bytes]] = []
        for kind, keys in ((KIND_ACTION_RESULT, self.action_results), (KIND_BLOB, self.blobs)):
            while keys and len(taken) < limit:
                taken.append((kind, keys.pop()))
        return taken

    def give_back(self, taken: list[tuple[int, bytes]]) -> None:
        """Take keys again whose batch failed."""
        for kind, key in taken:
            (self.blobs if kind == KIND_BLOB else self.action_results).add(key)

    def is_touched(self, kind: int, key: bytes) -> bool:
        """Tell whether a key waits to be written: it was used moments ago, so this is no time to evict it."""
        return key in (self.blobs if kind == KIND_BLOB else self.action_results)
