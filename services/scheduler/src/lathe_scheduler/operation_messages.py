"""Operations as clients see them: google.longrunning.Operation, written as bytes.

An ExecuteResponse goes into its operation as the bytes that the worker sent.

Spec: REAPI, Execution.Execute, ExecuteOperationMetadata, ExecutionStage; google/longrunning/operations.proto.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from lathe_protos import reapi
from lathe_scheduler.task import TaskState
from lathe_shared.action_result_wire import execute_response
from lathe_shared.status_details import TYPE_URL_PREFIX, status_of
from lathe_shared.wire import bytes_field, message_field, string_field, varint_field

if TYPE_CHECKING:
    import datetime

    from lathe_scheduler.operation import Operation
    from lathe_scheduler.task import ActionKey, Outcome, Task

_PACKAGE = "build.bazel.remote.execution.v2"
_METADATA_TYPE = string_field(1, f"{TYPE_URL_PREFIX}{_PACKAGE}.ExecuteOperationMetadata")
_RESPONSE_TYPE = string_field(1, f"{TYPE_URL_PREFIX}{_PACKAGE}.ExecuteResponse")

_STAGE_NAMES = {
    TaskState.CHECKING: "CACHE_CHECK",
    TaskState.QUEUED: "QUEUED",
    # A worker was told, but has not begun: to the client that is waiting.
    TaskState.ASSIGNED: "QUEUED",
    TaskState.EXECUTING: "EXECUTING",
    TaskState.COMPLETED: "COMPLETED",
}
_STAGES = {state: int(reapi.ExecutionStageValue.from_string(name)) for state, name in _STAGE_NAMES.items()}


def operation_message(operation: Operation) -> bytes:
    """Write an operation in its present state."""
    parts = [string_field(1, operation.name), message_field(2, _METADATA_TYPE + bytes_field(2, _metadata(operation)))]
    if operation.outcome is not None:
        response = outcome_response(operation.outcome)
        parts.append(varint_field(3, 1))
        parts.append(message_field(5, _RESPONSE_TYPE + bytes_field(2, response)))
    return b"".join(parts)


def outcome_response(outcome: Outcome) -> bytes:
    """Return the ExecuteResponse of an outcome.

    Every end is a response, for REAPI forbids Operation.error.
    """
    if outcome.response is not None:
        return outcome.response
    if outcome.error is None:
        raise RuntimeError(f"an outcome of kind {outcome.kind} says nothing")
    return execute_response(None, status=bytes(status_of(outcome.error)))


def stage_name(operation: Operation) -> str:
    """Return the name of an operation's ExecutionStage."""
    return _STAGE_NAMES[operation.state]


def _metadata(operation: Operation) -> bytes:
    parts = [varint_field(1, _STAGES[operation.state]), _digest_field(operation.key)]
    if operation.task is not None and operation.state is TaskState.EXECUTING:
        parts.append(bytes_field(5, _partial_metadata(operation.task)))
    parts.append(varint_field(6, operation.key.digest.function))
    return b"".join(parts)


@lru_cache(maxsize=10_000)
def _digest_field(key: ActionKey) -> bytes:
    return message_field(2, key.digest.wire)


def _partial_metadata(task: Task) -> bytes:
    """Write what is known of an ExecutedActionMetadata while the action runs."""
    parts = []
    if task.lease is not None:
        parts.append(string_field(1, task.lease.worker.id))
    if task.spec is not None:
        parts.append(message_field(2, timestamp(task.spec.queued_at)))
    if task.lease is not None and task.lease.started_at:
        parts.append(message_field(7, task.lease.started_at))
    return b"".join(parts)


def timestamp(moment: datetime.datetime) -> bytes:
    """Write a google.protobuf.Timestamp."""
    seconds = int(moment.timestamp() // 1)
    return varint_field(1, seconds) + varint_field(2, moment.microsecond * 1000)
