"""The worker API's messages: checked where they come in, written where they go out.

Spec: lathe/worker/v1/worker.proto.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import betterproto

from lathe_protos import rpc, worker_v1
from lathe_scheduler import queue_events as events
from lathe_scheduler.operation_messages import timestamp
from lathe_scheduler.task import ActionKey
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.message_decoding import decode
from lathe_shared.wire import bytes_field, message_field, scan, string_field, text, varint_field

if TYPE_CHECKING:
    from lathe_scheduler.platform_key import PlatformProperties
    from lathe_scheduler.queue_effects import CancelAction, StartAction

PROTOCOL_VERSION = 1
"""The only version of the worker API so far."""

MAX_SLOTS = 100_000
"""Most actions that a worker may run at once: a bound on what one message can claim."""

MAX_ID_LENGTH = 256
"""Longest worker id and lease id."""

_FAILED_PRECONDITION = 9
_OK = rpc.Status()


def parse_registration(
    register: worker_v1.Register, connection_id: int, properties: PlatformProperties
) -> events.WorkerConnected:
    """Check how a worker introduces itself.

    Raises:
        InvalidArgumentError: Names the field.
    """
    _check_id("register.worker_id", register.worker_id)
    if not 1 <= register.slots <= MAX_SLOTS:
        raise InvalidArgumentError("register.slots", f"{register.slots} is not from 1 to {MAX_SLOTS}")
    offer = properties.offer(((item.name, item.value) for item in register.properties), "register.properties")
    held = [_held(action, index) for index, action in enumerate(register.held)]
    return events.WorkerConnected(
        register.worker_id, connection_id, offer, register.slots, held, register.version[:MAX_ID_LENGTH]
    )


def _held(action: worker_v1.HeldAction, index: int) -> events.HeldLease:
    field = f"register.held[{index}]"
    _check_id(f"{field}.lease_id", action.lease_id)
    try:
        function = select_function(action.digest_function, len(action.action_digest.hash), tuple(DigestFunction))
        digest = Digest.from_message(action.action_digest, function)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{field}.action_digest", error.message) from None
    return events.HeldLease(action.lease_id, ActionKey(action.instance_name, digest))


def read_registration(data: bytes) -> worker_v1.Register:
    """Read a stream's first message.

    Raises:
        InvalidArgumentError: It is no registration.
    """
    name, message = betterproto.which_one_of(decode(worker_v1.WorkerMessage, data), "message")
    if not isinstance(message, worker_v1.Register):
        raise InvalidArgumentError("message", f"the first message must be register, not {name or 'an unknown kind'}")
    return message


def worker_event(worker_id: str, connection_id: int, data: bytes) -> events.WorkerEvent | None:
    """Turn what a registered worker says into an event; None for what this version does not know.

    Raises:
        InvalidArgumentError: The bytes are no WorkerMessage, or one that has no place here.
    """
    kind, body = 0, b""
    for tag, a, b in scan(data):
        if tag in _KINDS:
            # Of a oneof the last member counts; parts of one member belong together.
            body = body + data[a:b] if tag == kind else data[a:b]
            kind = tag
    if kind == _REGISTER:
        raise InvalidArgumentError("message.register", "a worker registers once in a connection")
    if kind == _HEARTBEAT:
        leases = [text(body, a, b) for tag, a, b in scan(body) if tag == 0x0A]
        return events.WorkerHeartbeat(worker_id, connection_id, leases)
    if kind == _STARTED:
        return _started(worker_id, connection_id, body)
    if kind == _FINISHED:
        return _finished(worker_id, connection_id, body)
    if kind == _DRAINING:
        return events.WorkerDraining(worker_id, connection_id)
    return None


_REGISTER, _HEARTBEAT, _STARTED, _FINISHED, _DRAINING = _KINDS = 0x0A, 0x12, 0x1A, 0x22, 0x2A
"""Tags of WorkerMessage's members."""


def _started(worker_id: str, connection_id: int, body: bytes) -> events.ActionStarted:
    lease_id, start = "", b""
    for tag, a, b in scan(body):
        if tag == 0x0A:
            lease_id = text(body, a, b)
        elif tag == 0x12:
            start += body[a:b]
    for _ in scan(start):
        pass  # it goes to clients as it is
    return events.ActionStarted(worker_id, connection_id, lease_id, start)


def _finished(worker_id: str, connection_id: int, body: bytes) -> events.ActionFinished:
    lease_id, response, is_fault = "", b"", False
    for tag, a, b in scan(body):
        if tag == 0x0A:
            lease_id = text(body, a, b)
        elif tag == 0x12:
            response = body[a:b]
        elif tag == 0x18:
            is_fault = a != 0
    # A client would fail to parse what is no message; here it is still known who sent it.
    message = response_status(response).message
    return events.ActionFinished(worker_id, connection_id, lease_id, response, is_fault, message if is_fault else "")


def response_status(response: bytes) -> rpc.Status:
    """Return the status inside an ExecuteResponse; an empty one, which is OK, if it has none.

    Raises:
        InvalidArgumentError: The bytes are no such message.
    """
    status = b"".join(response[a:b] for tag, a, b in scan(response) if tag == 0x1A)
    return decode(rpc.Status, status) if status else _OK


def reports_missing(response: bytes) -> bool:
    """Tell whether an ExecuteResponse says that inputs are missing."""
    try:
        return response_status(response).code == _FAILED_PRECONDITION
    except InvalidArgumentError:
        return False


def start_action(effect: StartAction, default_timeout_seconds: float) -> bytes:
    """Write the message that gives a lease."""
    key, spec = effect.task.key, effect.spec
    fields = [
        string_field(1, effect.lease_id),
        string_field(2, key.instance_name),
        varint_field(3, key.digest.function),
        message_field(4, key.digest.wire),
        bytes_field(5, spec.action),
        bytes_field(6, spec.command),
        message_field(7, timestamp(spec.queued_at)),
        bytes_field(8, effect.task.request_metadata),
        varint_field(9, spec.do_not_cache),
        *(string_field(10, path) for path in effect.task.inline_output_files),
    ]
    if default_timeout_seconds:
        seconds, fraction = divmod(default_timeout_seconds, 1)
        fields.append(message_field(11, varint_field(1, int(seconds)) + varint_field(2, int(fraction * 1e9))))
    return message_field(2, b"".join(fields))


def cancel_action(effect: CancelAction) -> bytes:
    """Write the message that asks a worker to end what it runs."""
    return bytes(
        worker_v1.SchedulerMessage(cancel_action=worker_v1.CancelAction(lease_id=effect.lease_id, reason=effect.reason))
    )


def registered(heartbeat_interval_seconds: float, lost_after_seconds: float) -> bytes:
    """Write the message that accepts a worker."""
    message = worker_v1.Registered(
        heartbeat_interval=datetime.timedelta(seconds=heartbeat_interval_seconds),
        lost_after=datetime.timedelta(seconds=lost_after_seconds),
    )
    return bytes(worker_v1.SchedulerMessage(registered=message))


def refused(reason: str) -> bytes:
    """Write the message that turns a worker away."""
    return bytes(worker_v1.SchedulerMessage(refused=worker_v1.Refused(reason=reason)))


HEARTBEAT_ACK = bytes(worker_v1.SchedulerMessage(heartbeat_ack=worker_v1.HeartbeatAck()))
"""Answers each heartbeat."""


def _check_id(field: str, value: str) -> None:
    if not value or len(value) > MAX_ID_LENGTH or not value.isprintable():
        raise InvalidArgumentError(field, f"must be 1 to {MAX_ID_LENGTH} printable characters")
