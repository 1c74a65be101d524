"""Workers and the queue: matching, capacity, loss, reconnection, draining."""

import dataclasses

import pytest
from tests.unit.scheduler.queue_driver import PROPERTIES, QueueDriver

from lathe_scheduler import queue_effects as effects
from lathe_scheduler import queue_events as events
from lathe_scheduler.queue_settings import QueueSettings
from lathe_scheduler.task import OutcomeKind, TaskState
from lathe_scheduler.task_transitions import AVOIDANCE_SECONDS, MAX_UNSTARTED_LOSSES
from lathe_scheduler.worker import WorkerState
from lathe_shared.errors import FailedPreconditionError


def test_amounts_are_taken_while_an_action_runs() -> None:
    driver = QueueDriver()
    driver.connect("w", slots=8, cpu_count="2")
    for action in "abc":
        driver.execute(action, cpu_count="1")
    assert [action for action, _ in driver.dispatched()] == ["a", "b"]
    driver.finish(driver.started[0])
    assert [action for action, _ in driver.dispatched()] == ["a", "b", "c"]


def test_slots_bound_what_needs_no_amounts() -> None:
    driver = QueueDriver()
    driver.connect("w", slots=2)
    for action in "abc":
        driver.execute(action)
    assert len(driver.started) == 2


def test_a_burst_is_spread_over_workers() -> None:
    driver = QueueDriver()
    driver.connect("v", slots=4)
    driver.connect("w", slots=4)
    for action in "abcd":
        driver.execute(action)
    assert [worker for _, worker in driver.dispatched()] == ["v", "w", "v", "w"]


def test_workers_that_meet_a_preference_are_taken_first_and_others_still_serve() -> None:
    driver = QueueDriver()
    driver.connect("plain", slots=2)
    driver.connect("fast", pool="fast")
    for action in "abc":
        driver.execute(action, pool="fast")
    assert [worker for _, worker in driver.dispatched()] == ["fast", "plain", "plain"]


def test_exact_values_pick_their_workers() -> None:
    driver = QueueDriver()
    driver.connect("l", OSFamily="linux", slots=5)
    driver.connect("m", OSFamily=["mac", "linux"], slots=5)
    driver.execute("a", OSFamily="mac")
    assert driver.dispatched() == [("a", "m")]


def test_a_queue_that_cannot_move_does_not_block_another() -> None:
    driver = QueueDriver()
    driver.connect("l", OSFamily="linux")
    driver.connect("m", OSFamily="mac")
    for action in "ab":
        driver.execute(action, OSFamily="linux")
    driver.execute("c", OSFamily="mac")
    assert driver.dispatched() == [("a", "l"), ("c", "m")]


def test_small_actions_pass_a_large_one_for_a_while_and_then_a_worker_is_kept_free() -> None:
    driver = QueueDriver()
    driver.connect("w", slots=4, cpu_count="4")
    for number in range(4):
        driver.execute(f"small-{number}", cpu_count="1")
    driver.execute("large", cpu_count="4")
    driver.execute("passing", cpu_count="1")
    driver.advance(1)
    driver.finish(driver.started[0])
    assert driver.dispatched()[-1] == ("passing", "w")
    driver.advance(5)
    driver.heartbeat("w")
    driver.execute("waiting", cpu_count="1")
    for start in driver.started[1:4]:
        driver.finish(start)
        assert driver.dispatched()[-1] == ("passing", "w")
    driver.finish(driver.started[4])
    assert driver.dispatched()[-1] == ("large", "w")
    driver.finish(driver.started[-1])
    assert driver.dispatched()[-1] == ("waiting", "w")


def test_a_large_action_reserves_one_worker_only() -> None:
    driver = QueueDriver()
    for worker in "vw":
        driver.connect(worker, slots=2, cpu_count="2")
    for number in range(4):
        driver.execute(f"small-{number}", cpu_count="1")
    driver.execute("large", cpu_count="2")
    driver.advance(6)
    on_v = [start for start in driver.started if start.worker_id == "v"]
    on_w = [start for start in driver.started if start.worker_id == "w"]
    driver.finish(on_v[0])
    driver.execute("next", cpu_count="1")
    assert len(driver.started) == 4
    driver.finish(on_w[0])
    assert driver.dispatched()[-1] == ("next", "w")
    driver.finish(on_v[1])
    assert driver.dispatched()[-1] == ("large", "v")


