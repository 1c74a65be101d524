"""What was used since the writer last looked, kept in memory until its next batch.

A crash loses these: what was used in the last seconds then counts as used when it was before.

Also what the writer is about to evict. A reader sees data until the commit, so it would say that something is there
which the writer has given up already. Each side says first what it does and looks then at what the other has said: the
reader notes its touch and looks whether the key is doomed, the writer dooms the key and looks whether it is touched. So
at least one of them gives way, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

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
        self.doomed: set[bytes] = set()
        """Keys of both kinds, which are as different as hashes are."""

    def __bool__(self) -> bool:
        return bool(self.blobs or self.action_results)

    def __len__(self) -> int:
        return len(self.blobs) + len(self.action_results)

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

    def is_touched(self, kind: int, key: bytes) -> bool:
        """Tell whether a key waits to be written: it was used moments ago, so this is no time to evict it."""
        return key in (self.blobs if kind == KIND_BLOB else self.action_results)

    def may_be_evicted(self, kind: int, key: bytes) -> bool:
        """Doom a key, unless it was used moments ago. Called by the writer; ``forgive`` ends it after the commit."""
        self.doomed.add(key)
        if not self.is_touched(kind, key):
            return True
        self.doomed.discard(key)
        return False

    def forgive(self, keys: set[bytes]) -> None:
        """Forget keys that a transaction has evicted, or that it did not since it failed.

        Called on the event loop after a commit: a look-up there, which began before it, then still finds them doomed.
        Called by the writer after a transaction that failed, since they stay.
        """
        self.doomed -= keys
