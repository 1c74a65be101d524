"""RFC 9113 sections 5.1, 5.4 and 6.8: what may come in each state of a stream, and how a connection drains."""

from __future__ import annotations

import pytest
from tests.unit.shared.http2.raw_frames import RESPONSE, TRAILERS, Peer, client, server

from lathe_shared.http2 import frames
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import frame, goaway, rst_stream, window_update
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.settings import settings_frame

OK_BLOCK = literal_block(RESPONSE)


def respond(peer: Peer, stream_id: int = 1) -> None:
    """Have the server under test end its side of a stream."""
    peer.http2.send_headers(peer.owner.accepted[stream_id], OK_BLOCK, end=True)
    peer.sent()


def test_a_request_with_data_and_trailers_is_received() -> None:
    peer = server()
    stream = peer.open()
    peer.send(peer.data(1, b"one") + peer.data(1, b"two") + peer.headers(1, TRAILERS, end=True))

    assert stream.data == b"onetwo"
    assert stream.trailers is not None
    assert stream.trailers.fields == [("grpc-status", "0")]
    assert (stream.ended, stream.is_remote_closed, stream.is_local_closed) == (1, True, False)


def test_a_response_is_sent_with_its_trailers_and_closes_the_stream() -> None:
    peer = server()
    stream = peer.open(end=True)

    peer.http2.send_headers(stream, OK_BLOCK, end=False)
    peer.http2.send_data(stream, [b"ab", b"c"], 3, end=False)
    peer.http2.send_headers(stream, literal_block(TRAILERS), end=True)

    sent = peer.sent()
    assert [(s.kind, s.flags, s.stream_id) for s in sent] == [(1, 4, 1), (0, 0, 1), (1, 5, 1)]
    assert sent[1].payload == b"abc"
    assert stream.is_closed
    assert peer.http2.streams == {}
    assert peer.owner.closed == [1]


# Idle


def test_streams_that_were_left_out_are_closed() -> None:
    peer = server()
    peer.open(5)

    peer.send(peer.headers(3))

    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)


# Half-closed (remote): the peer has ended its side


def test_data_after_the_end_resets_the_stream() -> None:
    peer = server()
    peer.open(end=True)

    peer.send(peer.data(1, b"more"))

    peer.expect_reset(1, ErrorCode.STREAM_CLOSED)


def test_headers_after_the_end_reset_the_stream_and_leave_hpack_in_step() -> None:
    peer = server()
    peer.open(end=True)

    peer.send(peer.headers(1, [*TRAILERS, (b"into-the-table", b"x")], end=True))

    peer.expect_reset(1, ErrorCode.STREAM_CLOSED)
    peer.send(
        peer.headers(3, [*[(b":method", b"POST"), (b":scheme", b"x"), (b":path", b"/")], (b"into-the-table", b"x")])
    )
    headers = peer.owner.accepted[3].headers
    assert headers is not None
    assert headers.fields[-1] == ("into-the-table", "x")


def test_window_update_priority_and_reset_are_taken_after_the_end() -> None:
    peer = server()
    stream = peer.open(end=True)

    peer.send(window_update(1, 5) + frame(frames.PRIORITY, 0, 1, b"\0" * 5))
    assert stream.send_window == 65_535 + 5
    peer.send(rst_stream(1, ErrorCode.CANCEL))

    assert stream.code == ErrorCode.CANCEL
    peer.expect_alive()


# Closed


def test_window_update_priority_and_reset_are_ignored_when_all_is_over() -> None:
    peer = server()
    peer.open(end=True)
    respond(peer)

    peer.send(window_update(1, 5) + rst_stream(1, ErrorCode.CANCEL) + frame(frames.PRIORITY, 0, 1, b"\0" * 5))

    peer.expect_alive()


def test_data_on_a_closed_stream_is_refused_and_its_window_given_back() -> None:
    peer = server()
    peer.open(end=True)
    respond(peer)

    peer.send(peer.data(1, b"late"))

    peer.expect_reset(1, ErrorCode.STREAM_CLOSED)
    assert peer.http2.uncredited_bytes == 4


