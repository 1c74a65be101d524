"""When data has to go, how much, and what may not: arithmetic alone.

Which data goes is the store's affair, since only its access log knows the order. Nothing here does I/O.

Time comes in touch steps, the coarse units that the store notes uses in: what was used last in a step may have been
used in its last moment. So a lease counts from the step's end and is rounded up, and never ends early.
"""

from __future__ import annotations

from dataclasses import dataclass

HIGH_WATERMARK_RATIO = 0.95
"""Above this share of the limit the store begins to evict, so that writers hardly ever have to wait for room."""

LOW_WATERMARK_RATIO = 0.90
"""Down to this share it evicts once it has begun: far enough apart that eviction comes in useful runs."""

LEASE_SECONDS = 3 * 3600
"""What Bazel assumes unless it is told otherwise (--experimental_remote_cache_ttl): that a blob which it has seen stays
for three hours. Without the bytes it then builds on what is not there."""

TOUCH_STEP_SECONDS = 300
"""Resolution of the access order. A blob is touched on disk at most once in a step, however often it is used, so five
minutes keep a busy build's touches near nothing and are fine enough for retention that is counted in hours."""

NO_STEP_IS_LEASED = 1 << 32
"""A step that never comes: steps have 32 bits."""


@dataclass(frozen=True, slots=True)
class EvictionPolicy:
    """Bound the bytes that a store takes on disk, and the time that it keeps them.

    Attributes:
        limit_bytes: Never exceeded by what is kept; data that waits to be overwritten comes on top for moments.
        high_ratio: Share of the limit above which background eviction begins.
        low_ratio: Share of the limit at which background eviction ends.
        lease_seconds: For how long what was used is not evicted; 0 means that anything may go.
        max_age_seconds: After how long without use data goes whether room is needed or not; None for never. Not less
            than the lease.
        touch_step_seconds: Resolution of the access order.
    """

    limit_bytes: int
    high_ratio: float = HIGH_WATERMARK_RATIO
    low_ratio: float = LOW_WATERMARK_RATIO
    lease_seconds: int = 0
    max_age_seconds: int | None = None
    touch_step_seconds: int = TOUCH_STEP_SECONDS

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

    def first_leased_step(self, step: int) -> int:
        """Return the first step whose data may not be evicted in ``step``."""
        if not self.lease_seconds:
            return NO_STEP_IS_LEASED
        return self._first_step_within(self.lease_seconds, step)

    def first_step_leased_on(self, step: int) -> int:
        """Return the first step whose data may not be evicted in ``step`` and the next one either.

        What was used last before it has its lease renewed durably before anyone is told that it is there: a use that is
        only remembered would be too late. 0 if there are no leases, and so nothing to renew.
        """
        return self._first_step_within(self.lease_seconds, step + 1) if self.lease_seconds else 0

    def first_young_step(self, step: int) -> int:
        """Return the first step whose data is not too old in ``step``."""
        if self.max_age_seconds is None:
            return 0
        return self._first_step_within(self.max_age_seconds, step)

    def _first_step_within(self, seconds: int, step: int) -> int:
        return max(0, step - -(-seconds // self.touch_step_seconds))

    def least_age_seconds(self, touched: int, step: int) -> int:
        """Return for how long, at least, data has not been used in ``step`` that was used last in step ``touched``."""
        return max(0, step - touched - 1) * self.touch_step_seconds

    def seconds_until_free(self, touched: int, step: int) -> int:
        """Return for how long, at most, data is still leased in ``step`` that was used last in step ``touched``."""
        if not self.lease_seconds:
            return 0
        lease_steps = -(-self.lease_seconds // self.touch_step_seconds)
        return max(0, touched + lease_steps + 1 - step) * self.touch_step_seconds
