"""RFC 9113 sections 3.4, 4 and 6: what each frame may look like, and the fault that each other look is."""

from __future__ import annotations

import struct

import pytest
from tests.unit.shared.http2.raw_frames import REQUEST, Peer, client, parse, server

from lathe_shared.http2 import frames
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import CLIENT_PREFACE, FRAME, PADDED, SETTINGS_ACK, frame
from lathe_shared.http2.settings import settings_frame

BOTH = [server, client]


def word(number: int) -> bytes:
    return number.to_bytes(4, "big")


# Section 3.4: the preface


def test_a_server_begins_with_settings_that_say_its_limits() -> None:
    peer = server(max_frame_bytes=20_000, stream_window_bytes=100_000, connection_window_bytes=200_000)

    settings, window = parse(peer.first_output)
    assert (settings.kind, settings.flags, settings.stream_id) == (frames.SETTINGS, 0, 0)
    entries = dict(struct.iter_unpack(">HI", settings.payload))
    assert entries == {
        3: peer.limits.max_concurrent_streams,
        4: 100_000,
        5: 20_000,
        6: peer.limits.max_header_list_bytes,
    }
    assert (window.kind, window.stream_id, window.payload) == (frames.WINDOW_UPDATE, 0, word(200_000 - 65_535))


def test_a_client_begins_with_its_preface_and_forbids_push() -> None:
    peer = client()

    assert peer.first_output.startswith(CLIENT_PREFACE)
    settings = parse(peer.first_output[len(CLIENT_PREFACE) :])[0]
    assert dict(struct.iter_unpack(">HI", settings.payload))[2] == 0


@pytest.mark.parametrize("size", range(1, 25))
def test_a_wrong_preface_is_refused_at_its_first_wrong_byte(size: int) -> None:
    peer = Peer(shake_hands=False)
    peer.send(CLIENT_PREFACE[: size - 1])
    assert not peer.http2.is_closed

    peer.send(b"\xff")

    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)


def test_http_1_is_refused() -> None:
    peer = Peer(shake_hands=False)

    peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)


@pytest.mark.parametrize("is_client", [False, True])
@pytest.mark.parametrize(
    "first",
    [
        frame(frames.PING, 0, 0, b"12345678"),
        frame(frames.WINDOW_UPDATE, 0, 0, word(1)),
        frame(frames.HEADERS, 4, 1, b"\x83"),
        frame(frames.DATA, 0, 1, b"x"),
        frame(0x77, 0, 0, b"x"),
        SETTINGS_ACK,
    ],
    ids=["ping", "window update", "headers", "data", "unknown", "acknowledgement"],
)
def test_settings_come_first(first: bytes, is_client: bool) -> None:
    peer = Peer(shake_hands=False, is_client=is_client)

    peer.send((b"" if is_client else CLIENT_PREFACE) + first)

    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)


# Section 4: frames


def test_frames_arrive_whole_however_they_are_split() -> None:
    peer = Peer(shake_hands=False)
    stream = CLIENT_PREFACE + settings_frame({}) + SETTINGS_ACK + peer.headers(1) + peer.data(1, b"hello", end=True)

    for byte in stream:
        peer.send(bytes([byte]))

    opened = peer.owner.accepted[1]
    assert (opened.data, opened.ended) == (b"hello", 1)


def test_data_is_passed_on_before_its_frame_is_whole() -> None:
    peer = server()
    stream = peer.open()

    peer.send(peer.data(1, b"abcdef", end=True)[:-3])

    assert (stream.data, stream.ended) == (b"abc", 0)


@pytest.mark.parametrize("make", BOTH)
def test_frames_of_unknown_types_are_ignored_on_any_stream(make: type[Peer]) -> None:
    peer = make()

    for stream_id in (0, 1, 2, 99):
        peer.send_frame(0xEE, 0xFF, stream_id, b"x" * 3000)
    peer.send_frame(0xEF)

    peer.expect_alive()


@pytest.mark.parametrize("make", BOTH)
def test_undefined_flags_and_the_reserved_bit_are_ignored(make: type[Peer]) -> None:
    peer = make()

    peer.send(FRAME.pack(8 << 8 | frames.PING, 0xF2, 0x80000000) + b"abcdefgh")

    assert [(sent.flags, sent.payload) for sent in peer.sent()] == [(frames.ACK, b"abcdefgh")]