def test_headers_on_a_closed_stream_end_the_connection() -> None:
    peer = server()
    peer.open(end=True)
    respond(peer)

    peer.send(peer.headers(1))

    peer.expect_goaway(ErrorCode.STREAM_CLOSED)


@pytest.mark.parametrize("end", [False, True])
def test_what_was_under_way_to_a_stream_that_we_reset_is_ignored(end: bool) -> None:
    peer = server()
    stream = peer.open()
    peer.http2.reset(stream, ErrorCode.CANCEL)
    assert [(s.kind, s.stream_id, s.code) for s in peer.sent()] == [(frames.RST_STREAM, 1, ErrorCode.CANCEL)]

    peer.send(peer.data(1, b"late", end=end))
    peer.send(peer.headers(1, TRAILERS, end=True))
    peer.send(window_update(1, 10) + rst_stream(1, ErrorCode.CANCEL))

    assert stream.data == b""
    assert stream.code is None, "our own reset is no news"
    assert peer.http2.uncredited_bytes == 4
    peer.expect_alive()


def test_a_stream_that_is_reset_inside_a_frame_gets_no_more_of_it() -> None:
    peer = server()
    stream = peer.open()
    whole = peer.data(1, b"abcdef", end=True)
    peer.send(whole[:-3])

    peer.http2.reset(stream)
    peer.sent()
    peer.send(whole[-3:])

    assert (stream.data, stream.ended) == (b"abc", 0)
    assert peer.http2.uncredited_bytes == 3
    peer.expect_alive()


def test_a_reset_by_the_peer_ends_the_stream_once() -> None:
    peer = server()
    stream = peer.open()

    peer.send(rst_stream(1, 0xABC))
    peer.send(rst_stream(1, 0xABC))

    assert stream.code == 0xABC
    assert peer.owner.closed == [1]
    peer.expect_alive()


def test_more_streams_than_allowed_are_refused_and_may_come_again() -> None:
    peer = server(max_concurrent_streams=2)
    peer.open(1)
    peer.open(3)

    peer.send(peer.headers(5))

    peer.expect_reset(5, ErrorCode.REFUSED_STREAM)
    peer.send(peer.data(5, b"sent before the refusal was read"))
    peer.send(rst_stream(1, ErrorCode.CANCEL))
    peer.open(7)


# Draining, section 6.8


def test_a_drained_server_finishes_what_runs_and_refuses_the_rest() -> None:
    peer = server()
    stream = peer.open()

    peer.http2.drain()
    peer.http2.drain()
    told = peer.sent()
    assert [(s.kind, s.code, s.payload[:4]) for s in told] == [(frames.GOAWAY, ErrorCode.NO_ERROR, b"\0\0\0\1")]
    peer.send(peer.headers(3) + peer.data(3, b"x") + peer.data(1, b"y", end=True))

    peer.expect_reset(3, ErrorCode.REFUSED_STREAM)
    assert (stream.data, stream.ended) == (b"y", 1)
    peer.send_frame(frames.PING, 0, 1, b"12345678")
    assert peer.sent()[-1].payload[:4] == b"\0\0\0\1", "the number in GOAWAY must not grow"


def test_goaway_is_told_and_leaves_streams_alone() -> None:
    peer = client()
    stream = peer.call()

    peer.send(goaway(1, ErrorCode.NO_ERROR, b"bye"))

    assert peer.owner.goaways == [(1, ErrorCode.NO_ERROR, b"bye")]
    assert not peer.http2.can_open()
    peer.send(peer.headers(1, RESPONSE) + peer.headers(1, TRAILERS, end=True))
    assert stream.trailers is not None


def test_a_lost_connection_resets_its_streams() -> None:
    peer = server()
    streams = [peer.open(1), peer.open(3, end=True)]

    peer.http2.lost("gone")

    assert [stream.code for stream in streams] == [ErrorCode.NO_ERROR] * 2
    assert peer.owner.closed == [1, 3]
    assert peer.sent() == []


