"""RFC 9113 sections 5.2 and 6.9: windows in both directions, and what waits for them."""

from __future__ import annotations

import pytest
from tests.unit.shared.http2.raw_frames import RESPONSE, TRAILERS, Peer, RecordingStream, Sent, client, server

from lathe_shared.http2 import frames
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import rst_stream, window_update
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.sending import TURN_BYTES
from lathe_shared.http2.settings import settings_frame

WINDOW = 65_535
TRAILERS_BLOCK = literal_block(TRAILERS)


def payload(sent: list[Sent]) -> dict[int, bytes]:
    """Return the DATA of each stream."""
    data: dict[int, bytes] = {}
    for frame in sent:
        if frame.kind == frames.DATA:
            data[frame.stream_id] = data.get(frame.stream_id, b"") + frame.payload
    return data


def credit(sent: list[Sent]) -> dict[int, int]:
    """Return what WINDOW_UPDATEs have given to each stream, 0 for the connection."""
    given: dict[int, int] = {}
    for frame in sent:
        assert frame.kind == frames.WINDOW_UPDATE
        given[frame.stream_id] = given.get(frame.stream_id, 0) + int.from_bytes(frame.payload, "big")
    return given


def send(peer: Peer, stream: RecordingStream, data: bytes, *, end: bool = False) -> bool:
    """Send DATA from the connection under test, in two pieces."""
    half = len(data) // 2
    return peer.http2.send_data(stream, [data[:half], memoryview(data)[half:]], len(data), end=end)


# What we may send


def test_data_beyond_the_windows_waits_and_goes_out_as_they_grow() -> None:
    peer = server()
    stream = peer.open(end=True)
    data = bytes(range(256)) * 400
    peer.http2.send_headers(stream, literal_block(RESPONSE), end=False)

    assert not send(peer, stream, data)
    peer.http2.send_headers(stream, TRAILERS_BLOCK, end=True)

    got = payload(peer.sent())[1]
    assert len(got) == WINDOW
    peer.send(window_update(1, 100))
    assert peer.sent() == []
    peer.send(window_update(0, 50))
    got += payload(peer.sent())[1]
    assert len(got) == WINDOW + 50
    peer.send(window_update(0, 1 << 20))
    got += payload(peer.sent())[1]
    assert len(got) == WINDOW + 100
    assert stream.drained == 0
    peer.send(window_update(1, 1 << 20))
    rest = peer.sent()
    got += payload(rest)[1]
    assert got == data
    assert (rest[-1].kind, rest[-1].flags, rest[-1].payload) == (frames.HEADERS, 5, TRAILERS_BLOCK)
    assert stream.drained == 1
    assert peer.http2.pending_bytes == 0
    assert stream.is_closed


def test_data_is_cut_to_the_frames_that_the_peer_takes() -> None:
    peer = server()
    stream = peer.open()
    assert send(peer, stream, b"x" * 40_000, end=True)

    assert [(len(s.payload), s.flags) for s in peer.sent()] == [(16_384, 0), (16_384, 0), (7_232, 1)]


def test_larger_frames_are_sent_to_a_peer_that_takes_them() -> None:
    peer = Peer(settings={4: 1 << 20, 5: 1 << 20})
    peer.send(window_update(0, 1 << 20))
    stream = peer.open()

    assert send(peer, stream, b"x" * 600_000)

    assert [len(s.payload) for s in peer.sent()] == [262_144, 262_144, 75_712]


def test_settings_move_the_windows_of_open_streams_even_below_zero() -> None:
    peer = server()
    stream = peer.open()
    assert send(peer, stream, b"x" * 1000)
    peer.sent()

    peer.send(settings_frame({4: 0}))
    assert stream.send_window == -1000
    assert not send(peer, stream, b"y" * 10)
    assert payload(peer.sent()) == {}
    peer.send(settings_frame({4: 1005}))

    assert payload(peer.sent()) == {1: b"y" * 5}
    peer.send(settings_frame({4: 1 << 20}))
    assert payload(peer.sent()) == {1: b"y" * 5}


def test_settings_that_make_a_window_overflow_end_the_connection() -> None:
    peer = server()
    peer.open()
    peer.send(window_update(1, 0x7FFFFFFF - WINDOW))

    peer.send(settings_frame({4: WINDOW + 1}))

    peer.expect_goaway(ErrorCode.FLOW_CONTROL_ERROR)


def test_an_end_without_data_needs_no_window() -> None:
    peer = server()
    stream = peer.open()
    peer.send(settings_frame({4: 0}))
    peer.sent()

    assert peer.http2.send_data(stream, [], 0, end=True)

    assert [(s.kind, s.flags, s.payload) for s in peer.sent()] == [(frames.DATA, frames.END_STREAM, b"")]
    assert stream.is_local_closed


def test_an_end_behind_what_waits_comes_with_its_last_byte() -> None:
    peer = server()
    stream = peer.open()
    peer.send(settings_frame({4: 1}))
    peer.sent()

    assert not send(peer, stream, b"abc", end=True)
    peer.send(window_update(1, 1) + window_update(1, 1))

    sent = peer.sent()
    assert [(s.payload, s.flags) for s in sent] == [(b"a", 0), (b"b", 0), (b"c", frames.END_STREAM)]


