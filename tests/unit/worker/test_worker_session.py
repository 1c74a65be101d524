"""The worker's conversation with its scheduler, as a state machine."""

from __future__ import annotations

import datetime
from typing import Any

import betterproto
import pytest

from lathe_protos import reapi, rpc, worker_v1
from lathe_shared.digest import Digest
from lathe_shared.errors import InvalidArgumentError
from lathe_worker.session_effects import Accepted, KillAction, RunAction, TurnedAway
from lathe_worker.worker_session import SessionState, WorkerDescription, WorkerSession

DIGEST = Digest.of(b"action")
WHEN = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
INTERVAL, LOST_AFTER = 5.0, 15.0


def said(session: WorkerSession) -> list[tuple[str, Any]]:
    """Return what the session wants to send, as field names and messages."""
    return [
        betterproto.which_one_of(worker_v1.WorkerMessage().parse(data), "message") for data in session.take_outgoing()
    ]


def names(session: WorkerSession) -> list[str]:
    return [name for name, _ in said(session)]


def message(**fields: Any) -> bytes:
    return bytes(worker_v1.SchedulerMessage(**fields))


def start(lease_id: str) -> bytes:
    return message(
        start_action=worker_v1.StartAction(
            lease_id=lease_id,
            instance_name="main",
            digest_function=reapi.DigestFunctionValue(1),
            action_digest=DIGEST.to_message(),
        )
    )


REGISTERED = message(
    registered=worker_v1.Registered(
        heartbeat_interval=datetime.timedelta(seconds=INTERVAL), lost_after=datetime.timedelta(seconds=LOST_AFTER)
    )
)
ACK = message(heartbeat_ack=worker_v1.HeartbeatAck())


def cancel(lease_id: str) -> bytes:
    return message(cancel_action=worker_v1.CancelAction(lease_id=lease_id, reason="nobody wants it"))


@pytest.fixture
def session() -> WorkerSession:
    return WorkerSession(WorkerDescription("w1", {"cpu_count": ["4"], "OS": ["linux", "debian"]}, 2, "1.2"))


@pytest.fixture
def registered(session: WorkerSession) -> WorkerSession:
    session.connected()
    session.received(REGISTERED, 100.0)
    session.take_outgoing()
    return session


def reconnect(session: WorkerSession, now: float) -> list[tuple[str, Any]]:
    """Lose the connection, make a new one, and return all that is said on it up to the end of registering."""
    session.disconnected()
    session.connected()
    first = said(session)
    session.received(REGISTERED, now)
    return first + said(session)


def test_it_registers_first(session: WorkerSession) -> None:
    session.connected()

    [(name, register)] = said(session)
    assert name == "register"
    assert (register.worker_id, register.protocol_version, register.slots, register.version) == ("w1", 1, 2, "1.2")
    assert [(p.name, p.value) for p in register.properties] == [("cpu_count", "4"), ("OS", "linux"), ("OS", "debian")]
    assert session.received(REGISTERED, 0.0) == [Accepted()]
    assert session.state is SessionState.REGISTERED


def test_a_refusal_is_passed_on(session: WorkerSession) -> None:
    session.connected()

    assert session.received(message(refused=worker_v1.Refused(reason="no")), 0.0) == [TurnedAway("no")]


def test_an_action_runs_and_its_end_is_reported(registered: WorkerSession) -> None:
    [effect] = registered.received(start("l1"), 101.0)
    assert isinstance(effect, RunAction)
    assert registered.running == ["l1"]
    registered.action_started("l1", WHEN)
    registered.action_finished("l1", b"response", worker_fault=False, now=102.0)

    (first, started), (second, finished) = said(registered)
    assert (first, started.lease_id, started.execution_start) == ("action_started", "l1", WHEN)
    assert (second, finished.execute_response, finished.worker_fault) == ("action_finished", b"response", False)
    assert registered.running == []


def test_the_same_lease_runs_once(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)

    assert registered.received(start("l1"), 101.0) == []


def test_more_than_the_slots_is_given_back(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)
    registered.received(start("l2"), 101.0)

    assert registered.received(start("l3"), 101.0) == []
    [(_, finished)] = said(registered)
    assert (finished.lease_id, finished.worker_fault) == ("l3", True)
    response = reapi.ExecuteResponse().parse(finished.execute_response)
    assert response.status == rpc.Status(code=14, message="all slots are taken")


