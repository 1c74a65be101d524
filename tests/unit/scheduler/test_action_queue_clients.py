"""Clients and the queue: merging, stages, listeners, cancellation, retention."""

import dataclasses

import pytest
from tests.unit.scheduler.queue_driver import PROPERTIES, QueueDriver

from lathe_scheduler import queue_effects as effects
from lathe_scheduler import queue_events as events
from lathe_scheduler.queue_settings import QueueSettings
from lathe_scheduler.task import Outcome, OutcomeKind, TaskState
from lathe_shared.errors import ExecutionCancelledError


def test_an_action_goes_through_all_states() -> None:
    driver = QueueDriver()
    name = driver.request("a")
    assert driver.operation(name).state is TaskState.CHECKING
    driver.pass_check(name)
    assert driver.operation(name).state is TaskState.QUEUED
    driver.connect("w")
    assert driver.operation(name).state is TaskState.ASSIGNED
    driver.begin(driver.started[0])
    assert driver.operation(name).state is TaskState.EXECUTING
    driver.finish(driver.started[0], b"\x22\x00")
    assert driver.operation(name).state is TaskState.COMPLETED
    assert driver.outcome(name) == Outcome(OutcomeKind.FINISHED, b"\x22\x00")
    assert driver.queue.executing_count == driver.queue.queued_count == 0
    assert not driver.queue.tasks


def test_two_requests_under_check_share_it_and_the_execution() -> None:
    driver = QueueDriver()
    first, second = driver.request("a"), driver.request("a")
    assert len(driver.of(effects.CheckAction)) == 1
    driver.pass_check(first)
    driver.connect("w", slots=2)
    assert driver.dispatched() == [("a", "w")]
    assert len(driver.of(effects.ExecutionMerged)) == 1
    driver.finish(driver.started[0], b"x")
    assert driver.outcome(first) is driver.outcome(second)


@pytest.mark.parametrize("state", [TaskState.QUEUED, TaskState.ASSIGNED, TaskState.EXECUTING])
def test_a_request_joins_an_execution_under_way_without_a_check(state: TaskState) -> None:
    driver = QueueDriver()
    first = driver.execute("a")
    if state is not TaskState.QUEUED:
        driver.connect("w", slots=2)
    if state is TaskState.EXECUTING:
        driver.begin(driver.started[0])
    second = driver.request("a")
    assert driver.operation(second).state is state
    assert len(driver.of(effects.CheckAction)) == 1
    assert first != second
    assert len(driver.queue.tasks) == 1


def test_a_request_that_skips_the_cache_joins_an_execution_but_no_cache_check() -> None:
    driver = QueueDriver()
    first = driver.request("a")
    second = driver.request("a", skip_cache=True)
    assert len(driver.of(effects.CheckAction)) == 2
    driver.pass_check(second)
    # The look-up of the first found nothing: both want the same execution now.
    driver.pass_check(first)
    assert driver.queue.queued_count == 1
    assert len(driver.of(effects.ExecutionMerged)) == 1
    third = driver.request("a", skip_cache=True)
    driver.connect("w", slots=3)
    assert driver.dispatched() == [("a", "w")]
    driver.finish(driver.started[0], b"x")
    assert all(driver.operation(name).is_done for name in (first, second, third))


def test_actions_that_must_not_be_cached_are_never_merged() -> None:
    driver = QueueDriver()
    first, second, third = (driver.request("a") for _ in range(3))
    driver.pass_check(first, do_not_cache=True)
    later = driver.execute("a", do_not_cache=True)
    driver.connect("w", slots=10)
    assert driver.dispatched() == [("a", "w")] * 4
    driver.finish(driver.started[0], b"0")
    done = [driver.operation(name).is_done for name in (first, second, third, later)]
    assert done.count(True) == 1
    assert not driver.of(effects.ExecutionMerged)


def test_the_same_digest_in_another_instance_is_another_action() -> None:
    driver = QueueDriver()
    name = driver.execute("a")
    key = driver.operation(name).key._replace(instance_name="other")
    driver.handle(events.ExecuteRequested("other/operations/1", key))
    assert len(driver.of(effects.CheckAction)) == 2