def test_the_reserved_bit_is_ignored_on_a_request() -> None:
    peer = server()
    head = FRAME.pack(len(block := peer.block()) << 8 | frames.HEADERS, frames.END_HEADERS, 0x80000001)
    peer.send(head + block)
    peer.send(FRAME.pack(1 << 8 | frames.DATA, frames.END_STREAM, 0x80000001) + b"x")

    assert (peer.owner.accepted[1].data, peer.owner.accepted[1].ended) == (b"x", 1)


@pytest.mark.parametrize("kind", [*range(10), 0xEE])
def test_a_frame_above_the_limit_is_refused_by_its_header(kind: int) -> None:
    peer = server(max_frame_bytes=16_384)
    peer.open()

    peer.send(FRAME.pack(16_385 << 8 | kind, 0, 1))

    peer.expect_goaway(ErrorCode.FRAME_SIZE_ERROR)


def test_a_frame_of_just_the_limit_is_taken() -> None:
    peer = server(max_frame_bytes=16_384)
    stream = peer.open()

    peer.send(peer.data(1, b"x" * 16_384, end=True))

    assert (len(stream.data), stream.ended) == (16_384, 1)


# Section 6: the frames, each in every wrong shape


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (frame(frames.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.DATA, frames.PADDED, 1, b""), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.DATA, frames.PADDED, 1, b"\x01"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.DATA, frames.PADDED, 1, b"\x09" + b"x" * 8), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.DATA, 0, 3, b"x"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.DATA, 0, 2, b"x"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.HEADERS, 4, 0, b"\x83"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.HEADERS, 4, 2, b"\x83"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.HEADERS, 4 | frames.PADDED, 3, b""), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.HEADERS, 4 | frames.PADDED, 3, b"\x02\x83"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.HEADERS, 4 | frames.HAS_PRIORITY, 3, b"\0\0\0\0"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.HEADERS, 4 | PADDED | frames.HAS_PRIORITY, 3, b"\0" * 5), ErrorCode.FRAME_SIZE_ERROR),
        (
            frame(frames.HEADERS, 4 | PADDED | frames.HAS_PRIORITY, 3, b"\1" + b"\0" * 5),
            ErrorCode.PROTOCOL_ERROR,
        ),
        (frame(frames.PRIORITY, 0, 0, b"\0" * 5), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.PRIORITY, 0, 3, b"\0" * 4), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.RST_STREAM, 0, 0, word(8)), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.RST_STREAM, 0, 3, word(8)), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.RST_STREAM, 0, 1, b"\0\0\0"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.SETTINGS, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.SETTINGS, 0, 0, b"\0\0\0\0\0"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.SETTINGS, frames.ACK, 0, b"\0" * 6), ErrorCode.FRAME_SIZE_ERROR),
        (settings_frame({2: 2}), ErrorCode.PROTOCOL_ERROR),
        (settings_frame({4: 1 << 31}), ErrorCode.FLOW_CONTROL_ERROR),
        (settings_frame({5: 16_383}), ErrorCode.PROTOCOL_ERROR),
        (settings_frame({5: 1 << 24}), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.PUSH_PROMISE, 4, 1, word(2)), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.PING, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.PING, 0, 0, b"1234567"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.GOAWAY, 0, 1, b"\0" * 8), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.GOAWAY, 0, 0, b"\0" * 7), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.WINDOW_UPDATE, 0, 0, word(0)), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.WINDOW_UPDATE, 0, 0, b"\0\0\0"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.WINDOW_UPDATE, 0, 0, word(0x7FFFFFFF)), ErrorCode.FLOW_CONTROL_ERROR),
        (frame(frames.WINDOW_UPDATE, 0, 3, word(1)), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.CONTINUATION, 4, 1, b""), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.CONTINUATION, 4, 0, b""), ErrorCode.PROTOCOL_ERROR),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else value.name,
)
def test_a_frame_that_breaks_a_rule_of_the_connection_ends_it(wrong: bytes, code: ErrorCode) -> None:
    peer = server()
    stream = peer.open()

    peer.send(wrong)

    peer.expect_goaway(code)
    assert stream.code == code


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (frame(frames.PRIORITY, 0, 1, b"\0" * 6), ErrorCode.FRAME_SIZE_ERROR),
        (frame(frames.WINDOW_UPDATE, 0, 1, word(0)), ErrorCode.PROTOCOL_ERROR),
        (frame(frames.WINDOW_UPDATE, 0, 1, word(0x7FFFFFFF)), ErrorCode.FLOW_CONTROL_ERROR),
    ],
    ids=["priority length", "zero increment", "overflow"],
)
def test_a_frame_that_breaks_a_rule_of_its_stream_ends_that(wrong: bytes, code: ErrorCode) -> None:
    peer = server()
    stream = peer.open()

    peer.send(wrong)

    peer.expect_reset(1, code)
    assert stream.code == code