def test_heartbeats_name_what_runs(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)
    registered.received(start("l2"), 101.0)
    registered.action_finished("l2", b"", worker_fault=False, now=102.0)
    registered.take_outgoing()
    assert registered.next_due() == 100.0 + INTERVAL
    registered.tick(104.9)
    assert said(registered) == []
    registered.tick(105.0)

    [(name, heartbeat)] = said(registered)
    assert (name, heartbeat.lease_ids) == ("heartbeat", ["l1"])
    assert registered.next_due() == 110.0


def test_silence_is_noticed(registered: WorkerSession) -> None:
    registered.tick(105.0)
    registered.tick(110.0)
    assert not registered.is_silent(114.9)
    assert registered.next_due() == 115.0
    assert registered.is_silent(115.0)
    registered.received(ACK, 114.0)
    assert not registered.is_silent(115.0)


def test_cancel_kills_what_runs_and_nothing_else(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)

    assert registered.received(cancel("l1"), 102.0) == [KillAction("l1", "nobody wants it")]
    assert registered.received(cancel("unknown"), 102.0) == []


def test_cancel_of_what_has_ended_is_answered_with_its_result(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)
    registered.action_finished("l1", b"r", worker_fault=False, now=102.0)
    registered.take_outgoing()

    assert registered.received(cancel("l1"), 102.0) == []
    assert names(registered) == ["action_finished"]


def test_actions_outlive_their_connection(registered: WorkerSession) -> None:
    registered.received(start("running"), 101.0)
    registered.action_started("running", WHEN)
    registered.received(start("ended"), 101.0)
    registered.take_outgoing()
    registered.disconnected()
    registered.action_finished("ended", b"r", worker_fault=False, now=102.0)
    assert registered.take_outgoing() == []
    registered.connected()
    ((_, register),) = said(registered)
    registered.received(REGISTERED, 103.0)

    assert [(held.lease_id, held.instance_name, held.action_digest.hash) for held in register.held] == [
        ("running", "main", DIGEST.hash),
        ("ended", "main", DIGEST.hash),
    ]
    assert [(name, m.lease_id) for name, m in said(registered)] == [
        ("action_started", "running"),
        ("action_finished", "ended"),
    ]


def test_a_result_is_sent_again_until_a_later_heartbeat_was_acknowledged(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)
    registered.tick(105.0)
    registered.action_finished("l1", b"r", worker_fault=False, now=105.1)
    registered.received(ACK, 105.2)  # answers the heartbeat from before the result
    assert "action_finished" in [name for name, _ in reconnect(registered, 106.0)]
    registered.tick(111.0)
    registered.received(ACK, 111.1)

    assert registered.undelivered == 0
    assert [name for name, _ in reconnect(registered, 112.0)] == ["register"]


def test_draining_takes_nothing_new_and_leaves_when_all_is_delivered(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)
    registered.drain(102.0)
    assert names(registered) == ["draining"]
    registered.received(start("crossed"), 102.1)
    [(_, crossed)] = said(registered)
    assert (crossed.lease_id, crossed.worker_fault) == ("crossed", True)
    assert not registered.is_drained
    registered.action_finished("l1", b"r", worker_fault=False, now=103.0)
    assert names(registered) == ["action_finished", "heartbeat"]
    assert not registered.is_drained
    registered.received(ACK, 103.1)

    assert registered.is_drained


def test_an_idle_worker_is_drained_at_once(registered: WorkerSession) -> None:
    registered.drain(101.0)

    assert registered.is_drained


def test_draining_is_said_again_on_a_new_connection(registered: WorkerSession) -> None:
    registered.received(start("l1"), 101.0)
    registered.drain(102.0)

    assert [name for name, _ in reconnect(registered, 103.0)] == ["register", "draining"]


def test_unknown_messages_are_ignored_and_malformed_ones_refused(registered: WorkerSession) -> None:
    assert registered.received(b"\xaa\x06\x01x", 101.0) == []
    assert registered.received(b"", 101.0) == []
    with pytest.raises(InvalidArgumentError):
        registered.received(b"\x0a\xff", 101.0)