# A client's view


def test_a_client_receives_a_response() -> None:
    peer = client()
    stream = peer.call()

    peer.send(peer.headers(1, RESPONSE) + peer.data(1, b"abc") + peer.headers(1, TRAILERS, end=True))

    assert stream.headers is not None
    assert stream.headers.fields[0] == (":status", "200")
    assert stream.data == b"abc"
    assert (stream.ended, stream.is_closed) == (1, True)


def test_informational_responses_are_passed_over() -> None:
    peer = client()
    stream = peer.call()

    peer.send(peer.headers(1, [(b":status", b"100")]) + peer.headers(1, [(b":status", b"103")]))
    assert stream.headers is None
    peer.send(peer.headers(1, RESPONSE))

    assert stream.headers is not None


@pytest.mark.parametrize(
    "answer",
    [
        lambda peer: peer.headers(1, [(b":status", b"100")], end=True),
        lambda peer: peer.headers(1, [(b":status", b"101")]),
        lambda peer: peer.headers(1, [(b"content-type", b"x")]),
        lambda peer: peer.headers(1, [(b":status", b"ok!")]),
        lambda peer: peer.headers(1, [(b":status", b"200"), (b":status", b"200")]),
        lambda peer: peer.headers(1, [(b":status", b"200"), (b":path", b"/")]),
        lambda peer: peer.headers(1, RESPONSE) + peer.headers(1, TRAILERS),
        lambda peer: peer.headers(1, RESPONSE) + peer.headers(1, [(b":status", b"200")], end=True),
        lambda peer: peer.data(1, b"before headers"),
        lambda peer: peer.headers(1, [*RESPONSE, (b"content-length", b"3")], end=True),
        lambda peer: peer.headers(1, [*RESPONSE, (b"content-length", b"3")]) + peer.data(1, b"abcd"),
    ],
    ids=["1xx ends", "101", "no status", "status no number", "status twice", "request pseudo", "second headers open",
         "pseudo in trailers", "data first", "length without data", "too much data"],
)  # fmt: skip
def test_a_malformed_response_resets_the_stream(answer: object) -> None:
    peer = client()
    stream = peer.call()

    peer.send(answer(peer))  # type: ignore[operator]

    peer.expect_reset(1, ErrorCode.PROTOCOL_ERROR)
    assert stream.code == ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize("stream_id", [2, 3])
def test_a_response_on_a_stream_that_the_client_never_opened_ends_the_connection(stream_id: int) -> None:
    peer = client()
    peer.call()

    peer.send(peer.headers(stream_id, RESPONSE))

    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)


def test_a_client_ignores_the_answer_to_what_it_has_cancelled() -> None:
    peer = client()
    stream = peer.call()
    peer.http2.reset(stream)
    peer.sent()

    peer.send(peer.headers(1, RESPONSE) + peer.data(1, b"abc") + peer.headers(1, TRAILERS, end=True))

    peer.expect_alive()


def test_push_is_never_taken() -> None:
    peer = client()
    peer.call()

    peer.send_frame(frames.PUSH_PROMISE, 4, 1, b"\0\0\0\2" + peer.block())

    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)


def test_a_client_opens_no_more_streams_than_the_server_allows() -> None:
    peer = client()
    peer.send(settings_frame({3: 1}))
    peer.sent()
    assert peer.http2.can_open()
    peer.call()
    assert not peer.http2.can_open()

    peer.send(settings_frame({3: 2}))

    assert peer.http2.can_open()


def test_a_client_that_has_used_up_its_numbers_opens_no_more() -> None:
    peer = client()
    peer.http2.next_stream_id = 2**31 - 1
    assert peer.call().id == 2**31 - 1

    assert not peer.http2.can_open()


def test_a_server_takes_the_last_stream_number() -> None:
    peer = server()
    peer.open(2**31 - 3)
    peer.open(2**31 - 1, end=True)

    peer.expect_alive()