def test_a_new_request_after_the_end_is_checked_again() -> None:
    driver = QueueDriver()
    driver.execute("a")
    driver.connect("w")
    driver.finish(driver.started[0])
    driver.request("a")
    assert len(driver.of(effects.CheckAction)) == 2


def test_a_check_that_answers_ends_all_who_asked() -> None:
    driver = QueueDriver()
    first, second = driver.request("a"), driver.request("a")
    driver.handle(events.CheckEnded(driver.task_id(first), Outcome(OutcomeKind.CACHED, b"hit")))
    assert driver.outcome(first).response == driver.outcome(second).response == b"hit"
    assert not driver.queue.tasks


def test_late_ends_of_checks_are_ignored() -> None:
    driver = QueueDriver()
    name = driver.request("a")
    task_id = driver.task_id(name)
    driver.handle(events.OperationCancelled(name))
    assert effects.AbandonCheck(task_id) in driver.effects
    driver.handle(events.CheckEnded(task_id, Outcome(OutcomeKind.CACHED, b"hit")))
    assert driver.outcome_kind(name) is OutcomeKind.CANCELLED


def test_urgent_actions_go_first_and_equal_ones_in_order() -> None:
    driver = QueueDriver()
    for action, priority in (("first", 0), ("second", 0), ("late", 10), ("urgent", -10)):
        driver.execute(action, priority=priority)
    driver.connect("w")
    for _ in range(3):
        driver.finish(driver.started[-1])
    assert [action for action, _ in driver.dispatched()] == ["urgent", "first", "second", "late"]


def test_waiting_makes_up_for_priority() -> None:
    driver = QueueDriver(QueueSettings(priority_ageing_seconds=10.0))
    driver.connect("w")
    driver.execute("running")
    driver.execute("patient", priority=1)
    driver.advance(10.5)
    driver.heartbeat("w")
    driver.execute("newcomer", priority=0)
    driver.finish(driver.started[0])
    assert driver.dispatched()[-1] == ("patient", "w")


def test_joining_raises_the_priority_of_what_waits_and_never_lowers_it() -> None:
    driver = QueueDriver()
    driver.execute("other")
    driver.execute("joined", priority=5)
    driver.execute("joined", priority=-5)
    driver.execute("joined", priority=5)
    driver.connect("w")
    assert driver.dispatched() == [("joined", "w")]
    driver.finish(driver.started[0])
    assert driver.dispatched() == [("joined", "w"), ("other", "w")]
    assert driver.queue.queued_count == 0


def test_where_priorities_do_not_count_joining_leaves_the_task_in_the_queue_once() -> None:
    driver = QueueDriver(QueueSettings(priority_ageing_seconds=0.0))
    first = driver.execute("impossible", priority=5, cpu_count="1000")
    second = driver.request("impossible", priority=1)

    [queue] = driver.queue.platform_queues.values()
    assert len(list(queue)) == len(queue) == 1
    driver.advance(60.0)

    assert driver.outcome_kind(first) is driver.outcome_kind(second) is OutcomeKind.UNMATCHED


def test_joining_a_check_raises_the_priority() -> None:
    driver = QueueDriver()
    driver.execute("other")
    name = driver.request("joined", priority=5)
    driver.request("joined", priority=-5)
    driver.pass_check(name)
    driver.connect("w")
    assert driver.dispatched() == [("joined", "w")]


def test_cancelling_the_only_operation_ends_the_action_at_once() -> None:
    driver = QueueDriver()
    name = driver.execute("a")
    driver.connect("w")
    driver.begin(driver.started[0])
    produced = driver.handle(events.OperationCancelled(name))
    cancels = [effect for effect in produced if isinstance(effect, effects.CancelAction)]
    assert [cancel.lease_id for cancel in cancels] == [driver.started[0].lease_id]
    assert isinstance(driver.outcome(name).error, ExecutionCancelledError)
    # The slot is taken until the worker says that the processes are gone.
    driver.execute("b")
    assert driver.dispatched() == [("a", "w")]
    driver.finish(driver.started[0])
    assert driver.dispatched() == [("a", "w"), ("b", "w")]


