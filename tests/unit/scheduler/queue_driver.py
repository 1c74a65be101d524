"""Drives an ActionQueue by plain calls and keeps the books of what it asked for."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Mapping

from lathe_scheduler import queue_effects as effects
from lathe_scheduler import queue_events as events
from lathe_scheduler.action_queue import ActionQueue
from lathe_scheduler.operation import Operation
from lathe_scheduler.platform_key import PlatformProperties, PropertyKind
from lathe_scheduler.queue_settings import QueueSettings
from lathe_scheduler.task import ActionKey, ActionSpec, Outcome, OutcomeKind
from lathe_scheduler.worker import WorkerState
from lathe_shared.digest import EMPTY_DIGEST, Digest

PROPERTIES = PlatformProperties(
    {
        "cpu_count": PropertyKind.MINIMUM,
        "memory_gb": PropertyKind.MINIMUM,
        "OSFamily": PropertyKind.EXACT,
        "pool": PropertyKind.PRIORITY,
        "note": PropertyKind.IGNORE,
    }
)
SUBMITTED_AT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


class QueueDriver:
    """An ActionQueue at time ``now``, with shorthands; names of operations, actions and workers are plain words."""

    def __init__(self, settings: QueueSettings | None = None) -> None:
        self.settings = settings or QueueSettings()
        self.now = 1000.0
        self.queue = ActionQueue(self.settings, "lease", self.now)
        self.effects: list[effects.QueueEffect] = []
        self.started: list[effects.StartAction] = []
        self._connection_ids = itertools.count(1)
        self.connections: dict[str, int] = {}
        self._names = itertools.count(1)

    def handle(self, event: events.QueueEvent) -> list[effects.QueueEffect]:
        produced = self.queue.handle(event, self.now)
        self.effects += produced
        self.started += [effect for effect in produced if isinstance(effect, effects.StartAction)]
        return produced

    def advance(self, seconds: float) -> list[effects.QueueEffect]:
        """Move the time, stopping at each deadline on the way."""
        end = self.now + seconds
        produced = []
        while (deadline := self.queue.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            produced += self.handle(events.TimePassed())
        self.now = end
        return produced

    # ---- clients

    def request(self, action: str, *, skip_cache: bool = False, priority: int = 0) -> str:
        """Call Execute; returns the operation's name."""
        name = f"operations/{action}-{next(self._names)}"
        self.handle(events.ExecuteRequested(name, action_key(action), skip_cache, priority))
        return name

    def pass_check(self, name: str, *, do_not_cache: bool = False, **platform: str) -> None:
        self.handle(events.CheckPassed(self.task_id(name), spec(do_not_cache=do_not_cache, **platform)))

    def execute(
        self,
        action: str,
        *,
        skip_cache: bool = False,
        priority: int = 0,
        do_not_cache: bool = False,
        **platform: str,
    ) -> str:
        """Call Execute, and let the check pass if one was asked for."""
        name = self.request(action, skip_cache=skip_cache, priority=priority)
        if self.last(effects.CheckAction) is not None and isinstance(self.effects[-1], effects.CheckAction):
            self.pass_check(name, do_not_cache=do_not_cache, **platform)
        return name

    def task_id(self, name: str) -> int:
        task = self.operation(name).task
        assert task is not None
        return task.id

    def operation(self, name: str) -> Operation:
        operation = self.queue.operation(name)
        assert operation is not None, f"{name} is unknown"
        return operation

    def outcome(self, name: str) -> Outcome:
        outcome = self.operation(name).outcome
        assert outcome is not None, f"{name} is not done"
        return outcome

    def outcome_kind(self, name: str) -> OutcomeKind:
        return self.outcome(name).kind

    # ---- workers

    def connect(
        self, worker: str, *, slots: int = 1, held: Iterable[str] = (), **properties: str | Iterable[str]
    ) -> list[effects.QueueEffect]:
        connection_id = self.connections[worker] = next(self._connection_ids)
        pairs = [
            (name, value)
            for name, values in properties.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        leases = [events.HeldLease(lease_id, action_key("held")) for lease_id in held]
        return self.handle(
            events.WorkerConnected(worker, connection_id, PROPERTIES.offer(pairs), slots, leases, "test")
        )

    def disconnect(self, worker: str) -> list[effects.QueueEffect]:
        return self.handle(events.WorkerDisconnected(worker, self.connections[worker]))

    def heartbeat(self, worker: str, leases: Iterable[str] | None = None) -> list[effects.QueueEffect]:
        listed = list(self.queue.workers[worker].leases) if leases is None else list(leases)
        return self.handle(events.WorkerHeartbeat(worker, self.connections[worker], listed))

    def worker_state(self, worker: str) -> WorkerState:
        return self.queue.workers[worker].state

    def begin(self, start: effects.StartAction) -> list[effects.QueueEffect]:
        return self.handle(events.ActionStarted(start.worker_id, start.connection_id, start.lease_id))

    def finish(
        self, start: effects.StartAction, response: bytes = b"", *, fault: bool = False
    ) -> list[effects.QueueEffect]:
        return self.handle(
            events.ActionFinished(
                start.worker_id, start.connection_id, start.lease_id, response, fault, "no space left" if fault else ""
            )
        )

    # ---- books

    def last(self, kind: type) -> object | None:
        return next((effect for effect in reversed(self.effects) if isinstance(effect, kind)), None)

    def of(self, kind: type) -> list[effects.QueueEffect]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def dispatched(self) -> list[tuple[str, str]]:
        """Return what was given to whom, as (action, worker), in order."""
        return [(action_name(start), start.worker_id) for start in self.started]


_NAMES: dict[Digest, str] = {}


def action_key(action: str, instance_name: str = "main") -> ActionKey:
    digest = Digest.of(action.encode())
    _NAMES[digest] = action
    return ActionKey(instance_name, digest)


def action_name(start: effects.StartAction) -> str:
    return _NAMES[start.task.key.digest]


def spec(*, do_not_cache: bool = False, **platform: str) -> ActionSpec:
    properties: Mapping[str, str] = platform
    return ActionSpec(
        b"action", b"command", PROPERTIES.key(properties.items()), EMPTY_DIGEST, do_not_cache, SUBMITTED_AT
    )
