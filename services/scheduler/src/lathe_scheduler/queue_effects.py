"""What goes out of the action queue: what its runner must do, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe_scheduler.task import ActionSpec, Outcome, Task


@dataclass(frozen=True, slots=True)
class CheckAction:
    """Look into the action cache and for the inputs; answer by CheckPassed or CheckEnded."""

    task: Task


@dataclass(frozen=True, slots=True)
class AbandonCheck:
    """Nobody waits for this check any more."""

    task_id: int


@dataclass(frozen=True, slots=True)
class OperationChanged:
    """Tell the operation's listeners."""

    operation_name: str


@dataclass(frozen=True, slots=True)
class OperationForgotten:
    """The operation is unknown from now on."""

    operation_name: str


@dataclass(frozen=True, slots=True)
class ExecutionMerged:
    """A request joined an execution that was under way."""

    operation_name: str


@dataclass(frozen=True, slots=True)
class StartAction:
    """Give a task to a worker."""

    worker_id: str
    connection_id: int
    lease_id: str
    task: Task
    spec: ActionSpec


@dataclass(frozen=True, slots=True)
class CancelAction:
    """Tell a worker to end what it runs under a lease."""

    worker_id: str
    connection_id: int
    lease_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class CloseConnection:
    """End a worker's stream: another one took its place, or the worker is lost."""

    connection_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is given up; for the log."""

    worker_id: str
    reason: str
    requeued_count: int


@dataclass(frozen=True, slots=True)
class FinishIgnored:
    """A worker reported the end of a lease that it does not hold; for the log."""

    worker_id: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class TaskRequeued:
    """An attempt was lost, and another one follows; for the log."""

    task: Task
    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class TaskCompleted:
    """A task is over; for the metrics, the log, and whoever remembers inputs.

    Attributes:
        task: The task, its ``spec`` gone already.
        spec: The action, if it was ever queued.
        outcome: How it ended.
    """

    task: Task
    spec: ActionSpec | None
    outcome: Outcome


QueueEffect = (
    CheckAction
    | AbandonCheck
    | OperationChanged
    | OperationForgotten
    | ExecutionMerged
    | StartAction
    | CancelAction
    | CloseConnection
    | WorkerLost
    | FinishIgnored
    | TaskRequeued
    | TaskCompleted
)