@pytest.mark.parametrize("end", ["cancelled", "worker lost"])
def test_a_reservation_ends_with_its_cause(end: str) -> None:
    driver = QueueDriver()
    driver.connect("w", slots=2, cpu_count="2")
    driver.execute("a", cpu_count="1")
    driver.execute("b", cpu_count="1")
    large = driver.execute("large", cpu_count="2")
    driver.advance(6)
    driver.finish(driver.started[0])
    driver.execute("small", cpu_count="1")
    assert driver.dispatched()[-1] == ("b", "w")
    if end == "cancelled":
        driver.handle(events.OperationCancelled(large))
        assert driver.dispatched()[-1] == ("small", "w")
    else:
        driver.disconnect("w")
        assert driver.queue.workers["w"].reserved_for is None


def test_a_lost_worker_s_actions_are_queued_again_in_their_old_place() -> None:
    driver = QueueDriver()
    driver.connect("w")
    first = driver.execute("first")
    driver.execute("second")
    driver.disconnect("w")
    driver.advance(1.9)
    assert driver.operation(first).state is TaskState.ASSIGNED
    driver.advance(0.2)
    assert driver.operation(first).state is TaskState.QUEUED
    driver.connect("v")
    assert driver.dispatched() == [("first", "w"), ("first", "v")]


def test_a_worker_that_reconnects_in_time_keeps_its_actions() -> None:
    driver = QueueDriver()
    driver.connect("w")
    name = driver.execute("a")
    lease = driver.started[0].lease_id
    driver.begin(driver.started[0])
    driver.disconnect("w")
    driver.advance(1)
    driver.connect("w", held=[lease])
    driver.advance(5)
    assert driver.operation(name).state is TaskState.EXECUTING
    assert len(driver.started) == 1
    driver.handle(events.ActionFinished("w", driver.connections["w"], lease, b"x"))
    assert driver.outcome(name).response == b"x"


def test_a_worker_that_reconnects_without_its_lease_lost_it() -> None:
    driver = QueueDriver()
    driver.connect("w")
    driver.execute("a")
    driver.connect("w")
    assert driver.dispatched() == [("a", "w"), ("a", "w")]
    assert driver.started[0].lease_id != driver.started[1].lease_id


def test_a_lease_that_nobody_knows_is_cancelled() -> None:
    driver = QueueDriver()
    produced = driver.connect("w", held=["stranger"])
    assert [effect.lease_id for effect in produced if isinstance(effect, effects.CancelAction)] == ["stranger"]


def test_the_newer_connection_of_a_worker_wins() -> None:
    driver = QueueDriver()
    driver.connect("w")
    old = driver.connections["w"]
    driver.execute("a")
    lease = driver.started[0].lease_id
    produced = driver.connect("w", held=[lease])
    assert any(isinstance(effect, effects.CloseConnection) and effect.connection_id == old for effect in produced)
    driver.handle(events.WorkerDisconnected("w", old))
    assert driver.queue.workers["w"].state is WorkerState.CONNECTED
    driver.handle(events.ActionFinished("w", old, lease, b"stale"))
    assert driver.queue.executing_count == 1


def test_a_silent_worker_is_lost() -> None:
    driver = QueueDriver()
    driver.connect("w")
    driver.execute("a")
    driver.advance(14)
    driver.heartbeat("w")
    driver.advance(14)
    assert driver.worker_state("w") is WorkerState.CONNECTED
    driver.advance(2)
    assert driver.worker_state("w") is WorkerState.GONE
    assert driver.queue.queued_count == 1
    assert any(isinstance(effect, effects.CloseConnection) for effect in driver.effects)


def test_nobody_was_silent_or_stayed_away_while_the_scheduler_stood_still() -> None:
    driver = QueueDriver()
    driver.connect("w")
    driver.execute("a")
    driver.connect("v")
    driver.execute("b")
    driver.disconnect("v")
    # What happens first then is not that deadlines come, which have passed.
    driver.now += 60
    driver.handle(events.StoodStill())
    driver.advance(1.9)
    assert driver.worker_state("w") is WorkerState.CONNECTED
    assert driver.worker_state("v") is WorkerState.DISCONNECTED
    assert driver.queue.queued_count == 0
    driver.advance(13)
    assert driver.worker_state("v") is WorkerState.GONE
    assert driver.worker_state("w") is WorkerState.CONNECTED
    driver.advance(2)
    assert driver.worker_state("w") is WorkerState.GONE


