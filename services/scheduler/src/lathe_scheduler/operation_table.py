"""All operations by name, from the request until some time after the end.

Done ones are kept for a while, because a client that lost its connection asks for the outcome when it is back; bounded
in time, number and bytes, since they hold results.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from lathe_scheduler.operation import Operation
from lathe_scheduler.timers import TimerKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lathe_scheduler.queue_settings import QueueSettings
    from lathe_scheduler.task import Outcome, Task
    from lathe_scheduler.timers import Timers


class OperationTable:
    """Operations by name.

    Args:
        settings: How long and how many.
        timers: Where to ask for ``OPERATION_EXPIRED`` deadlines.
    """

    def __init__(self, settings: QueueSettings, timers: Timers) -> None:
        self._settings = settings
        self._timers = timers
        self._by_name: dict[str, Operation] = {}
        # In the order in which they were done.
        self._done: OrderedDict[str, Operation] = OrderedDict()
        self._done_bytes = 0

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Operation | None:
        """Look one up."""
        return self._by_name.get(name)

    def add(self, name: str, task: Task) -> Operation:
        """Make an operation on a task, with one listener."""
        if name in self._by_name:
            raise RuntimeError(f"operation {name} exists already")
        operation = Operation(name, task.key, task, listeners=1)
        task.operations[name] = operation
        self._by_name[name] = operation
        return operation

    def finish(self, operation: Operation, outcome: Outcome, now: float) -> list[str]:
        """Mark an operation done and part it from its task.

        Returns:
            Names of older done operations that had to make room.
        """
        if operation.task is not None:
            operation.task.operations.pop(operation.name, None)
            operation.task = None
        operation.outcome = outcome
        operation.done_at = now
        self._done[operation.name] = operation
        self._timers.set(now + self._settings.completed_retention_seconds, TimerKind.OPERATION_EXPIRED, operation.name)
        self._done_bytes += _size_bytes(operation)
        forgotten = []
        while len(self._done) > self._settings.max_completed_operations or (
            self._done_bytes > self._settings.max_completed_bytes and len(self._done) > 1
        ):
            name = next(iter(self._done))
            self.forget(name)
            forgotten.append(name)
        return forgotten

    def forget(self, name: str) -> bool:
        """Drop a done operation; tell whether there was one."""
        operation = self._done.pop(name, None)
        if operation is None:
            return False
        self._done_bytes -= _size_bytes(operation)
        del self._by_name[name]
        return True


def _size_bytes(operation: Operation) -> int:
    response = operation.outcome.response if operation.outcome is not None else None
    return len(response) if response is not None else 0
