"""Worker and Lease as the queue knows them: what a worker has, what is free, and what it runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe_scheduler.platform_key import PlatformKey, PlatformOffer
    from lathe_scheduler.platform_queue import PlatformQueue
    from lathe_scheduler.task import Task


class WorkerState(enum.StrEnum):
    """Whether a worker can be talked to."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    """Its stream broke a moment ago; what it runs is still its own."""
    GONE = "gone"
    """Lost. Remembered for a while, because a restart looks like this."""


@dataclass(slots=True, eq=False)
class Lease:
    """A worker's hold on one task.

    Attributes:
        id: Name of the hold in the worker API; never used twice, not even by another scheduler.
        task: The task; None once the hold is only waited out after a cancellation.
        worker: Who holds it.
        platform: The key whose amounts it takes.
        started_at: When the command was started, as the Timestamp that the worker sent; empty until it did.
        unseen_heartbeats: Heartbeats in a row that did not list it.
    """

    id: str
    task: Task | None
    worker: Worker
    platform: PlatformKey
    started_at: bytes = b""
    unseen_heartbeats: int = 0


@dataclass(slots=True, eq=False)
class Worker:
    """A worker; see the module's text.

    Attributes:
        id: Its own name; stays the same when it reconnects.
        offer: What it has.
        slots: Actions that it runs at once.
        version: What it says it is.
        state: Whether it can be talked to.
        connection_id: Its present stream; 0 if none.
        draining: It takes nothing new.
        last_seen: When it last said anything, on the queue's clock.
        left_at: When its stream broke or it was lost, on the queue's clock.
        free_slots: Slots not taken.
        free: What is left of each amount.
        leases: What it holds, by lease id.
        queues: The platform queues that it can serve.
        may_be_ready: False only if no queue counts it as ready.
        reserved_for: The queue whose head it is kept free for; see ``matchmaker``.
    """

    id: str
    offer: PlatformOffer
    slots: int
    version: str = ""
    state: WorkerState = WorkerState.CONNECTED
    connection_id: int = 0
    draining: bool = False
    last_seen: float = 0.0
    left_at: float = 0.0
    free_slots: int = 0
    free: dict[str, int] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    queues: dict[PlatformKey, PlatformQueue] = field(default_factory=dict)
    may_be_ready: bool = False
    reserved_for: PlatformQueue | None = None

    @property
    def accepts(self) -> bool:
        """Whether it may be given something, room provided."""
        return self.state is WorkerState.CONNECTED and not self.draining

    def fits(self, key: PlatformKey) -> bool:
        """Tell whether an action with this key, which the worker serves, could start now."""
        return self.free_slots > 0 and all(self.free[name] >= amount for name, amount in key.minimums)

    def take(self, lease: Lease) -> None:
        """Give a lease its slot and its amounts."""
        self.leases[lease.id] = lease
        self.free_slots -= 1
        for name, amount in lease.platform.minimums:
            self.free[name] -= amount

    def give_back(self, lease: Lease) -> None:
        """Free what a lease took."""
        del self.leases[lease.id]
        self.free_slots += 1
        for name, amount in lease.platform.minimums:
            self.free[name] += amount
