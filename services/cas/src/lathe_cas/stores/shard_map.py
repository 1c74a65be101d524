"""Which of several environments holds what.

Each environment has a random id of its own, and each slot belongs to the environment that scores highest for it
(rendezvous hashing). So the order of the folders in the configuration does not matter, and one that is added takes over
its share of the slots from all others: what moves is a miss once, everything else stays where it is.

Source: D. Thaler, C. Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM Transactions on
Networking 6(1), 1998.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOTS: Final = 4096
"""Enough that the shares of a dozen environments differ by a few percent; the table is one page."""

MAX_SHARDS: Final = 64


class ShardMap:
    """Tells the place of the environment that is in charge of a key.

    Args:
        ids: Of the environments, all different.
    """

    def __init__(self, ids: Sequence[bytes]) -> None:
        if not 1 <= len(set(ids)) == len(ids) <= MAX_SHARDS:
            raise ValueError(f"{len(ids)} environments, {len(set(ids))} different ids, at most {MAX_SHARDS}")
        self._owners = bytes(
            max(range(len(ids)), key=lambda place: xxhash.xxh3_64_digest(ids[place] + slot.to_bytes(2, "big")))
            for slot in range(SLOTS)
        )

    def place(self, key: bytes) -> int:
        """Return the place among ``ids`` for a key of at least eight bytes."""
        return self._owners[xxhash.xxh3_64_intdigest(key) % SLOTS]
