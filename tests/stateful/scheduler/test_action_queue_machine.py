"""Any order of events leaves the action queue consistent, and nothing that was asked for is lost."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.scheduler.queue_driver import PROPERTIES, action_key, spec
from typing_extensions import override

from lathe_scheduler import queue_effects as effects
from lathe_scheduler import queue_events as events
from lathe_scheduler.action_queue import ActionQueue
from lathe_scheduler.queue_settings import QueueSettings
from lathe_scheduler.task import Outcome, OutcomeKind, Task, TaskState
from lathe_scheduler.task_transitions import MAX_UNSTARTED_LOSSES
from lathe_scheduler.worker import WorkerState

ACTIONS: dict[str, dict[str, str]] = {
    "small": {"cpu_count": "1"},
    "small too": {"cpu_count": "1"},
    "large": {"cpu_count": "3"},
    "linux": {"OSFamily": "linux", "cpu_count": "1"},
    "fond of pools": {"pool": "fast"},
    "impossible": {"cpu_count": "1000"},
}
UNCACHEABLE = frozenset({"small too", "linux"})
WORKERS = ("u", "v", "w")
MAX_ATTEMPTS = 3
RUNNING = (TaskState.ASSIGNED, TaskState.EXECUTING)


@dataclass
class FakeWorker:
    """What a worker knows: its stream, and what it was given and has not ended."""

    connection_id: int = 0
    leases: set[str] = field(default_factory=set)


class ActionQueueMachine(RuleBasedStateMachine):
    """Clients, checks and workers that do anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue = ActionQueue(
            QueueSettings(max_attempts=MAX_ATTEMPTS, reservation_after_seconds=2.0), "lease", self.now
        )
        self.workers = {name: FakeWorker() for name in WORKERS}
        self.numbers = itertools.count(1)
        self.leases_seen: set[str] = set()
        self.operations: set[str] = set()
        self.forgotten: set[str] = set()
        self.action_of: dict[str, str] = {}

    # ---- plumbing

    def handle(self, event: events.QueueEvent) -> None:
        for effect in self.queue.handle(event, self.now):
            match effect:
                case effects.StartAction():
                    self.started(effect)
                case effects.OperationForgotten():
                    self.forgotten.add(effect.operation_name)
                case effects.CloseConnection():
                    for worker in self.workers.values():
                        if worker.connection_id == effect.connection_id:
                            worker.connection_id = 0

    def started(self, start: effects.StartAction) -> None:
        assert start.lease_id not in self.leases_seen
        self.leases_seen.add(start.lease_id)
        worker = self.workers[start.worker_id]
        assert worker.connection_id == start.connection_id, "only a connected worker is given anything"
        worker.leases.add(start.lease_id)
        if not start.task.lost_on:
            key = start.spec.platform
            waiting = self.queue.platform_queues[key]
            assert all(task.order > start.task.order for task in waiting if not task.lost_on)

    def connected(self) -> list[str]:
        return [name for name, worker in self.workers.items() if worker.connection_id]

    def open_operations(self) -> list[str]:
        return sorted(
            name for name in self.operations if (found := self.queue.operation(name)) is not None and not found.is_done
        )

    def checks(self) -> list[Task]:
        return [task for task in self.queue.tasks.values() if task.state is TaskState.CHECKING]

    # ---- clients

    @rule(action=st.sampled_from(sorted(ACTIONS)), skip=st.booleans(), priority=st.integers(-2, 2))
    def execute(self, action: str, skip: bool, priority: int) -> None:
        name = f"operations/{next(self.numbers)}"
        self.operations.add(name)
        self.action_of[name] = action
        self.handle(events.ExecuteRequested(name, action_key(action), skip, priority))

    @precondition(lambda self: self.checks())
    @rule(data=st.data(), how=st.sampled_from(["pass", "pass", "pass", "cached"]))
    def end_check(self, data: st.DataObject, how: str) -> None:
        self.pass_check(data.draw(st.sampled_from(self.checks())), how)

    def pass_check(self, task: Task, how: str = "pass") -> None:
        action = self.action_of[next(iter(task.operations))]
        if how == "pass":
            passed = spec(do_not_cache=action in UNCACHEABLE, **ACTIONS[action])
            self.handle(events.CheckPassed(task.id, passed))
        else:
            self.handle(events.CheckEnded(task.id, Outcome(OutcomeKind.CACHED, b"hit")))

    @precondition(lambda self: self.open_operations())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.handle(events.OperationCancelled(data.draw(st.sampled_from(self.open_operations()))))

    @precondition(lambda self: self.open_operations())
    @rule(data=st.data(), is_cancelled=st.booleans())
    def stop_listening(self, data: st.DataObject, is_cancelled: bool) -> None:
        name = data.draw(st.sampled_from(self.open_operations()))
        operation = self.queue.operation(name)
        if operation is not None and operation.listeners:
            self.handle(events.ListenerRemoved(name, is_cancelled))

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def listen(self, data: st.DataObject) -> None:
        self.handle(events.ListenerAdded(data.draw(st.sampled_from(sorted(self.operations)))))

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.handle(events.OperationDeleted(data.draw(st.sampled_from(sorted(self.operations)))))

    # ---- workers

    @initialize()
    def first_worker(self) -> None:
        self.connect_worker("u", 2, 4, {"OSFamily": "linux"}, 1.0)

    @rule(
        name=st.sampled_from(WORKERS),
        slots=st.integers(1, 4),
        cpus=st.integers(0, 4),
        extra=st.sampled_from([{}, {"OSFamily": "linux"}, {"pool": "fast"}]),
        kept=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def connect_worker(self, name: str, slots: int, cpus: int, extra: dict[str, str], kept: float) -> None:
        worker = self.workers[name]
        worker.connection_id = next(self.numbers)
        worker.leases = set(sorted(worker.leases)[: round(kept * len(worker.leases))])
        offer = PROPERTIES.offer([("cpu_count", str(cpus)), *extra.items()])
        held = [events.HeldLease(lease, action_key("held")) for lease in sorted(worker.leases)]
        self.handle(events.WorkerConnected(name, worker.connection_id, offer, slots, held))

    @precondition(lambda self: self.connected())
    @rule(data=st.data())
    def disconnect_worker(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.connected()))
        worker = self.workers[name]
        connection_id, worker.connection_id = worker.connection_id, 0
        self.handle(events.WorkerDisconnected(name, connection_id))

    @precondition(lambda self: self.connected())
    @rule(data=st.data())
    def drain_worker(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.connected()))
        self.handle(events.WorkerDraining(name, self.workers[name].connection_id))

    @precondition(lambda self: self.connected())
    @rule(data=st.data(), forgets=st.booleans())
    def heartbeat(self, data: st.DataObject, forgets: bool) -> None:
        name = data.draw(st.sampled_from(self.connected()))
        worker = self.workers[name]
        if forgets and worker.leases:
            worker.leases.discard(data.draw(st.sampled_from(sorted(worker.leases))))
        self.handle(events.WorkerHeartbeat(name, worker.connection_id, sorted(worker.leases)))

    @precondition(lambda self: any(self.workers[name].leases for name in self.connected()))
    @rule(data=st.data(), how=st.sampled_from(["start", "finish", "finish", "fault"]))
    def work(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from([name for name in self.connected() if self.workers[name].leases]))
        worker = self.workers[name]
        lease = data.draw(st.sampled_from(sorted(worker.leases)))
        if how == "start":
            self.handle(events.ActionStarted(name, worker.connection_id, lease))
        else:
            worker.leases.discard(lease)
            self.handle(events.ActionFinished(name, worker.connection_id, lease, b"result", how == "fault"))

    @rule(seconds=st.floats(0.01, 20.0))
    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while (deadline := self.queue.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.handle(events.TimePassed())
        self.now = end

    @rule(seconds=st.floats(0.01, 100.0))
    def stand_still(self, seconds: float) -> None:
        self.now += seconds
        connected = self.connected()
        self.handle(events.StoodStill())
        self.handle(events.TimePassed())
        assert self.connected() == connected, "nobody is lost by that"

    # ---- what always holds

    @invariant()
    def each_task_is_where_its_state_says(self) -> None:
        states = Counter(task.state for task in self.queue.tasks.values())
        queued = [task for waiting in self.queue.platform_queues.values() for task in waiting]
        assert len(queued) == len({task.id for task in queued}) == states[TaskState.QUEUED] == self.queue.queued_count
        assert all(task.state is TaskState.QUEUED for task in queued)
        assert sum(map(len, self.queue.platform_queues.values())) == len(queued)
        assert sum(states[state] for state in RUNNING) == self.queue.executing_count
        for task in self.queue.tasks.values():
            assert (task.lease is not None) == (task.state in RUNNING)
            assert (task.spec is None) == (task.state is TaskState.CHECKING)
            assert len(task.lost_on) < MAX_ATTEMPTS
            assert task.unstarted_losses <= MAX_UNSTARTED_LOSSES

    @invariant()
    def each_task_is_leased_once_at_most(self) -> None:
        leased = Counter(
            lease.task.id
            for worker in self.queue.workers.values()
            for lease in worker.leases.values()
            if lease.task is not None
        )
        assert all(count == 1 for count in leased.values())
        assert leased.keys() == {task.id for task in self.queue.tasks.values() if task.state in RUNNING}

    @invariant()
    def workers_never_have_more_than_they_can(self) -> None:
        for worker in self.queue.workers.values():
            assert worker.free_slots == worker.slots - len(worker.leases)
            taken: Counter[str] = Counter()
            for lease in worker.leases.values():
                taken.update(dict(lease.platform.minimums))
            for name, amount in worker.free.items():
                assert amount == worker.offer.amounts.get(name, 0) - taken[name]
            if worker.state is WorkerState.GONE:
                assert not worker.leases

    @invariant()
    def operations_and_tasks_agree(self) -> None:
        for operation in self.queue.operations():
            assert operation.is_done == (operation.task is None)
            if operation.task is not None:
                assert operation.task.operations[operation.name] is operation
                assert operation.task.id in self.queue.tasks
        for task in self.queue.tasks.values():
            assert task.operations, "somebody wants it"
            if task.spec is not None and task.spec.do_not_cache:
                assert len(task.operations) == 1
        shared = Counter(
            task.key for task in self.queue.tasks.values() if task.spec is not None and not task.spec.do_not_cache
        )
        assert all(count == 1 for count in shared.values())

    @invariant()
    def nobody_waits_who_could_run(self) -> None:
        for waiting in self.queue.platform_queues.values():
            for task in waiting:
                assert waiting.ready_worker_for(task) is None
            if waiting.reserved is not None:
                assert waiting.reserved.reserved_for is waiting
                assert len(waiting) > 0
            able = {name for name, worker in self.queue.workers.items() if worker.offer.serves(waiting.key)}
            assert waiting.workers.keys() == able
            assert (waiting.unserved_since is None) == bool(able)
        for worker in self.queue.workers.values():
            kept_for = worker.reserved_for
            assert kept_for is None or kept_for.reserved is worker
            ready = {key for key, waiting in worker.queues.items() if self.is_ready(worker.id, waiting)}
            fitting = {
                key
                for key, waiting in worker.queues.items()
                if worker.accepts and worker.fits(key) and kept_for in (None, waiting)
            }
            assert ready == fitting

    @staticmethod
    def is_ready(worker_id: str, waiting: object) -> bool:
        tiers = waiting._ready  # type: ignore[attr-defined]  # what the queue would choose from
        return sum(worker_id in tier for tier in tiers) == 1

    @override
    def teardown(self) -> None:
        """Whatever happened: with workers that serve, everything ends."""
        for task in self.checks():
            self.pass_check(task)
        self.workers["u"].leases.clear()
        self.connect_worker("u", 100, 1000, {"OSFamily": "linux"}, 0.0)
        for _ in range(1000):
            for name in self.connected():
                worker = self.workers[name]
                for lease in sorted(worker.leases):
                    worker.leases.discard(lease)
                    self.handle(events.ActionFinished(name, worker.connection_id, lease, b"result"))
                self.handle(events.WorkerHeartbeat(name, worker.connection_id, sorted(worker.leases)))
            if not self.queue.tasks:
                break
            self.wait(1.0)
        assert not self.queue.tasks, "nothing is lost"
        for name in self.operations - self.forgotten:
            operation = self.queue.operation(name)
            assert operation is not None
            assert operation.is_done
        self.wait(1000.0)
        assert not list(self.queue.operations())


TestActionQueueMachine = ActionQueueMachine.TestCase
TestActionQueueMachine.settings = settings(max_examples=100, stateful_step_count=50)
