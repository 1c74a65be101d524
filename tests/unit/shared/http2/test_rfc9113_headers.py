"""RFC 9113 sections 4.3, 6.10 and 8, and RFC 7541: header blocks, and what makes a request malformed."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.shared.http2.raw_frames import REQUEST, TRAILERS, Peer, server

from lathe_shared.http2 import frames
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import frame
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.settings import settings_frame


def without(name: bytes) -> list[tuple[bytes, bytes]]:
    return [field for field in REQUEST if field[0] != name]


def raw(*fields: tuple[bytes, bytes]) -> bytes:
    """Return HEADERS of a request with more fields, encoded without any check."""
    return frame(frames.HEADERS, frames.END_HEADERS, 1, literal_block([*REQUEST, *fields]))


@pytest.mark.parametrize(
    "fields",
    [
        without(b":method"),
        without(b":scheme"),
        without(b":path"),
        [(b":path", b""), *without(b":path")],
        [*REQUEST, (b":path", b"/twice")],
        [(b":path", b"/twice"), *REQUEST],
        [*REQUEST[4:], *REQUEST[:4]],
        [(b":status", b"200"), *REQUEST],
        [(b":unknown", b"x"), *REQUEST],
        [(b":protocol", b"websocket"), *REQUEST],
        [*REQUEST, (b"Upper", b"x")],
        [*REQUEST, (b"", b"x")],
        [*REQUEST, (b"sp ace", b"x")],
        [*REQUEST, (b"co:lon", b"x")],
        [*REQUEST, (b"nul\0", b"x")],
        [*REQUEST, (b"\xff", b"x")],
        [*REQUEST, (b"name", b"a\nb")],
        [*REQUEST, (b"name", b"a\rb")],
        [*REQUEST, (b"name", b"a\0b")],
        [*REQUEST, (b"name", b" x")],
        [*REQUEST, (b"name", b"x\t")],
        [*REQUEST, (b"connection", b"close")],
        [*REQUEST, (b"keep-alive", b"x")],
        [*REQUEST, (b"proxy-connection", b"x")],
        [*REQUEST, (b"transfer-encoding", b"chunked")],
        [*REQUEST, (b"upgrade", b"h2c")],
        [*REQUEST, (b"content-length", b"x")],
        [*REQUEST, (b"content-length", b"-1")],
        [*REQUEST, (b"content-length", b"1"), (b"content-length", b"2")],
        [(b":method", b"CONNECT"), (b":authority", b"")],
        [(b":method", b"CONNECT"), (b":authority", b"x"), (b":path", b"/")],
    ],
    ids=lambda fields: repr(sorted(set(fields) ^ set(REQUEST)))[:60],
)
def test_a_malformed_request_resets_its_stream(fields: list[tuple[bytes, bytes]]) -> None:
    peer = server()

    peer.send(frame(frames.HEADERS, frames.END_HEADERS, 1, literal_block(fields)))

    peer.expect_reset(1, ErrorCode.PROTOCOL_ERROR)
    assert peer.owner.accepted == {}


@pytest.mark.parametrize(
    "fields",
    [
        [*REQUEST, (b"name", b"")],
        [*REQUEST, (b"name", b"\xc3\xa4 b\tc")],
        [*REQUEST, (b"!#$%&'*+-.^_`|~09az", b"x")],
        [*REQUEST, (b"content-length", b"3"), (b"content-length", b"3")],
        [*REQUEST, (b"twice", b"1"), (b"twice", b"2")],
        without(b":authority"),
        [(b":method", b"CONNECT"), (b":authority", b"x")],
    ],
    ids=lambda fields: repr(sorted(set(fields) ^ set(REQUEST)))[:60],
)
def test_unusual_fields_are_no_fault(fields: list[tuple[bytes, bytes]]) -> None:
    peer = server()

    peer.send(frame(frames.HEADERS, frames.END_HEADERS, 1, literal_block(fields)))

    headers = peer.owner.accepted[1].headers
    assert headers is not None
    assert headers.fields == [(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields]


@pytest.mark.parametrize(
    ("length", "sent"),
    [
        (b"5", lambda peer: peer.data(1, b"abcdef")),
        (b"5", lambda peer: peer.data(1, b"abcd", end=True)),
        (b"5", lambda peer: peer.data(1, b"abcd") + peer.headers(1, TRAILERS, end=True)),
        (b"0", lambda peer: peer.data(1, b"a")),
    ],
    ids=["more", "less", "less before trailers", "some for none"],
)
def test_data_that_differs_from_content_length_resets_the_stream(length: bytes, sent: Any) -> None:
    peer = server()
    peer.send(peer.headers(1, [*REQUEST, (b"content-length", length)]))

    peer.send(sent(peer))

    peer.expect_reset(1, ErrorCode.PROTOCOL_ERROR)


def test_content_length_without_a_body_resets_the_stream() -> None:
    peer = server()

    peer.send(peer.headers(1, [*REQUEST, (b"content-length", b"1")], end=True))

    peer.expect_reset(1, ErrorCode.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    ("fields", "end"),
    [(TRAILERS, False), ([(b":path", b"/")], True), ([(b":status", b"200")], True), ([(b"Upper", b"x")], True)],
    ids=["not the end", "pseudo of requests", "pseudo of responses", "bad name"],
)
def test_malformed_trailers_reset_the_stream(fields: Any, end: bool) -> None:
    peer = server()
    peer.open()

    peer.send(frame(frames.HEADERS, frames.END_HEADERS | (frames.END_STREAM if end else 0), 1, literal_block(fields)))

    peer.expect_reset(1, ErrorCode.PROTOCOL_ERROR)


# Header blocks in several frames


def test_a_header_block_may_come_in_many_frames_with_empty_ones() -> None:
    peer = server()
    block = peer.block()
    third = len(block) // 3

    peer.send_frame(frames.HEADERS, frames.END_STREAM, 1, block[:third])
    peer.send_frame(frames.CONTINUATION, 0, 1, b"")
    peer.send_frame(frames.CONTINUATION, 0, 1, block[third : 2 * third])
    assert peer.owner.accepted == {}
    peer.send_frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[2 * third :])

    assert peer.owner.accepted[1].ended == 1


@pytest.mark.parametrize(
    "between",
    [
        frame(frames.PING, 0, 0, b"12345678"),
        frame(frames.DATA, 0, 1, b"x"),
        frame(frames.HEADERS, 4, 1, b"\x83"),
        frame(frames.HEADERS, 4, 3, b"\x83"),
        frame(frames.PRIORITY, 0, 1, b"\0" * 5),
        frame(frames.CONTINUATION, 4, 3, b"\x83"),
        frame(frames.SETTINGS, 0, 0, b""),
        frame(frames.RST_STREAM, 0, 1, b"\0\0\0\0"),
        frame(0xEE, 0, 1, b""),
    ],
    ids=lambda value: f"type {value[3]} on {value[8]}",
)
def test_nothing_may_come_inside_a_header_block(between: bytes) -> None:
    peer = server()
    peer.send_frame(frames.HEADERS, 0, 1, peer.block())

    peer.send(between)

    peer.expect_goaway(ErrorCode.PROTOCOL_ERROR)


# HPACK


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",
        b"\xbe",
        b"\xff\xff\xff\xff\xff\x0f",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x40\x05name",
        b"\x40\x01a\x7f\xff\xff\xff\xff\x7f",
        b"\x00\x01a",
        b"\x0f",
        b"\x3f\xe2\x1f",
        b"\x83\x20",
        b"\x00\x85\xff\xff\xff\xff\xff\x01x",
        b"\x83\x86\x44\x8a\xff",
    ],
    ids=lambda value: value.hex(),
)
def test_a_block_that_cannot_be_decoded_ends_the_connection(block: bytes) -> None:
    peer = server()

    peer.send(frame(frames.HEADERS, frames.END_HEADERS, 1, block))

    peer.expect_goaway(ErrorCode.COMPRESSION_ERROR)


def test_malformed_blocks_say_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    peer = server()

    peer.send(frame(frames.HEADERS, frames.END_HEADERS, 1, b"\x40\x05name"))

    peer.expect_goaway(ErrorCode.COMPRESSION_ERROR)
    assert capfd.readouterr() == ("", "")


def test_the_dynamic_table_is_kept_through_streams_that_fail() -> None:
    peer = server()
    fields = [*REQUEST, (b"marker", b"value")]
    peer.send(peer.headers(1, [*fields, (b"connection", b"malformed")]))
    peer.expect_reset(1, ErrorCode.PROTOCOL_ERROR)

    peer.send(peer.headers(3, fields))

    headers = peer.owner.accepted[3].headers
    assert headers is not None
    assert headers.fields[-1] == ("marker", "value")


def test_equal_blocks_mean_what_the_table_says_at_their_time() -> None:
    peer = server()
    for number in range(1, 400, 2):
        value = str(number % 7).encode()
        peer.send(peer.headers(number, [*REQUEST, (b"number", value)], end=True))
        headers = peer.owner.accepted[number].headers
        assert headers is not None
        assert headers.fields[-1] == ("number", value.decode())


def test_a_peer_with_a_small_table_is_told_that_none_is_used() -> None:
    peer = server()
    peer.send(settings_frame({1: 100}))
    peer.sent()
    stream = peer.open()

    peer.http2.send_headers(stream, b"\x88", end=False)
    peer.http2.send_headers(stream, b"\x88", end=True)

    assert [sent.payload for sent in peer.sent()] == [b"\x20\x88", b"\x88"]


def test_a_long_block_of_ours_is_cut_to_the_frames_that_the_peer_takes() -> None:
    peer = server()
    stream = peer.open()
    block = literal_block([(b"name", b"x" * 40_000)])

    peer.http2.send_headers(stream, block, end=True)

    sent = peer.sent()
    assert [(s.kind, s.flags) for s in sent] == [(1, 1), (9, 0), (9, 4)]
    assert all(len(s.payload) <= 16_384 for s in sent)
    assert b"".join(s.payload for s in sent) == block


# Bounds


def test_a_header_list_above_the_limit_is_answered_431() -> None:
    peer = server(max_header_list_bytes=1000)

    peer.send(raw((b"name", b"x" * 1000)))

    response, reset = peer.sent()
    assert response.payload == literal_block([(b":status", b"431")])
    assert (reset.kind, reset.code) == (frames.RST_STREAM, ErrorCode.NO_ERROR)
    assert peer.owner.accepted == {}
    peer.expect_alive()


def test_a_header_list_far_above_the_limit_ends_the_connection() -> None:
    peer = server(max_header_list_bytes=1000)

    peer.send(raw((b"name", b"x" * 3000)))

    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


def test_a_header_list_that_grows_in_decompression_ends_the_connection() -> None:
    peer = server(max_header_list_bytes=16_000)
    # 4,000 bytes in the table, then hundreds of references to them, of a byte each.
    block = literal_block(REQUEST) + b"\x40\x01a\x7f\xa1\x1e" + b"x" * 4000 + b"\xbe" * 500

    peer.send(frame(frames.HEADERS, frames.END_HEADERS, 1, block))

    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


@pytest.mark.parametrize("size", [1000, 0])
def test_a_flood_of_continuations_ends_the_connection(size: int) -> None:
    peer = server(max_continuation_frames=10, max_header_block_bytes=5000)
    peer.send_frame(frames.HEADERS, 0, 1, b"\x83")

    for _ in range(11):
        peer.send_frame(frames.CONTINUATION, 0, 1, b"x" * size)

    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)


def test_a_large_header_frame_is_refused_by_its_header() -> None:
    peer = Peer()

    peer.send(frames.pack_frame(100_000 << 8 | frames.HEADERS, 0, 1))

    peer.expect_goaway(ErrorCode.ENHANCE_YOUR_CALM)
