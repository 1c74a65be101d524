"""A bounded set of keys, each believed until its own time."""

from __future__ import annotations

from typing import Generic, TypeVar

Key = TypeVar("Key")


class ExpiringMemo(Generic[Key]):
    """Keys with the time until which something is believed of them.

    Args:
        max_entries: Bound; the entries that were added first go first.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._until: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def until(self, key: Key, now: float) -> float | None:
        """Return until when the key is believed; None if it is not."""
        until = self._until.get(key)
        return until if until is not None and until > now else None

    def add(self, key: Key, until: float) -> None:
        """Believe a key until a time; what was believed of it before is forgotten."""
        self._until.pop(key, None)
        self._until[key] = until
        if len(self._until) > self._max_entries:
            # A tenth at once, because the front of a dict from which much was deleted is slow to find.
            for old in list(self._until)[: max(1, self._max_entries // 10)]:
                del self._until[old]

    def discard(self, key: Key) -> None:
        """Believe a key no more."""
        self._until.pop(key, None)

    def clear(self) -> None:
        """Believe nothing any more."""
        self._until.clear()