def test_nothing_is_read_or_said_after_the_end() -> None:
    peer = server()
    peer.send_frame(frames.PING, 0, 1, b"12345678")
    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)

    peer.send(peer.headers(1))
    peer.send_frame(frames.PING, 0, 0, b"12345678")

    assert peer.sent() == []
    assert peer.owner.accepted == {}


def test_goaway_names_the_newest_stream_and_the_reason() -> None:
    peer = server()
    peer.open(1)
    peer.open(5)

    peer.send_frame(frames.PING, 0, 1, b"12345678")

    goaway = peer.sent()[-1]
    assert goaway.payload[:4] == word(5)
    assert b"PING on a stream" in goaway.payload


def test_padding_is_taken_off() -> None:
    peer = server()
    block = peer.block()
    peer.send_frame(frames.HEADERS, 4 | frames.PADDED, 1, b"\x07" + block + b"\0" * 7)
    stream = peer.owner.accepted[1]

    peer.send_frame(frames.DATA, frames.PADDED, 1, b"\x03abc\0\0\0")
    peer.send_frame(frames.DATA, frames.PADDED, 1, b"\x00def")
    peer.send_frame(frames.DATA, frames.PADDED | frames.END_STREAM, 1, b"\xff" + b"\0" * 255)

    assert (stream.data, stream.ended) == (b"abcdef", 1)
    peer.expect_alive()


def test_padding_is_taken_off_byte_by_byte() -> None:
    peer = server()
    stream = peer.open()

    for byte in frame(frames.DATA, frames.PADDED | frames.END_STREAM, 1, b"\x03abc\0\0\0"):
        assert stream.ended == 0
        peer.send(bytes([byte]))

    assert (stream.data, stream.ended) == (b"abc", 1)


def test_priority_is_ignored_on_any_stream() -> None:
    peer = server()
    for stream_id in (1, 2, 77):
        peer.send_frame(frames.PRIORITY, 0, stream_id, b"\0\0\0\x63\x10")
    peer.send_frame(frames.HEADERS, 4 | frames.HAS_PRIORITY, 1, b"\x80\0\0\0\x10" + peer.block(REQUEST))
    peer.send_frame(frames.PRIORITY, 0, 1, b"\0\0\0\x63\x10")

    assert peer.owner.accepted[1].headers is not None
    peer.expect_alive()


@pytest.mark.parametrize("make", BOTH)
def test_ping_is_answered_and_its_answer_is_not(make: type[Peer]) -> None:
    peer = make()

    peer.send_frame(frames.PING, frames.ACK, 0, b"87654321")

    assert peer.owner.ping_acks == 1
    peer.expect_alive()


@pytest.mark.parametrize("make", BOTH)
def test_settings_are_acknowledged_each_and_unknown_ones_ignored(make: type[Peer]) -> None:
    peer = make()

    peer.send(settings_frame({0x99: 5, 1: 100}) + settings_frame({}) + settings_frame({3: 7}))

    assert [(sent.kind, sent.flags) for sent in peer.sent()] == [(frames.SETTINGS, frames.ACK)] * 3
    assert peer.http2.peer.max_concurrent_streams == 7
    assert peer.owner.settings == 4


def test_enable_push_is_taken_from_a_client_and_never_from_a_server() -> None:
    from_client = server()
    from_client.send(settings_frame({2: 1}))
    assert not from_client.http2.is_closed

    from_server = client()
    from_server.send(settings_frame({2: 1}))
    from_server.expect_goaway(ErrorCode.PROTOCOL_ERROR)
