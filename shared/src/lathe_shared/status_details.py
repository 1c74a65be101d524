"""Errors as google.rpc.Status: in trailers, in responses, and back again at the client.

grpclib's own codec for details handles google-protobuf messages only; ours are betterproto's.

Spec: google/rpc/status.proto and error_details.proto; the trailer ``grpc-status-details-bin``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, overload

import betterproto
from betterproto.lib.google.protobuf import Any as AnyMessage
from grpclib.const import Status
from grpclib.encoding.base import StatusDetailsCodecBase
from typing_extensions import override

from lathe_protos import longrunning, reapi, rpc
from lathe_shared import errors
from lathe_shared.errors import LatheError
from lathe_shared.message_decoding import decode
from lathe_shared.wire import MalformedMessageError

if TYPE_CHECKING:
    from collections.abc import Sequence

MessageT = TypeVar("MessageT", bound=betterproto.Message)

TYPE_URL_PREFIX = "type.googleapis.com/"

MAX_DETAILS_BYTES = 4096
"""Bound on a serialized Status in a trailer. Clients refuse headers of more than 8 KiB in all by default, and what is
binary travels in base64; a refused trailer would hide the error itself."""

MAX_MESSAGE_CHARACTERS = 1024
"""Bound on a status message in a trailer, for the same reason."""

_OUR_PACKAGE = "lathe_protos."
_PACKAGES = {"google.rpc": rpc, "google.longrunning": longrunning, "build.bazel.remote.execution.v2": reapi}


def full_name(message_class: type[betterproto.Message]) -> str:
    """Return the name that the .proto gives to a top-level message, such as ``google.rpc.BadRequest``.

    betterproto does not keep it. A nested message's class name is not its full name; none of those travels in an Any.
    """
    module = message_class.__module__
    if module.startswith(_OUR_PACKAGE):
        return f"{module.removeprefix(_OUR_PACKAGE)}.{message_class.__name__}"
    return f"google.protobuf.{message_class.__name__}"


def pack_any(message: betterproto.Message) -> AnyMessage:
    """Put a message into a google.protobuf.Any."""
    return AnyMessage(type_url=TYPE_URL_PREFIX + full_name(type(message)), value=bytes(message))


@overload
def unpack_any(value: AnyMessage) -> betterproto.Message: ...
@overload
def unpack_any(value: AnyMessage, expected: type[MessageT]) -> MessageT: ...


def unpack_any(value: AnyMessage, expected: type[betterproto.Message] | None = None) -> betterproto.Message:
    """Take the message out of a google.protobuf.Any.

    Args:
        value: The Any.
        expected: The class that it must hold. Without one any message of google.rpc, google.longrunning and REAPI is
            taken out, and an Any of another type comes back as it is.

    Raises:
        MalformedMessageError: It holds another message than ``expected``, or bytes that are none.
    """
    name = value.type_url.rpartition("/")[2]
    if expected is not None:
        if name != full_name(expected):
            raise MalformedMessageError(f"an Any holds {name!r} where {full_name(expected)} belongs")
        return decode(expected, value.value)
    package, _, class_name = name.rpartition(".")
    found = getattr(_PACKAGES.get(package), class_name, None)
    if isinstance(found, type) and issubclass(found, betterproto.Message):
        return decode(found, value.value)
    return value


def status_of(error: LatheError) -> rpc.Status:
    """Turn an error into the Status that responses carry in a field, such as ExecuteResponse.status."""
    return rpc.Status(
        code=error.status.value, message=error.message, details=[pack_any(detail) for detail in error.details]
    )


def error_of(status: rpc.Status) -> LatheError:
    """Turn a Status that a response carries back into an error; it must not be OK."""
    return error_from(_status(status.code), status.message, [unpack_any(detail) for detail in status.details])


def error_from(status: Status, message: str | None, details: Sequence[betterproto.Message] = ()) -> LatheError:
    """Make the error that stands for a status which a peer answered with.

    The peer's message and details are kept, so that raising it again passes them on unchanged.
    """
    error_class = _CLASSES.get(status, errors.InternalError)
    error = error_class.__new__(error_class)
    LatheError.__init__(error, message or status.name, details)
    if isinstance(error, errors.InvalidArgumentError):
        error.field, error.reason = _first_violation(details) or ("", error.message)
    return error


def _first_violation(details: Sequence[betterproto.Message]) -> tuple[str, str] | None:
    for detail in details:
        if isinstance(detail, rpc.BadRequest) and detail.field_violations:
            violation = detail.field_violations[0]
            return violation.field, violation.description
    return None


_CLASSES: dict[Status, type[LatheError]] = {
    Status.INVALID_ARGUMENT: errors.InvalidArgumentError,
    Status.NOT_FOUND: errors.NotFoundError,
    Status.FAILED_PRECONDITION: errors.FailedPreconditionError,
    Status.OUT_OF_RANGE: errors.OutOfRangeError,
    Status.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    Status.UNAVAILABLE: errors.UnavailableError,
    Status.UNIMPLEMENTED: errors.UnimplementedError,
    Status.PERMISSION_DENIED: errors.PermissionDeniedError,
    Status.UNAUTHENTICATED: errors.PermissionDeniedError,
    Status.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    Status.ABORTED: errors.AbortedError,
    Status.CANCELLED: errors.ExecutionCancelledError,
}


def _status(code: int) -> Status:
    try:
        return Status(code)
    except ValueError:
        return Status.UNKNOWN


class LatheStatusDetailsCodec(StatusDetailsCodecBase):
    """Details of a status as betterproto messages, for grpclib's Server and Channel."""

    @override
    def encode(self, status: Status, message: str | None, details: Sequence[betterproto.Message]) -> bytes:
        whole = rpc.Status(
            code=status.value, message=message or "", details=[pack_any(detail) for detail in _bounded(details)]
        )
        return bytes(whole)

    @override
    def decode(self, status: Status, message: str | None, data: bytes) -> list[betterproto.Message]:
        try:
            return [unpack_any(detail) for detail in decode(rpc.Status, data).details]
        except MalformedMessageError:
            # A peer's broken details must not hide its status.
            return []


def _bounded(details: Sequence[betterproto.Message]) -> list[betterproto.Message]:
    """Cut details to what a trailer can carry: whole ones as far as they fit, then violations of the next one."""
    kept: list[betterproto.Message] = []
    room = MAX_DETAILS_BYTES - MAX_MESSAGE_CHARACTERS
    for detail in details:
        size = len(bytes(pack_any(detail)))
        if size > room:
            # What is not mentioned is found at the next try; what is mentioned can be mended now.
            if isinstance(detail, rpc.PreconditionFailure):
                share = len(detail.violations) * room // size
                kept.append(rpc.PreconditionFailure(violations=detail.violations[:share]))
            break
        kept.append(detail)
        room -= size
    return kept
