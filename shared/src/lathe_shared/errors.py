"""Errors of the domain, each with the gRPC status that a client sees.

Code anywhere in a service raises these; only ``service_boundary`` turns them into gRPC statuses. Every message names
what is wrong, because a build engineer reads it in a Bazel log, far away from the service that wrote it.

Spec: REAPI, the error lists of each RPC; google/rpc/error_details.proto for the details.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import betterproto
from grpclib.const import Status
from typing_extensions import override

from lathe_protos import rpc

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lathe_shared.digest import Digest

MISSING_VIOLATION_TYPE = "MISSING"
"""PreconditionFailure violation type by which clients recognise blobs that they should upload again."""


class LatheError(Exception):
    """Base of all errors that a client may see.

    Attributes:
        status: The gRPC status that the RPC ends with.
        message: What the client reads.
    """

    status: ClassVar[Status] = Status.UNKNOWN

    def __init__(self, message: str, details: Iterable[betterproto.Message] = ()) -> None:
        super().__init__(message)
        self.message = message
        self._details = tuple(details)

    @property
    def details(self) -> Sequence[betterproto.Message]:
        """Messages of google/rpc/error_details.proto that travel with the status."""
        return self._details


class InvalidArgumentError(LatheError):
    """The request itself is wrong; sending it again cannot help. Names the offending field.

    Args:
        field: Path of the field in the request, as the .proto names it.
        reason: What is wrong with its value, and what would be accepted.
    """

    status = Status.INVALID_ARGUMENT

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    @property
    @override
    def details(self) -> Sequence[betterproto.Message]:
        # Made when asked for: a batch of tiny blobs can have tens of thousands of these, and sends none of the details.
        violation = rpc.BadRequestFieldViolation(field=self.field, description=self.reason)
        return (rpc.BadRequest(field_violations=[violation]),)


class UnknownInstanceError(InvalidArgumentError):
    """The instance name is not one of the configured ones.

    Never INTERNAL: Bazel would retry for a minute what is a typing mistake.
    """

    def __init__(self, instance_name: str, known: Iterable[str]) -> None:
        names = ", ".join(repr(name) for name in sorted(known))
        super().__init__("instance_name", f"unknown instance {instance_name!r}; this service knows {names}")


class DigestMismatchError(InvalidArgumentError):
    """The bytes that arrived are not those that the digest promises. Nothing was stored."""

    def __init__(self, expected: Digest, got: str) -> None:
        super().__init__("digest", f"the bytes do not match {expected}: they are {got}")


class NotFoundError(LatheError):
    """A blob, action result, operation or upload that is not there."""

    status = Status.NOT_FOUND


class BlobNotFoundError(NotFoundError):
    """A blob that the content addressable storage does not hold."""

    def __init__(self, digest: Digest) -> None:
        super().__init__(f"blob {digest} is not in the content addressable storage")
        self.digest = digest


class FailedPreconditionError(LatheError):
    """Something outside the request must change before it can succeed."""

    status = Status.FAILED_PRECONDITION


class MissingInputsError(FailedPreconditionError):
    """Blobs that an action needs are not in the content addressable storage.

    Carries one MISSING violation per blob, by which clients know what to upload before they try again.

    Spec: REAPI, Execution.Execute, "Missing input blobs".
    """

    def __init__(self, digests: Iterable[Digest]) -> None:
        self.digests = tuple(digests)
        violations = [
            rpc.PreconditionFailureViolation(
                type=MISSING_VIOLATION_TYPE, subject=f"blobs/{digest}", description="needed by the action"
            )
            for digest in self.digests
        ]
        shown = ", ".join(str(digest) for digest in self.digests[:3])
        more = f" and {len(self.digests) - 3} more" if len(self.digests) > 3 else ""
        super().__init__(
            f"the content addressable storage lacks {shown}{more}", [rpc.PreconditionFailure(violations=violations)]
        )


class OutOfRangeError(LatheError):
    """A read that begins past the end of its blob."""

    status = Status.OUT_OF_RANGE


class ResourceExhaustedError(LatheError):
    """A size, count or disk limit is reached; the message says which, and what to change."""

    status = Status.RESOURCE_EXHAUSTED


class UnavailableError(LatheError):
    """A peer service or this one is away for the moment; clients try again."""

    status = Status.UNAVAILABLE


class UnimplementedError(LatheError):
    """Part of the protocol that this service does not offer, nor advertises."""

    status = Status.UNIMPLEMENTED


class PermissionDeniedError(LatheError):
    """The caller is known, and may not do this."""

    status = Status.PERMISSION_DENIED


class DeadlineExceededError(LatheError):
    """Time ran out: the RPC's own deadline or an action's timeout."""

    status = Status.DEADLINE_EXCEEDED


class AbortedError(LatheError):
    """Given up after a bounded number of tries; the message says how many and why each one failed."""

    status = Status.ABORTED


class ExecutionCancelledError(LatheError):
    """An execution that a client cancelled."""

    status = Status.CANCELLED


class InternalError(LatheError):
    """A bug, or a peer that broke the protocol. The log has the traceback under the same error id."""

    status = Status.INTERNAL
