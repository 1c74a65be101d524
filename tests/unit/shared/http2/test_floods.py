"""Peers that keep us busy with frames that cost them nothing: each flood ends with ENHANCE_YOUR_CALM, in time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.shared.http2.raw_frames import RESPONSE, Peer, server

from lathe_shared.http2 import frames
from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode
from lathe_shared.http2.floods import Allowance
from lathe_shared.http2.frames import SETTINGS_ACK, frame, rst_stream, window_update
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.settings import settings_frame

BURST = 100


def flooded() -> Peer:
    peer = server(control_frames_burst=BURST, control_frames_per_second=10, resets_burst=BURST, resets_per_second=10)
    peer.open(1)
    return peer


USELESS: dict[str, bytes] = {
    "ping": frame(frames.PING, 0, 0, b"12345678"),
    "ping answers": frame(frames.PING, frames.ACK, 0, b"12345678"),
    "settings": settings_frame({}),
    "settings that touch every stream": settings_frame({4: 65_535}),
    "settings acknowledgements": SETTINGS_ACK,
    "empty data": frame(frames.DATA, 0, 1),
    "data of nothing but padding": frame(frames.DATA, frames.PADDED, 1, b"\x03\0\0\0"),
    "empty data on a closed stream": frame(frames.DATA, 0, 1),
    "window updates of the connection": window_update(0, 1),
    "window updates of a stream": window_update(1, 1),
    "window updates of a closed stream": window_update(1, 1),
    "resets of a closed stream": rst_stream(1, 0),
    "priority": frame(frames.PRIORITY, 0, 1, b"\0" * 5),
    "priority of idle streams": frame(frames.PRIORITY, 0, 999, b"\0" * 5),
    "goaway": frame(frames.GOAWAY, 0, 0, b"\0" * 8),
    "unknown frames": frame(0xEE),
}


@pytest.mark.parametrize("name", USELESS)
def test_frames_without_use_are_borne_for_a_while_and_then_end_the_connection(name: str) -> None:
    peer = flooded()
    if "closed" in name:
        peer.http2.reset(peer.owner.accepted[1])
    cost = 10 if "settings" in name and "ack" not in name else 1

    sent = 0
    while not peer.http2.is_closed and sent < 10 * BURST:
        peer.send(USELESS[name])
        sent += 1

    # The stream that was opened has earned a few frames more.
    assert BURST // cost <= sent <= BURST // cost + 10
    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


def test_time_brings_the_allowance_back_up_to_its_burst() -> None:
    peer = flooded()
    for _ in range(20):
        for _ in range(BURST // 2):
            peer.send_frame(frames.PING, 0, 0, b"12345678")
        peer.http2.refill(BURST / 2 / 10)
    peer.http2.refill(1e9)

    while not peer.http2.is_closed:
        peer.send_frame(frames.PING, 0, 0, b"12345678")
    assert len([s for s in peer.sent() if s.kind == frames.PING]) <= 20 * BURST // 2 + BURST + 10


def test_a_reader_of_much_data_may_send_a_window_update_for_every_frame() -> None:
    peer = flooded()
    stream = peer.owner.accepted[1]
    for _ in range(20 * BURST):
        peer.http2.send_data(stream, [b"x" * 1000], 1000, end=False)
        peer.send(window_update(1, 1000) + window_update(0, 1000) + frame(frames.PING, 0, 0, b"12345678"))
        peer.sent()

    assert not peer.http2.is_closed


def open_and_reset(peer: Peer, number: int) -> bytes:
    return peer.headers(number) + rst_stream(number, ErrorCode.CANCEL)


def open_malformed(peer: Peer, number: int) -> bytes:
    return peer.headers(number, [(b":method", b"GET")])


def open_and_overflow(peer: Peer, number: int) -> bytes:
    return peer.headers(number) + window_update(number, 0x7FFFFFFF)


def end_twice(peer: Peer, number: int) -> bytes:
    return peer.headers(number, end=True) + peer.data(number, b"x")


@pytest.mark.parametrize(
    ("attack", "borne"),
    [(open_and_reset, BURST), (end_twice, BURST), (open_malformed, BURST // 20), (open_and_overflow, BURST // 20)],
)
def test_streams_that_are_begun_to_be_reset_end_the_connection(
    attack: Callable[[Peer, int], bytes], borne: int
) -> None:
    peer = flooded()

    number = 1
    while not peer.http2.is_closed and number < 20 * BURST:
        number += 2
        peer.send(attack(peer, number))

    assert borne <= (number - 1) // 2 <= borne + 1
    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


def test_calls_that_are_answered_earn_resets_of_others() -> None:
    peer = flooded()
    block = literal_block(RESPONSE)
    number = 1
    for _ in range(10 * BURST):
        number += 2
        peer.http2.send_headers(peer.open(number, end=True), block, end=True)
        number += 2
        peer.send(open_and_reset(peer, number))

    assert not peer.http2.is_closed


def test_refused_streams_count_as_resets() -> None:
    peer = server(max_concurrent_streams=1, resets_burst=BURST)
    peer.open(1)
    number = 1
    while not peer.http2.is_closed and number < 20 * BURST:
        number += 2
        peer.send(peer.headers(number))

    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)
    assert len(peer.owner.accepted) == 1


def test_what_is_remembered_of_streams_is_bounded() -> None:
    peer = server(resets_burst=10**6)
    for number in range(1, 20_001, 4):
        peer.send(open_and_reset(peer, number))
        peer.send(peer.headers(number + 2, end=True))
        peer.http2.reset(peer.owner.accepted[number + 2])
        peer.send(peer.data(number + 2, b"late"))
        peer.owner.accepted.clear()

    http2 = peer.http2
    assert http2.streams == {}
    assert len(http2._recent_resets or ()) <= 1000
    assert len(http2._skipped or ()) <= 64


def test_settings_of_too_many_entries_end_the_connection() -> None:
    peer = server(max_settings=64)
    peer.send(settings_frame(dict.fromkeys(range(100, 164), 1)))
    assert not peer.http2.is_closed
    peer.sent()

    peer.send(settings_frame(dict.fromkeys(range(100, 165), 1)))

    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


def test_an_allowance_is_spent_and_earned() -> None:
    allowance = Allowance("things", 3, 2.0)
    for _ in range(3):
        allowance.spend()
    with pytest.raises(ConnectionFaultError, match="too many things"):
        allowance.spend()
    allowance.refill(0.5)
    allowance.spend()
    allowance.spend(work=1)
    with pytest.raises(ConnectionFaultError):
        allowance.spend(work=1)
    allowance.refill(100)
    with pytest.raises(ConnectionFaultError):
        allowance.spend(work=1, cost=4)