def test_an_action_that_loses_its_workers_is_given_up_by_a_status_that_bazel_does_not_repeat() -> None:
    driver = QueueDriver()
    name = driver.execute("poison")
    for worker in ("u", "v", "w"):
        driver.connect(worker)
        driver.begin(driver.started[-1])
        driver.disconnect(worker)
        driver.advance(3)
    outcome = driver.outcome(name)
    assert outcome.kind is OutcomeKind.WORKERS_LOST
    assert isinstance(outcome.error, FailedPreconditionError)
    assert not outcome.error.details
    assert "3 attempts" in outcome.error.message
    assert "u, v, w" in outcome.error.message
    assert driver.queue.queued_count == driver.queue.executing_count == 0


@pytest.mark.parametrize("loss", ["the message, with its connection", "the worker", "by heartbeats"])
def test_what_was_lost_before_it_began_is_no_attempt(loss: str) -> None:
    driver = QueueDriver(QueueSettings(max_attempts=1))
    driver.connect("w")
    name = driver.execute("a")
    if loss == "by heartbeats":
        for _ in range(3):
            driver.heartbeat("w", [])
    else:
        driver.disconnect("w")
        if loss == "the worker":
            driver.advance(3)
        driver.connect("w")
    assert driver.dispatched() == [("a", "w"), ("a", "w")]
    driver.begin(driver.started[1])
    driver.connect("w")
    assert driver.outcome_kind(name) is OutcomeKind.WORKERS_LOST


def test_an_action_that_takes_workers_down_before_it_begins_is_given_up_too() -> None:
    driver = QueueDriver(QueueSettings(max_attempts=2))
    driver.connect("w")
    name = driver.execute("too large")
    for _ in range(20):
        driver.connect("w")
    assert driver.outcome_kind(name) is OutcomeKind.WORKERS_LOST
    assert len(driver.started) == MAX_UNSTARTED_LOSSES + 2
    assert driver.queue.queued_count == driver.queue.executing_count == 0


def test_a_worker_s_fault_sends_the_action_elsewhere() -> None:
    driver = QueueDriver()
    driver.connect("bad", slots=2)
    driver.connect("good", slots=2)
    name = driver.execute("a")
    assert driver.started[0].worker_id == "bad"
    driver.finish(driver.started[0], b"fault", fault=True)
    assert driver.dispatched() == [("a", "bad"), ("a", "good")]
    driver.finish(driver.started[1], b"fine")
    assert driver.outcome(name).response == b"fine"


def test_an_action_waits_for_another_worker_than_the_one_at_fault() -> None:
    driver = QueueDriver()
    driver.connect("bad")
    driver.execute("a")
    driver.connect("good")
    driver.execute("blocker")
    driver.execute("next")
    driver.finish(driver.started[0], fault=True)
    assert driver.dispatched()[-1] == ("next", "bad")
    blocker = next(start for start in driver.started if start.worker_id == "good")
    driver.finish(blocker)
    assert driver.dispatched()[-1] == ("a", "good")


def lost_beside_a_busy_worker() -> QueueDriver:
    """Have action ``a`` lost on worker ``bad``, while ``good`` is busy with ``blocker``."""
    driver = QueueDriver()
    driver.connect("bad")
    driver.execute("a")
    driver.connect("good")
    driver.execute("blocker")
    driver.finish(driver.started[0], fault=True)
    return driver


def test_an_action_does_not_wait_for_a_busy_worker_for_ever() -> None:
    driver = lost_beside_a_busy_worker()
    for lost_count in (1, 2):
        driver.begin(driver.started[-1])
        given = len(driver.started)
        for _ in range(6 * lost_count):
            assert len(driver.started) == given
            driver.advance(AVOIDANCE_SECONDS / 6)
            driver.heartbeat("bad")
            driver.heartbeat("good")
        assert driver.dispatched()[given:] == [("a", "bad")]
        driver.finish(driver.started[-1], fault=True)
    assert driver.queue.queued_count == 0


