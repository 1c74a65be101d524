"""When data has to go, and how much: arithmetic alone.

Which data goes is the store's affair, since only its access log knows the order. Nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

HIGH_WATERMARK_RATIO = 0.95
"""Above this share of the limit the store begins to evict, so that writers hardly ever have to wait for room."""

LOW_WATERMARK_RATIO = 0.90
"""Down to this share it evicts once it has begun: far enough apart that eviction comes in useful runs."""


@dataclass(frozen=True, slots=True)
class EvictionPolicy:
    """Bound the bytes that a store takes on disk.

    Attributes:
        limit_bytes: Never exceeded by what is kept; data that waits to be overwritten comes on top for moments.
        high_ratio: Share of the limit above which background eviction begins.
        low_ratio: Share of the limit at which background eviction ends.
    """

    limit_bytes: int
    high_ratio: float = HIGH_WATERMARK_RATIO
    low_ratio: float = LOW_WATERMARK_RATIO

    def excess_in_background(self, used_bytes: int, *, evicting: bool) -> int:
        """Return how many bytes should go now.

        Args:
            used_bytes: What the store keeps, in bytes on disk.
            evicting: Whether a run of eviction has begun; it then goes on to the low watermark.
        """
        if not evicting and used_bytes <= self.limit_bytes * self.high_ratio:
            return 0
        return max(0, used_bytes - int(self.limit_bytes * self.low_ratio))

    def excess_for(self, used_bytes: int, incoming_bytes: int) -> int:
        """Return how many bytes must go before ``incoming_bytes`` more can be kept."""
        return max(0, used_bytes + incoming_bytes - self.limit_bytes)
