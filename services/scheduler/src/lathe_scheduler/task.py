"""Task: one execution of an action, on behalf of one client or of several.

Spec: REAPI, Execution.Execute on merging ("the server MAY merge it with an in-flight execution").
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lathe_scheduler.platform_key import PlatformKey
from lathe_shared.digest import Digest

if TYPE_CHECKING:
    from datetime import datetime

    from lathe_scheduler.operation import Operation
    from lathe_scheduler.worker import Lease
    from lathe_shared.errors import LatheError


class TaskState(enum.Enum):
    """Where a task stands; the order is that of a task without mishaps."""

    CHECKING = "checking"
    """The action cache is asked, and the inputs are looked for."""
    QUEUED = "queued"
    ASSIGNED = "assigned"
    """A worker was told; it has not said yet that the action runs."""
    EXECUTING = "executing"
    COMPLETED = "completed"


class OutcomeKind(enum.StrEnum):
    """Why a task is over, as the metrics name it."""

    FINISHED = "finished"
    CACHED = "cached"
    REJECTED = "rejected"
    MISSING_INPUTS = "missing_inputs"
    CANCELLED = "cancelled"
    UNMATCHED = "unmatched"
    WORKERS_LOST = "workers_lost"


class ActionKey(NamedTuple):
    """What makes two requests ask for the same thing: they may share one execution."""

    instance_name: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """An action that passed its checks, ready to be queued.

    Attributes:
        action: The Action message's own bytes.
        command: The Command message's own bytes.
        platform: Key of the queue that it waits in.
        input_root: Digest of its input root.
        do_not_cache: The Action's own word: never merged, never written to the action cache.
        queued_at: Wall-clock time for the result's metadata.
    """

    action: bytes
    command: bytes
    platform: PlatformKey
    input_root: Digest
    do_not_cache: bool
    queued_at: datetime


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task, or one operation of it, ended: with a response's own bytes, or with an error to make one of.

    Attributes:
        kind: Why it is over.
        response: A serialized ExecuteResponse as it came; None if ``error`` says it all.
        error: What a response must be made of if there is none.
    """

    kind: OutcomeKind
    response: bytes | None = None
    error: LatheError | None = None


class QueueOrder(NamedTuple):
    """Place of a task among those that wait; smaller goes first, and no two are equal.

    Attributes:
        time: Enqueue time plus priority times the seconds that one step of priority is worth. It never changes while
            the task waits, and yet a task ages: what comes later gets larger times.
        number: Running number, so that equal times go first come, first served.
    """

    time: float
    number: int


UNORDERED = QueueOrder(0.0, 0)
"""The order of a task that was not queued yet."""


@dataclass(slots=True, eq=False)
class Task:
    """One execution; see the module's text.

    Attributes:
        id: Running number.
        key: What is executed, and where merging finds the task.
        skip_cache_lookup: Whether the client refused a cached result.
        priority: REAPI's; smaller is more urgent. The most urgent of all who joined.
        request_metadata: Serialized RequestMetadata of the first client.
        inline_output_files: Outputs that the first client wants inlined.
        state: Where it stands.
        operations: The clients' handles on it, by name.
        spec: The action; None while it is checked, and again when it is over, to free the memory.
        enqueued_at: When it was first queued, on the queue's clock; a later attempt does not change it.
        order: Place in the queue.
        lease: The worker's hold on it while ASSIGNED or EXECUTING.
        lost_on: Names of the workers on which attempts were lost, in order.
        avoids_workers: Whether it waits for others than those, as long as there are any; for a bounded time.
        unstarted_losses: How often it was given to a worker that did not begin it, and was lost; see
            ``task_transitions``.
        outcome: Set when COMPLETED.
    """

    id: int
    key: ActionKey
    skip_cache_lookup: bool
    priority: int
    request_metadata: bytes = b""
    inline_output_files: tuple[str, ...] = ()
    state: TaskState = TaskState.CHECKING
    operations: dict[str, Operation] = field(default_factory=dict)
    spec: ActionSpec | None = None
    enqueued_at: float = 0.0
    order: QueueOrder = UNORDERED
    lease: Lease | None = None
    lost_on: list[str] = field(default_factory=list)
    avoids_workers: bool = True
    unstarted_losses: int = 0
    outcome: Outcome | None = None

    @property
    def platform(self) -> PlatformKey:
        """Key of the platform queue; only of a task that passed its checks."""
        if self.spec is None:
            raise RuntimeError(f"task {self.id} is {self.state.value}: it has no platform")
        return self.spec.platform
