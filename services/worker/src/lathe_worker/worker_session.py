"""WorkerSession: the worker's side of its conversation with the scheduler, without I/O.

A runner tells it what happens (a connection, a message, an action's end, the passing of time) and asks it what to send.
Leases outlive connections: what was running or is not known to have been delivered is named again after a reconnection.

Spec: lathe/worker/v1/worker.proto.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_protos import reapi, worker_v1
from lathe_shared.errors import UnavailableError
from lathe_shared.message_decoding import decode
from lathe_worker.action_outcome import failed
from lathe_worker.session_effects import Accepted, Effect, KillAction, RunAction, TurnedAway

if TYPE_CHECKING:
    import datetime
    from collections.abc import Mapping, Sequence

PROTOCOL_VERSION = 1


class SessionState(enum.Enum):
    """Where the conversation is."""

    DISCONNECTED = "disconnected"
    REGISTERING = "registering"
    REGISTERED = "registered"


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """What a worker says of itself.

    Attributes:
        worker_id: The same for the life of the process.
        properties: What it offers; each name with one or several values.
        slots: How many actions it runs at once.
        version: Of the software.
    """

    worker_id: str
    properties: Mapping[str, Sequence[str]]
    slots: int
    version: str


@dataclass(slots=True)
class _Lease:
    held: worker_v1.HeldAction
    started: bytes = b""
    finished: bytes = b""
    heartbeats_before: int = 0
    """How many heartbeats had been sent on this connection when ``finished`` was."""


class WorkerSession:
    """One worker's conversation, over any number of connections.

    Times are monotonic seconds.

    Args:
        description: What the worker says of itself.
    """

    def __init__(self, description: WorkerDescription) -> None:
        self._description = description
        self._leases: dict[str, _Lease] = {}
        self._outgoing: list[bytes] = []
        self._draining = False
        self._heartbeats_sent = 0
        self._heartbeats_acknowledged = 0
        self._heartbeat_interval = 0.0
        self._lost_after = 0.0
        self._next_heartbeat = 0.0
        self._last_heard = 0.0
        self.state = SessionState.DISCONNECTED

    # What happens

    def connected(self) -> None:
        """Begin a conversation on a new connection."""
        self.state = SessionState.REGISTERING
        self._heartbeats_sent = self._heartbeats_acknowledged = 0
        description = self._description
        register = worker_v1.Register(
            worker_id=description.worker_id,
            protocol_version=PROTOCOL_VERSION,
            properties=[
                worker_v1.Property(name=name, value=value)
                for name, values in description.properties.items()
                for value in values
            ],
            slots=description.slots,
            held=[lease.held for lease in self._leases.values()],
            version=description.version,
        )
        self._outgoing = [bytes(worker_v1.WorkerMessage(register=register))]

    def disconnected(self) -> None:
        """Note that the connection is gone; leases stay."""
        self.state = SessionState.DISCONNECTED
        self._outgoing = []

    def received(self, data: bytes, now: float) -> list[Effect]:
        """Take in a message and return what to do.

        Raises:
            MalformedMessageError: The bytes are no message; the connection is of no more use.
        """
        self._last_heard = now
        message = decode(worker_v1.SchedulerMessage, data)
        if message.is_set("registered"):
            return self._registered(message.registered, now)
        if message.is_set("start_action"):
            return self._start_action(message.start_action)
        if message.is_set("cancel_action"):
            return self._cancel_action(message.cancel_action)
        if message.is_set("heartbeat_ack"):
            self._heartbeats_acknowledged += 1
            self._drop_delivered()
        if message.is_set("refused"):
            return [TurnedAway(message.refused.reason)]
        return []

    def action_started(self, lease_id: str, when: datetime.datetime) -> None:
        """Note that an action's command is about to run."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            started = worker_v1.ActionStarted(lease_id=lease_id, execution_start=when)
            lease.started = bytes(worker_v1.WorkerMessage(action_started=started))
            self._send(lease.started)

    def action_finished(self, lease_id: str, execute_response: bytes, *, worker_fault: bool, now: float) -> None:
        """Note how an action ended; the result is kept until the scheduler has it."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        finished = worker_v1.ActionFinished(
            lease_id=lease_id, execute_response=execute_response, worker_fault=worker_fault
        )
        lease.finished = bytes(worker_v1.WorkerMessage(action_finished=finished))
        self._send_finished(lease)
        self._hasten(now)

    def drain(self, now: float) -> None:
        """Take nothing new from now on."""
        if not self._draining:
            self._draining = True
            self._send(_DRAINING)
            self._hasten(now)

    def tick(self, now: float) -> None:
        """Do what is due; called at or after ``next_due``."""
        if self.state is SessionState.REGISTERED and now >= self._next_heartbeat:
            self._send_heartbeat(now)

    # What to do

    def take_outgoing(self) -> list[bytes]:
        """Return what must be sent, in order, and forget it."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def next_due(self) -> float | None:
        """Return when ``tick`` must be called next, or silence will have lasted too long; None for no time."""
        if self.state is not SessionState.REGISTERED:
            return None
        return min(self._next_heartbeat, self._last_heard + self._lost_after)

    def is_silent(self, now: float) -> bool:
        """Tell whether the scheduler has been silent for so long that the connection counts as dead."""
        return self.state is SessionState.REGISTERED and now >= self._last_heard + self._lost_after

    @property
    def is_draining(self) -> bool:
        """Whether the worker takes nothing new any longer."""
        return self._draining

    @property
    def is_drained(self) -> bool:
        """Whether the worker may leave: it is draining, and every result has reached the scheduler."""
        return self._draining and not self._leases

    @property
    def running(self) -> list[str]:
        """Leases whose actions run."""
        return [lease_id for lease_id, lease in self._leases.items() if not lease.finished]

    @property
    def undelivered(self) -> int:
        """How many results may not have reached the scheduler."""
        return len(self._leases) - len(self.running)

    # Inside

    def _registered(self, message: worker_v1.Registered, now: float) -> list[Effect]:
        self.state = SessionState.REGISTERED
        self._heartbeat_interval = max(message.heartbeat_interval.total_seconds(), 0.1)
        self._lost_after = max(message.lost_after.total_seconds(), 2 * self._heartbeat_interval)
        self._next_heartbeat = now + self._heartbeat_interval
        if self._draining:
            self._send(_DRAINING)
        for lease in self._leases.values():
            if lease.finished:
                self._send_finished(lease)
            elif lease.started:
                self._send(lease.started)
        self._hasten(now)
        return [Accepted()]

    def _start_action(self, start: worker_v1.StartAction) -> list[Effect]:
        if start.lease_id in self._leases:
            return []
        busy = len(self.running) >= self._description.slots
        self._leases[start.lease_id] = lease = _Lease(
            worker_v1.HeldAction(
                lease_id=start.lease_id,
                instance_name=start.instance_name,
                digest_function=start.digest_function,
                action_digest=start.action_digest or reapi.Digest(),
            )
        )
        if not self._draining and not busy:
            return [RunAction(start)]
        reason = "the worker is draining" if self._draining else "all slots are taken"
        finished = worker_v1.ActionFinished(
            lease_id=start.lease_id,
            execute_response=failed(UnavailableError(reason), self._description.worker_id).execute_response,
            worker_fault=True,
        )
        lease.finished = bytes(worker_v1.WorkerMessage(action_finished=finished))
        self._send_finished(lease)
        return []

    def _cancel_action(self, cancel: worker_v1.CancelAction) -> list[Effect]:
        lease = self._leases.get(cancel.lease_id)
        if lease is None:
            return []
        if lease.finished:
            self._send_finished(lease)
            return []
        return [KillAction(cancel.lease_id, cancel.reason)]

    def _send(self, message: bytes) -> None:
        """Send now, or, while there is no conversation, not at all: registering says everything that still matters."""
        if self.state is SessionState.REGISTERED:
            self._outgoing.append(message)

    def _send_finished(self, lease: _Lease) -> None:
        lease.heartbeats_before = self._heartbeats_sent
        self._send(lease.finished)

    def _send_heartbeat(self, now: float) -> None:
        heartbeat = worker_v1.Heartbeat(lease_ids=self.running)
        self._send(bytes(worker_v1.WorkerMessage(heartbeat=heartbeat)))
        self._heartbeats_sent += 1
        self._next_heartbeat = now + self._heartbeat_interval

    def _hasten(self, now: float) -> None:
        """While leaving, ask for the acknowledgement of the last results at once."""
        if self._draining and self.state is SessionState.REGISTERED and self._leases and not self.running:
            self._send_heartbeat(now)

    def _drop_delivered(self) -> None:
        """Forget results that were sent before a heartbeat which the scheduler has answered: it has read those, too."""
        delivered = [
            lease_id
            for lease_id, lease in self._leases.items()
            if lease.finished and self._heartbeats_acknowledged > lease.heartbeats_before
        ]
        for lease_id in delivered:
            del self._leases[lease_id]


_DRAINING = bytes(worker_v1.WorkerMessage(draining=worker_v1.Draining()))