def test_what_waited_for_another_worker_long_enough_does_so_no_more_when_it_is_given_back() -> None:
    driver = QueueDriver()
    driver.connect("bad")
    driver.execute("a")
    driver.connect("good", slots=2)
    driver.execute("blocker")
    driver.finish(driver.started[0], fault=True)
    assert driver.dispatched()[-1] == ("a", "good")
    for _ in range(6):
        driver.advance(AVOIDANCE_SECONDS / 6)
        driver.heartbeat("bad")
        driver.heartbeat("good")
    # It never began, so this is no attempt, and nothing new to wait for.
    for _ in range(3):
        driver.heartbeat("good", [driver.started[1].lease_id])
    assert driver.dispatched()[-1] == ("a", "bad")


def test_without_another_worker_the_one_at_fault_tries_again() -> None:
    driver = QueueDriver()
    driver.connect("only")
    name = driver.execute("a")
    driver.finish(driver.started[0], b"1", fault=True)
    driver.finish(driver.started[1], b"2", fault=True)
    driver.finish(driver.started[2], b"what the worker says", fault=True)
    assert len(driver.started) == 3
    assert driver.outcome(name).kind is OutcomeKind.WORKERS_LOST
    assert driver.outcome(name).response == b"what the worker says"


def test_the_one_at_fault_tries_again_when_the_other_worker_goes() -> None:
    driver = lost_beside_a_busy_worker()
    assert len(driver.started) == 2
    driver.handle(events.WorkerDraining("good", driver.connections["good"]))
    assert driver.dispatched()[-1] == ("a", "bad")


def test_a_draining_worker_finishes_and_takes_nothing_new() -> None:
    driver = QueueDriver()
    driver.connect("w", slots=2)
    name = driver.execute("a")
    driver.handle(events.WorkerDraining("w", driver.connections["w"]))
    driver.execute("b")
    assert driver.dispatched() == [("a", "w")]
    driver.finish(driver.started[0], b"x")
    assert driver.outcome(name).response == b"x"
    assert driver.dispatched() == [("a", "w")]


@pytest.mark.parametrize("is_done", [True, False])
def test_a_worker_that_drained_and_left_is_not_lost_unless_it_left_work_behind(is_done: bool) -> None:
    driver = QueueDriver()
    driver.connect("w")
    driver.execute("a")
    driver.handle(events.WorkerDraining("w", driver.connections["w"]))
    if is_done:
        driver.finish(driver.started[0])
    driver.disconnect("w")
    driver.advance(QueueSettings().worker_reconnect_grace_seconds)
    assert driver.worker_state("w") is WorkerState.GONE
    assert bool(driver.of(effects.WorkerLost)) is not is_done


def test_an_assignment_that_crossed_with_draining_is_no_attempt() -> None:
    driver = QueueDriver(QueueSettings(max_attempts=1))
    driver.connect("w")
    name = driver.execute("a")
    driver.handle(events.WorkerDraining("w", driver.connections["w"]))
    driver.finish(driver.started[0], fault=True)
    assert driver.operation(name).state is TaskState.QUEUED
    driver.connect("v")
    assert driver.dispatched()[-1] == ("a", "v")


def test_a_lease_that_heartbeats_never_mention_was_dropped() -> None:
    driver = QueueDriver()
    driver.connect("w")
    driver.execute("a")
    driver.heartbeat("w", [])
    driver.heartbeat("w", [])
    assert len(driver.started) == 1
    driver.heartbeat("w", [])
    assert len(driver.started) == 2


def test_a_heartbeat_with_a_cancelled_lease_cancels_it_again() -> None:
    driver = QueueDriver()
    driver.connect("w")
    name = driver.execute("a")
    driver.handle(events.OperationCancelled(name))
    produced = driver.heartbeat("w")
    assert [type(effect) for effect in produced] == [effects.CancelAction]


def test_an_unknown_lease_s_end_is_ignored_and_logged() -> None:
    driver = QueueDriver()
    driver.connect("w")
    produced = driver.handle(events.ActionFinished("w", driver.connections["w"], "nonsense", b""))
    assert produced == [effects.FinishIgnored("w", "nonsense")]


def test_no_worker_at_all_is_said_within_seconds() -> None:
    driver = QueueDriver()
    driver.advance(10)
    name = driver.execute("a", cpu_count="1")
    driver.advance(4.9)
    assert not driver.operation(name).is_done
    driver.advance(0.2)
    assert driver.outcome_kind(name) is OutcomeKind.UNMATCHED
    assert "none is connected" in str(driver.outcome(name).error)


