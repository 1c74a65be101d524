"""Operation: one client's handle on a task.

Two clients that ask for the same action share a task, and each has an operation of its own: one may cancel or go away
without the other one noticing.

Spec: REAPI, Execution.Execute; google/longrunning/operations.proto.
"""

from __future__ import annotations

from dataclasses import dataclass

from lathe_scheduler.task import ActionKey, Outcome, Task, TaskState


@dataclass(slots=True, eq=False)
class Operation:
    """One client's handle; see the module's text.

    Attributes:
        name: ``{instance}/operations/{uuid}``, without the prefix if the instance name is empty.
        key: What is executed.
        task: The execution; None when the operation is done, so that it can be forgotten.
        listeners: Streams that follow it now.
        abandoned_at: Since when nobody follows it, on the queue's clock; None while somebody does.
        outcome: Set when done. An operation that was cancelled alone is done before its task.
        done_at: When it was done, on the queue's clock.
    """

    name: str
    key: ActionKey
    task: Task | None
    listeners: int = 0
    abandoned_at: float | None = None
    outcome: Outcome | None = None
    done_at: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the outcome is known."""
        return self.outcome is not None

    @property
    def state(self) -> TaskState:
        """The task's state, or COMPLETED if the operation ended before it."""
        return TaskState.COMPLETED if self.task is None else self.task.state
