"""What comes into the action queue.

Events carry what was checked already: identifiers may be unknown or out of date, never malformed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_scheduler.platform_key import PlatformOffer
    from lathe_scheduler.task import ActionKey, ActionSpec, Outcome


@dataclass(frozen=True, slots=True)
class ExecuteRequested:
    """A client calls Execute; its stream is the first listener.

    Attributes:
        operation_name: Fresh name of the client's handle.
        key: What to execute.
        skip_cache_lookup: Whether a cached result is refused.
        priority: REAPI's ExecutionPolicy.priority; smaller is more urgent.
        request_metadata: Serialized RequestMetadata.
        inline_output_files: What the client wants inlined.
    """

    operation_name: str
    key: ActionKey
    skip_cache_lookup: bool = False
    priority: int = 0
    request_metadata: bytes = b""
    inline_output_files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckPassed:
    """The action is not cached, is well-formed, and all its inputs are there."""

    task_id: int
    spec: ActionSpec


@dataclass(frozen=True, slots=True)
class CheckEnded:
    """The check has answered the request: a cached result, missing inputs, or an error."""

    task_id: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class ListenerAdded:
    """A stream follows an operation (WaitExecution)."""

    operation_name: str


@dataclass(frozen=True, slots=True)
class ListenerRemoved:
    """A stream follows an operation no more.

    Attributes:
        operation_name: The operation.
        is_cancelled: Whether the client said so, rather than lost its connection. Bazel comes back by WaitExecution
            after the one, never after the other.
    """

    operation_name: str
    is_cancelled: bool


@dataclass(frozen=True, slots=True)
class OperationCancelled:
    """A client calls CancelOperation."""

    operation_name: str


@dataclass(frozen=True, slots=True)
class OperationDeleted:
    """A client calls DeleteOperation: it is not interested in the outcome. Only of done operations."""

    operation_name: str


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that a worker brings along when it connects."""

    lease_id: str
    key: ActionKey


@dataclass(frozen=True, slots=True)
class WorkerConnected:
    """A worker registers, for the first time or again.

    Attributes:
        worker_id: Its own name.
        connection_id: Fresh positive number of its stream.
        offer: What it has.
        slots: Actions that it runs at once; positive.
        held: What it still runs from an earlier stream.
        version: What it says it is.
    """

    worker_id: str
    connection_id: int
    offer: PlatformOffer
    slots: int
    held: Sequence[HeldLease] = ()
    version: str = ""


@dataclass(frozen=True, slots=True)
class WorkerHeartbeat:
    """A worker is alive, and says which leases it holds."""

    worker_id: str
    connection_id: int
    lease_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """A worker takes nothing new."""

    worker_id: str
    connection_id: int


@dataclass(frozen=True, slots=True)
class WorkerDisconnected:
    """A worker's stream ended."""

    worker_id: str
    connection_id: int


@dataclass(frozen=True, slots=True)
class ActionStarted:
    """A worker runs what it was given.

    Attributes:
        worker_id: The worker.
        connection_id: Its stream.
        lease_id: The lease.
        started: When the command was started, as a serialized Timestamp; empty if unknown.
    """

    worker_id: str
    connection_id: int
    lease_id: str
    started: bytes = b""


@dataclass(frozen=True, slots=True)
class ActionFinished:
    """A worker is done with a lease.

    Attributes:
        worker_id: The worker.
        connection_id: Its stream.
        lease_id: The lease.
        execute_response: A serialized ExecuteResponse, passed on as it is.
        worker_fault: The action is not to blame and should run elsewhere.
        fault_message: What the worker says about its fault.
    """

    worker_id: str
    connection_id: int
    lease_id: str
    execute_response: bytes
    worker_fault: bool = False
    fault_message: str = ""


@dataclass(frozen=True, slots=True)
class StoodStill:
    """The scheduler itself did nothing for a while, so it cannot know who was silent or did not come back."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """A deadline may have come; see ``ActionQueue.next_deadline``."""


ClientEvent = (
    ExecuteRequested
    | CheckPassed
    | CheckEnded
    | ListenerAdded
    | ListenerRemoved
    | OperationCancelled
    | OperationDeleted
)
WorkerEvent = WorkerConnected | WorkerHeartbeat | WorkerDraining | WorkerDisconnected | ActionStarted | ActionFinished
QueueEvent = ClientEvent | WorkerEvent | StoodStill | TimePassed
