"""ActionOutcome: what the scheduler is told about an action in the end, and how failures become that.

Whose fault a failure is decides what follows: the action's own (or its client's) goes back to the client at once; the
worker's or its surroundings' makes the scheduler try elsewhere.

Spec: REAPI, ExecuteResponse; lathe/worker/v1/worker.proto, ActionFinished.
"""

from __future__ import annotations

import enum
import errno
import uuid
from dataclasses import dataclass

from grpclib.const import Status

from lathe_protos import reapi, rpc
from lathe_shared.action_result_wire import execute_response
from lathe_shared.errors import ExecutionCancelledError, InternalError, LatheError, ResourceExhaustedError
from lathe_shared.status_details import status_of
from lathe_worker.sandbox import SandboxError

_WORTH_ANOTHER_WORKER = frozenset(
    {Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.INTERNAL, Status.UNKNOWN, Status.ABORTED, Status.DATA_LOSS}
)
"""Answers of the content addressable storage that may differ for another worker or a little later."""

_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


class OutcomeKind(enum.Enum):
    """How an action ended, as metrics count it."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    WORKER_FAULT = "worker_fault"


@dataclass(frozen=True, slots=True)
class ActionOutcome:
    """How an action ended.

    Attributes:
        kind: For metrics and log.
        execute_response: A serialized ExecuteResponse.
        message: What went wrong; empty if nothing did.
    """

    kind: OutcomeKind
    execute_response: bytes
    message: str = ""

    @property
    def worker_fault(self) -> bool:
        """Whether the scheduler should try elsewhere."""
        return self.kind is OutcomeKind.WORKER_FAULT


def finished(kind: OutcomeKind, result: reapi.ActionResult, status: rpc.Status | None, message: str) -> ActionOutcome:
    """Describe an action that ran.

    Args:
        kind: How it ended.
        result: What it made, metadata included.
        status: What the client is to see in place of OK.
        message: Text for the client's user.
    """
    wire_status = bytes(status) if status is not None else b""
    return ActionOutcome(kind, execute_response(bytes(result), status=wire_status, message=message), message)


def failed(error: Exception, worker_name: str) -> ActionOutcome:
    """Describe an action that could not be run, or whose outputs could not be taken.

    An error that nobody foresaw is a bug here: the message carries an id that the log has, too, and no more.
    """
    if isinstance(error, LatheError):
        is_fault = error.status in _WORTH_ANOTHER_WORKER
        return _failure(OutcomeKind.WORKER_FAULT if is_fault else OutcomeKind.REFUSED, error)
    if isinstance(error, SandboxError):
        return _failure(OutcomeKind.WORKER_FAULT, InternalError(f"worker {worker_name}: sandbox: {error}"))
    if isinstance(error, OSError):
        text = f"worker {worker_name}: {error.strerror or error}"
        known = ResourceExhaustedError(text) if error.errno in _FULL_DISK else InternalError(text)
        return _failure(OutcomeKind.WORKER_FAULT, known)
    return _failure(OutcomeKind.WORKER_FAULT, InternalError(f"worker {worker_name}: error {new_error_id(error)}"))


def cancelled(reason: str) -> ActionOutcome:
    """Describe an action that was killed because nobody wants it any longer."""
    return _failure(OutcomeKind.CANCELLED, ExecutionCancelledError(reason or "cancelled"))


def is_foreseen(error: Exception) -> bool:
    """Tell whether an error is one that ``failed`` can name."""
    return isinstance(error, (LatheError, SandboxError, OSError))


def new_error_id(error: Exception) -> str:
    """Return the id by which an unforeseen error is found in the log; the same each time it is asked for."""
    notes: list[str] = getattr(error, "__notes__", [])
    if not notes:
        error.add_note(uuid.uuid4().hex[:12])
        notes = error.__notes__
    return notes[0]


def _failure(kind: OutcomeKind, error: LatheError) -> ActionOutcome:
    response = execute_response(None, status=bytes(status_of(error)), message=error.message)
    return ActionOutcome(kind, response, error.message)
