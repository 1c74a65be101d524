"""What happens with time: a connection that is checked by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.shared.http2.raw_frames import Peer, RecordingStream, client, server

from lathe_shared.http2 import frames
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import CLIENT_PREFACE, SETTINGS_ACK
from lathe_shared.http2.limits import Limits
from lathe_shared.http2.settings import settings_frame
from lathe_shared.http2.watch import CHECK_SECONDS, FAREWELL_SECONDS, Watch


class Watched:
    """A connection, its peer and its watch."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.now = 1000.0
        self.unsent_bytes = 0
        self.watch = Watch(peer.http2, self.now)

    def is_closed(self) -> bool:
        return self.peer.http2.is_closed

    def wait(self, seconds: float) -> None:
        """Let time pass, checking as often as the watch asks for."""
        until = self.now + seconds
        while not self.is_closed() and self.now < until:
            pause = self.watch.check(self.now, self.unsent_bytes)
            assert self.is_closed() or 0 < pause <= CHECK_SECONDS
            self.now = min(self.now + pause, until)
        if not self.is_closed():
            self.watch.check(self.now, self.unsent_bytes)


def watched(**limits: Any) -> Watched:
    return Watched(server(keepalive_seconds=0, **limits))


@pytest.mark.parametrize(
    "sent",
    [b"", CLIENT_PREFACE[:10], CLIENT_PREFACE, CLIENT_PREFACE + settings_frame({})],
    ids=["nothing", "half a preface", "no settings", "no acknowledgement"],
)
def test_a_handshake_that_is_not_finished_ends(sent: bytes) -> None:
    watched = Watched(Peer(limits=Limits(handshake_seconds=10), shake_hands=False))
    watched.peer.send(sent)

    watched.wait(9.9)
    assert not watched.is_closed()
    watched.wait(0.2)

    watched.peer.expect_goaway(ErrorCode.SETTINGS_TIMEOUT)


def test_a_finished_handshake_lasts() -> None:
    watched = Watched(Peer(limits=Limits(keepalive_seconds=0), shake_hands=False))
    watched.peer.send(CLIENT_PREFACE + settings_frame({}) + SETTINGS_ACK)

    watched.wait(100_000)

    assert not watched.is_closed()


@pytest.mark.parametrize("sent", [b"\0", frames.pack_frame(100 << 8 | frames.DATA, 0, 1) + b"x"], ids=["head", "data"])
def test_a_frame_that_does_not_go_on_ends_the_connection(sent: bytes) -> None:
    w = watched(progress_seconds=60)
    w.peer.open()
    w.peer.send(sent)

    w.wait(59)
    w.peer.send(b"\0")
    w.wait(59)
    assert not w.is_closed()
    w.wait(2)

    w.peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


def test_a_header_block_must_end_in_time_even_if_it_goes_on() -> None:
    w = watched(progress_seconds=60)
    w.peer.send_frame(frames.HEADERS, 0, 1, b"\x83")
    for _ in range(5):
        w.wait(10)
        w.peer.send_frame(frames.CONTINUATION, 0, 1, b"\x86")
    assert not w.is_closed()

    w.wait(11)

    w.peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


def test_a_peer_that_takes_nothing_is_given_up() -> None:
    w = watched(progress_seconds=60)
    w.unsent_bytes = 1000
    w.wait(59)
    w.unsent_bytes = 900
    w.wait(59)
    assert not w.is_closed()
    w.unsent_bytes = 950
    w.wait(2)

    assert w.is_closed()
    assert w.watch.is_peer_gone


def test_a_stream_whose_window_stays_shut_is_reset_alone() -> None:
    w = watched(progress_seconds=60)
    stuck, slow = w.peer.open(1), w.peer.open(3)
    for stream in (stuck, slow):
        w.peer.send(frames.window_update(0, 65_535))
        w.peer.http2.send_data(stream, [b"x" * 100_000], 100_000, end=True)
    for _ in range(7):
        w.wait(10)
        w.peer.send(frames.window_update(0, 1) + frames.window_update(3, 1))

    assert stuck.code == ErrorCode.CANCEL
    assert slow.code is None
    resets = [s for s in w.peer.sent() if s.kind == frames.RST_STREAM]
    assert [(s.stream_id, s.code) for s in resets] == [(1, ErrorCode.CANCEL)]


def test_a_stream_that_waits_for_its_own_side_is_left_alone() -> None:
    w = watched(progress_seconds=60)
    stream = w.peer.open()

    w.wait(10_000)

    assert stream.code is None
    assert w.peer.http2.streams == {1: stream}


def test_an_idle_connection_is_told_to_go_and_closed() -> None:
    w = watched(idle_seconds=300)
    stream = w.peer.open()
    w.wait(1000)
    w.peer.http2.reset(stream)
    w.peer.sent()
    w.wait(290)
    w.peer.send(w.peer.headers(3))
    w.peer.http2.reset(w.peer.owner.accepted[3])
    w.peer.sent()
    w.wait(290)
    assert w.peer.sent() == []

    w.wait(20)

    assert w.is_closed()
    assert w.peer.http2.close_code == ErrorCode.NO_ERROR


def test_a_drained_connection_is_closed_soon_after_its_last_stream() -> None:
    w = watched()
    stream = w.peer.open()
    w.peer.http2.drain()
    w.wait(1000)
    assert not w.is_closed()

    w.peer.http2.reset(stream)
    w.wait(CHECK_SECONDS + FAREWELL_SECONDS)

    assert w.is_closed()
    assert not w.watch.is_peer_gone


@pytest.mark.parametrize("make", [server, client])
def test_a_silent_peer_is_asked_and_given_up(make: Any) -> None:
    w = Watched(make(keepalive_seconds=60, keepalive_timeout_seconds=20))
    w.wait(61)
    assert [sent.kind for sent in w.peer.sent()] == [frames.PING]

    w.wait(18)
    assert not w.is_closed()
    w.wait(3)

    assert w.is_closed()
    assert w.watch.is_peer_gone


def test_a_peer_that_answers_lives_on() -> None:
    w = Watched(server(keepalive_seconds=60, keepalive_timeout_seconds=20))
    asked = 0
    for _ in range(1000):
        w.wait(10)
        for sent in w.peer.sent():
            assert sent.kind == frames.PING
            asked += 1
            w.peer.send_frame(frames.PING, frames.ACK, 0, sent.payload)

    assert not w.is_closed()
    assert 100 < asked < 200


def test_nothing_is_checked_after_the_end() -> None:
    w = watched()
    w.peer.http2.fail(ErrorCode.INTERNAL_ERROR, "over")
    w.peer.sent()

    w.watch.check(w.now + 1e6, 100)

    assert w.peer.sent() == []


def test_a_stream_says_when_it_is_held_up() -> None:
    peer = server()
    stream = RecordingStream(peer.http2, 1)
    assert stream.progress_mark() is None