def test_after_a_start_actions_give_workers_time_to_connect() -> None:
    driver = QueueDriver()
    name = driver.execute("a", cpu_count="1")
    driver.advance(9.9)
    assert not driver.operation(name).is_done
    driver.advance(0.2)
    assert driver.outcome_kind(name) is OutcomeKind.UNMATCHED


def test_an_action_that_no_worker_can_run_names_the_property() -> None:
    driver = QueueDriver()
    driver.connect("v", cpu_count="4", OSFamily="linux")
    driver.connect("w", cpu_count="16", OSFamily="linux")
    large = driver.execute("large", cpu_count="64")
    foreign = driver.execute("foreign", OSFamily="plan9")
    absent = driver.execute("absent", memory_gb="1")
    fitting = driver.execute("fitting", cpu_count="16")
    driver.advance(5.1)
    assert "cpu_count=64, and workers offer cpu_count=4, 16" in str(driver.outcome(large).error)
    assert "OSFamily=plan9, and workers offer OSFamily=linux" in str(driver.outcome(foreign).error)
    assert "memory_gb=1, and no worker has that property" in str(driver.outcome(absent).error)
    assert driver.operation(fitting).state is TaskState.ASSIGNED


def test_wishes_that_only_different_workers_meet_are_unmatched() -> None:
    driver = QueueDriver()
    driver.connect("v", cpu_count="4", OSFamily="linux")
    driver.connect("w", cpu_count="1", OSFamily="mac")
    name = driver.execute("a", cpu_count="4", OSFamily="mac")
    driver.advance(5.1)
    assert "no worker satisfies all" in str(driver.outcome(name).error)


def test_a_configured_platform_is_waited_for() -> None:
    platform = PROPERTIES.offer([("cpu_count", "64")])
    driver = QueueDriver(QueueSettings(configured_platforms=[platform]))
    name = driver.execute("a", cpu_count="64")
    driver.advance(1000)
    assert not driver.operation(name).is_done
    driver.connect("big", cpu_count="64")
    assert driver.dispatched() == [("a", "big")]


def test_a_worker_that_restarts_is_waited_for() -> None:
    driver = QueueDriver(dataclasses.replace(QueueSettings(), worker_memory_seconds=60.0))
    driver.connect("w", cpu_count="1")
    driver.disconnect("w")
    driver.advance(10)
    patient = driver.execute("a", cpu_count="1")
    driver.advance(40)
    assert not driver.operation(patient).is_done
    driver.connect("w2", cpu_count="1")
    assert driver.dispatched() == [("a", "w2")]


def test_a_worker_that_never_comes_back_is_waited_for_no_longer_than_it_is_remembered() -> None:
    driver = QueueDriver(dataclasses.replace(QueueSettings(), worker_memory_seconds=60.0))
    driver.connect("w", cpu_count="1")
    driver.disconnect("w")
    driver.advance(10)
    name = driver.execute("a", cpu_count="1")
    driver.advance(56)
    assert not driver.operation(name).is_done
    driver.advance(2)
    assert driver.outcome_kind(name) is OutcomeKind.UNMATCHED


def test_a_worker_that_comes_back_with_less_is_not_given_more_than_it_has() -> None:
    driver = QueueDriver()
    driver.connect("w", slots=4, cpu_count="4")
    for action in "abcd":
        driver.execute(action, cpu_count="1")
    driver.execute("e", cpu_count="1")
    leases = [start.lease_id for start in driver.started]
    driver.connect("w", slots=2, cpu_count="2", held=leases)
    connection = driver.connections["w"]
    for lease in leases[:2]:
        driver.handle(events.ActionFinished("w", connection, lease, b""))
        assert len(driver.started) == 4
    driver.handle(events.ActionFinished("w", connection, leases[2], b""))
    assert driver.dispatched()[-1] == ("e", "w")


def test_keys_that_nobody_waits_for_are_dropped_when_there_are_many() -> None:
    driver = QueueDriver()
    driver.connect("w", cpu_count="100000")
    for number in range(1, 600):
        driver.execute(f"a{number}", cpu_count=str(number))
        driver.finish(driver.started[-1])
    assert len(driver.queue.platform_queues) <= 256
    assert len(driver.queue.workers["w"].queues) == len(driver.queue.platform_queues)