def test_cancelling_one_of_two_operations_leaves_the_action_alone() -> None:
    driver = QueueDriver()
    first, second = driver.execute("a"), driver.request("a")
    driver.connect("w")
    driver.handle(events.OperationCancelled(first))
    assert driver.outcome_kind(first) is OutcomeKind.CANCELLED
    assert not driver.of(effects.CancelAction)
    driver.finish(driver.started[0], b"x")
    assert driver.outcome(first).kind is OutcomeKind.CANCELLED
    assert driver.outcome(second).response == b"x"


def test_cancelling_what_waits_takes_it_out_of_the_queue() -> None:
    driver = QueueDriver()
    names = [driver.execute(action) for action in "abc"]
    driver.handle(events.OperationCancelled(names[1]))
    assert driver.queue.queued_count == 2
    driver.connect("w", slots=3)
    assert [action for action, _ in driver.dispatched()] == ["a", "c"]


def test_a_client_that_resets_its_stream_cancels_at_once() -> None:
    driver = QueueDriver()
    name = driver.execute("a")
    driver.handle(events.ListenerRemoved(name, is_cancelled=True))
    assert driver.outcome_kind(name) is OutcomeKind.CANCELLED


def test_a_client_that_lost_its_connection_may_come_back() -> None:
    driver = QueueDriver(QueueSettings(configured_platforms=[PROPERTIES.offer([])]))
    name = driver.execute("a")
    driver.handle(events.ListenerRemoved(name, is_cancelled=False))
    driver.advance(9.9)
    driver.handle(events.ListenerAdded(name))
    driver.advance(100)
    # Lost again: the grace begins anew.
    driver.connect("w")
    driver.handle(events.ListenerRemoved(name, is_cancelled=False))
    driver.advance(9.9)
    assert not driver.operation(name).is_done
    driver.advance(0.2)
    assert driver.outcome_kind(name) is OutcomeKind.CANCELLED
    assert driver.of(effects.CancelAction)


def test_an_operation_lives_while_one_of_its_streams_does() -> None:
    driver = QueueDriver()
    name = driver.execute("a")
    driver.handle(events.ListenerAdded(name))
    driver.handle(events.ListenerRemoved(name, is_cancelled=True))
    driver.connect("w")
    driver.advance(1)
    assert not driver.operation(name).is_done


def test_done_operations_are_kept_for_a_while() -> None:
    driver = QueueDriver()
    name = driver.execute("a")
    driver.connect("w")
    driver.finish(driver.started[0])
    driver.advance(59.9)
    assert driver.operation(name).is_done
    driver.advance(0.2)
    assert driver.queue.operation(name) is None
    assert effects.OperationForgotten(name) in driver.effects


def test_done_operations_are_bounded_in_number() -> None:
    driver = QueueDriver(QueueSettings(max_completed_operations=2))
    driver.connect("w")
    names = []
    for action in "abc":
        names.append(driver.execute(action))
        driver.finish(driver.started[-1])
    assert [driver.queue.operation(name) is None for name in names] == [True, False, False]


def test_only_done_operations_can_be_deleted() -> None:
    driver = QueueDriver()
    name = driver.execute("a")
    driver.handle(events.OperationDeleted(name))
    assert not driver.operation(name).is_done
    driver.connect("w")
    driver.finish(driver.started[0])
    driver.handle(events.OperationDeleted(name))
    assert driver.queue.operation(name) is None
    driver.advance(100)


def test_events_about_unknown_operations_are_ignored() -> None:
    driver = QueueDriver()
    for event in (
        events.ListenerAdded("x"),
        events.ListenerRemoved("x", is_cancelled=True),
        events.OperationCancelled("x"),
        events.OperationDeleted("x"),
        events.CheckEnded(17, Outcome(OutcomeKind.CACHED, b"")),
    ):
        assert driver.handle(event) == []


def test_nothing_is_left_behind_when_all_is_over() -> None:
    driver = QueueDriver(dataclasses.replace(QueueSettings(), worker_memory_seconds=5.0))
    driver.connect("w", slots=2)
    for action in "abcdef":
        driver.execute(action)
    while driver.started:
        start = driver.started.pop(0)
        driver.finish(start)
    driver.disconnect("w")
    driver.advance(1000)
    assert not list(driver.queue.operations())
    assert not driver.queue.workers
    assert not driver.queue.tasks
    assert driver.queue.next_deadline() is None