def test_streams_that_wait_for_the_same_window_take_turns() -> None:
    peer = Peer(settings={4: 1 << 20})
    streams = [peer.open(number) for number in (1, 3, 5)]
    for stream in streams:
        assert not send(peer, stream, b"x" * 300_000)
    peer.sent()

    peer.send(window_update(0, 3 * TURN_BYTES))

    assert {number: len(data) for number, data in payload(peer.sent()).items()} == {
        1: TURN_BYTES,
        3: TURN_BYTES,
        5: TURN_BYTES,
    }


def test_a_stream_without_a_window_does_not_hold_up_the_others() -> None:
    peer = server()
    stuck, other = peer.open(1), peer.open(3)
    assert not send(peer, stuck, b"x" * (WINDOW + 1))
    peer.send(window_update(0, 1000))
    peer.sent()

    assert send(peer, other, b"y" * 500)

    assert payload(peer.sent()) == {3: b"y" * 500}


def test_nothing_waits_for_a_stream_that_was_reset() -> None:
    peer = server()
    stream = peer.open()
    assert not send(peer, stream, b"x" * 200_000)
    peer.sent()

    peer.send(rst_stream(1, ErrorCode.CANCEL) + window_update(0, 1 << 20))

    assert peer.http2.pending_bytes == 0
    peer.expect_alive()


def test_data_waits_while_the_transport_is_full_and_control_frames_do_not() -> None:
    peer = server()
    stream = peer.open()

    peer.http2.set_writable(False)
    assert not send(peer, stream, b"x" * 10)
    peer.expect_alive()
    peer.http2.set_writable(True)

    assert payload(peer.sent()) == {1: b"x" * 10}
    assert stream.drained == 1


# What we let the peer send


def test_the_peer_is_told_in_batches_of_what_was_read() -> None:
    peer = server(stream_window_bytes=100_000, connection_window_bytes=200_000)
    stream = peer.open()

    for _ in range(4):
        peer.send(peer.data(1, b"x" * 10_000))
        peer.http2.release(stream, 10_000)

    assert credit(peer.sent()) == {1: 30_000}
    for _ in range(2):
        peer.send(peer.data(1, b"x" * 10_000))
        peer.http2.release(stream, 10_000)
    assert credit(peer.sent()) == {0: 50_000, 1: 30_000}


def test_what_was_not_read_is_not_given_back() -> None:
    peer = server(stream_window_bytes=100_000, connection_window_bytes=200_000)
    peer.open()

    for _ in range(10):
        peer.send(peer.data(1, b"x" * 10_000))

    assert peer.sent() == []
    assert peer.http2.streams[1].held_bytes == 100_000


def test_data_beyond_a_streams_window_resets_it() -> None:
    peer = server(stream_window_bytes=65_535, connection_window_bytes=200_000)
    peer.open()
    peer.send(peer.data(1, b"x" * 65_000))

    peer.send(peer.data(1, b"x" * 536))

    peer.expect_reset(1, ErrorCode.FLOW_CONTROL_ERROR)


def test_data_beyond_the_connections_window_ends_it() -> None:
    peer = server(connection_window_bytes=65_535)
    peer.open(1)
    peer.open(3)
    peer.send(peer.data(1, b"x" * 60_000))

    peer.send(peer.data(3, b"x" * 5_536))

    peer.expect_goaway(ErrorCode.FLOW_CONTROL_ERROR)


def test_padding_counts_against_the_windows_and_is_given_back_at_once() -> None:
    peer = server(stream_window_bytes=65_535, connection_window_bytes=65_535)
    stream = peer.open()
    frame = bytes([255]) + b"\0" * 255

    for _ in range(1000):
        peer.send_frame(frames.DATA, frames.PADDED, 1, frame)

    assert not peer.http2.is_closed
    given = credit([sent for sent in peer.sent() if sent.stream_id == 0])
    assert 256_000 - 16_384 <= given[0] <= 256_000
    assert stream.held_bytes == 0


@pytest.mark.parametrize("stream_id", [1, 3])
def test_data_that_nobody_reads_is_given_back_to_the_connection(stream_id: int) -> None:
    peer = server(connection_window_bytes=65_535)
    peer.open(1)
    peer.http2.reset(peer.open(3))
    peer.send(rst_stream(1, ErrorCode.CANCEL))
    peer.sent()

    # Reset by us: on its way when the peer learned of it. Reset by the peer: its fault, but a stream's only.
    for _ in range(20):
        peer.send(peer.data(stream_id, b"x" * 10_000))

    assert not peer.http2.is_closed
    assert credit([s for s in peer.sent() if s.kind == frames.WINDOW_UPDATE])[0] >= 150_000


def test_a_client_reads_a_response_after_its_stream_is_closed() -> None:
    peer = client(connection_window_bytes=65_535)
    stream = peer.call()
    peer.send(peer.headers(1, RESPONSE) + peer.data(1, b"x" * 40_000, end=True))
    assert stream.is_closed
    assert peer.sent() == []

    peer.http2.release(stream, 40_000)

    assert credit(peer.sent()) == {0: 40_000}
