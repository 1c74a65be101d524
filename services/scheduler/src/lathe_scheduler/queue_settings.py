"""The action queue's settings: durations in seconds, counts, and promised platforms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_scheduler.platform_key import PlatformOffer


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """How patient the queue is; the service's configuration documents each value for operators.

    Attributes:
        lost_after_seconds: Silence after which a connected worker is lost.
        worker_reconnect_grace_seconds: How long a worker whose stream broke may take to come back.
        worker_memory_seconds: How long actions wait for workers that were seen and are gone.
        unmatched_timeout_seconds: How long an action waits if no worker that is present, remembered or configured could
            run it.
        start_grace_seconds: How long after its start a queue gives workers time to connect, as long as none has: when
            the scheduler restarts, actions come back before workers do.
        abandoned_grace_seconds: How long an operation lives after its last listener lost the connection.
        completed_retention_seconds: How long a done operation can be asked for.
        max_completed_operations: How many done operations are kept at most.
        max_completed_bytes: How many bytes of responses they may hold.
        max_attempts: How often an action that began may be lost with its worker before it is given up.
        priority_ageing_seconds: Waiting time that outweighs one step of priority.
        reservation_after_seconds: How long the head of a queue is passed over by smaller actions before a worker is
            kept free for it.
        configured_platforms: Offers of workers that may not be here yet.
    """

    lost_after_seconds: float = 15.0
    worker_reconnect_grace_seconds: float = 2.0
    worker_memory_seconds: float = 300.0
    unmatched_timeout_seconds: float = 5.0
    start_grace_seconds: float = 10.0
    abandoned_grace_seconds: float = 10.0
    completed_retention_seconds: float = 60.0
    max_completed_operations: int = 100_000
    max_completed_bytes: int = 256 << 20
    max_attempts: int = 3
    priority_ageing_seconds: float = 60.0
    reservation_after_seconds: float = 5.0
    configured_platforms: Sequence[PlatformOffer] = field(default_factory=tuple)
