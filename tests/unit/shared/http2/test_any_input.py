"""Any bytes, any frames, any splits: no exception, no unbounded memory, and the same outcome however they arrive."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.shared.http2.raw_frames import (
    REQUEST,
    RESPONSE,
    TRAILERS,
    Peer,
    Recorder,
    RecordingStream,
    parse,
)
from typing_extensions import override

from lathe_shared.http2 import frames
from lathe_shared.http2.connection import Connection
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import CLIENT_PREFACE, frame
from lathe_shared.http2.header_rules import CheckedHeaders
from lathe_shared.http2.hpack import HeaderBlock, literal_block
from lathe_shared.http2.limits import SERVER_LIMITS
from lathe_shared.http2.stream import Stream

LIMITS = replace(
    SERVER_LIMITS,
    stream_window_bytes=65_535,
    connection_window_bytes=65_535,
    max_frame_bytes=16_384,
    max_concurrent_streams=3,
    control_frames_burst=20,
    resets_burst=50,
)
BLOCKS = [
    literal_block(REQUEST),
    literal_block(RESPONSE),
    literal_block(TRAILERS),
    literal_block([*REQUEST, (b"content-length", b"3")]),
    b"\x83\x86\x84\x41\x01x",
    b"\x40\x04name\x05value",
    b"\x20",
    b"",
    b"\xff\xff",
]
REMEMBERED = BLOCKS[0]

flags = st.sampled_from([0, 1, 4, 5, 8, 9, 0x0C, 0x20, 0x24, 0x2D, 0xFF]) | st.integers(0, 255)
stream_ids = st.sampled_from([0, 1, 1, 1, 3, 3, 5, 7, 2, 9, 2**31 - 1, 2**31 + 1])
payloads = (
    st.sampled_from(BLOCKS)
    | st.sampled_from([b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"12345678"])
    | st.sampled_from([b"\0\4\0\0\0\0", b"\0\4\x7f\xff\xff\xff"])
    | st.binary(max_size=40)
    | st.integers(0, 17_000).map(lambda size: b"\0" * size)
)
kinds = st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 0xEE])
any_frame = st.builds(frame, kinds, flags, stream_ids, payloads)
good_call = st.sampled_from([1, 3, 5, 7, 9, 11]).map(
    lambda number: frame(frames.HEADERS, 4, number, BLOCKS[0]) + frame(frames.DATA, 1, number, b"hello")
)
plausible = st.lists(any_frame | good_call, max_size=25).map(b"".join)


def begun(*, is_client: bool, owner: Recorder | None = None) -> tuple[Connection, Recorder, list[RecordingStream]]:
    owner = owner or Recorder()
    http2 = Connection(owner, LIMITS, is_client=is_client)
    owner.http2 = http2
    calls = []
    if is_client:
        for _ in range(2):
            calls.append(RecordingStream(http2))
            http2.open(calls[-1], literal_block(REQUEST), end=False)
    http2.out.clear()
    http2.receive((b"" if is_client else CLIENT_PREFACE) + frame(frames.SETTINGS) + frames.SETTINGS_ACK)
    http2.out.clear()
    return http2, owner, calls


def answer(http2: Connection) -> None:
    """Do what an application might, with every stream that is open."""
    for stream in list(http2.streams.values()):
        http2.release(stream, stream.held_bytes)
        if not stream.is_local_closed and not stream.has_pending():
            http2.send_data(stream, [b"x" * 5000], 5000, end=stream.is_remote_closed)


def check(http2: Connection) -> None:
    """Check what must hold at any time."""
    assert len(http2.streams) <= LIMITS.max_concurrent_streams
    assert len(http2._unparsed) <= LIMITS.max_header_block_bytes + 9
    assert sum(map(len, http2._block)) <= LIMITS.max_header_block_bytes + LIMITS.max_frame_bytes
    assert sum(stream.held_bytes for stream in http2.streams.values()) <= LIMITS.connection_window_bytes
    assert http2.pending_bytes == sum(stream.pending_bytes for stream in http2.streams.values())
    assert http2.pending_bytes <= 5000 * LIMITS.max_concurrent_streams
    assert 0 <= http2.receive_window + http2.uncredited_bytes <= LIMITS.connection_window_bytes
    for stream_id, stream in http2.streams.items():
        assert stream.id == stream_id
        assert not stream.is_closed
    if http2.is_closed:
        assert not http2.streams


@pytest.mark.parametrize("is_client", [False, True])
@given(data=plausible, cuts=st.lists(st.integers(0, 3000), max_size=10), answers=st.booleans())
@settings(max_examples=250)
def test_no_frames_do_harm(is_client: bool, data: bytes, cuts: list[int], answers: bool) -> None:
    http2, _, _ = begun(is_client=is_client)
    for piece in split(data, cuts):
        http2.receive(piece)
        if answers:
            answer(http2)
        check(http2)
    sent = parse(b"".join(map(bytes, http2.out)))
    if http2.is_closed and http2.close_code:
        assert sent[-1].kind == frames.GOAWAY
        assert ErrorCode(sent[-1].code) == http2.close_code
    assert all(len(s.payload) <= max(http2.peer.max_frame_bytes, 16_384) for s in sent)


@pytest.mark.parametrize("is_client", [False, True])
@given(data=st.binary(max_size=300), has_begun=st.booleans())
@settings(max_examples=150)
def test_no_bytes_do_harm(is_client: bool, data: bytes, has_begun: bool) -> None:
    if has_begun:
        http2, _, _ = begun(is_client=is_client)
    else:
        owner = Recorder()
        http2 = Connection(owner, LIMITS, is_client=is_client)
        owner.http2 = http2
    http2.receive(data)
    check(http2)


@pytest.mark.parametrize("is_client", [False, True])
@given(data=plausible, cuts=st.lists(st.integers(0, 400), min_size=1, max_size=30))
@settings(max_examples=200)
def test_the_outcome_does_not_depend_on_how_the_bytes_were_split(is_client: bool, data: bytes, cuts: list[int]) -> None:
    whole = outcome(data, [], is_client=is_client)

    assert outcome(data, cuts, is_client=is_client) == whole


class AnsweringStream(RecordingStream):
    """Answers when its request is whole, however that came."""

    @override
    def on_end(self) -> None:
        super().on_end()
        if not self.is_local_closed:
            self.http2.release(self, self.held_bytes)
            respond(self.http2, self, self.data)


class Answering(Recorder):
    """Answers requests that come as a whole without a stream, and others with one."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: list[tuple[int, bytes]] = []
        self.whole = 0

    @override
    def accept(self, stream_id: int, block: HeaderBlock, headers: CheckedHeaders) -> Stream:
        assert self.http2 is not None
        stream = self.accepted[stream_id] = AnsweringStream(self.http2, stream_id, headers)
        block.whole_request = self.answer
        return stream

    def answer(self, stream_id: int, data: bytes, begin: int, end: int) -> bool:
        if begin == end:
            return False
        assert self.http2 is not None
        assert stream_id not in self.accepted
        stream = AnsweringStream(self.http2, stream_id)
        self.http2.adopt(stream)
        self.whole += 1
        stream.data = data[begin:end]
        stream.ended = 1
        self.accepted[stream_id] = stream
        respond(self.http2, stream, stream.data)
        return True


def respond(http2: Connection, stream: Stream, data: bytes) -> None:
    http2.send_headers(stream, literal_block(RESPONSE), end=False)
    http2.send_data(stream, [data], len(data), end=False)
    http2.send_headers(stream, literal_block(TRAILERS), end=True)


many_calls = st.builds(
    lambda count, block: (
        b"".join(frame(frames.HEADERS, 4, number, block) for number in range(1, 2 * count, 2))
        + b"".join(frame(frames.DATA, 1, number, b"hello") for number in range(1, 2 * count, 2))
    ),
    st.integers(1, 6),
    st.sampled_from([REMEMBERED, literal_block([*REQUEST, (b"content-length", b"5")]), BLOCKS[3]]),
)


@given(
    data=st.lists(many_calls | any_frame | good_call, max_size=20).map(b"".join),
    cuts=st.lists(st.integers(0, 400), min_size=1, max_size=30),
)
@settings(max_examples=200)
def test_calls_that_come_as_a_whole_end_as_those_that_do_not(data: bytes, cuts: list[int]) -> None:
    whole = outcome(data, [], is_client=False, owner=Answering())
    byte_by_byte = outcome(data, [1] * min(len(data), 3000), is_client=False, owner=Answering())

    assert outcome(data, cuts, is_client=False, owner=Answering()) == whole == byte_by_byte


def test_calls_that_come_as_a_whole_need_no_stream() -> None:
    owner = Answering()
    http2, _, _ = begun(is_client=False, owner=owner)
    calls = b"".join(
        frame(frames.HEADERS, 4, number, REMEMBERED) + frame(frames.DATA, 1, number, b"hello")
        for number in range(1, 20, 2)
    )

    http2.receive(calls)

    assert owner.whole == 9, "all but the first, by which the block becomes known"
    assert [stream.data for stream in owner.accepted.values()] == [b"hello"] * 10


def outcome(data: bytes, cuts: list[int], *, is_client: bool, owner: Recorder | None = None) -> Any:
    http2, owner, calls = begun(is_client=is_client, owner=owner)
    for piece in split(data, cuts):
        http2.receive(piece)
    streams = [*owner.accepted.values(), *calls]
    if http2.is_closed:
        # Calls whose requests had not ended may or may not have had their stream by then.
        streams = [stream for stream in streams if stream.ended]
    return (
        [(s.id, s.trailers and s.trailers.fields, s.ended, s.code) for s in streams],
        [] if isinstance(owner, Answering) else [s.headers and s.headers.fields for s in streams],
        [] if http2.is_closed else [http2.work, http2.closed_streams, http2.uncredited_bytes, http2.receive_window],
        http2.is_closed,
        http2.close_code,
        [] if http2.is_closed else [s.data for s in streams],
        b"".join(map(bytes, http2.out)),
    )


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    pieces = []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    return [*pieces, data]


@given(
    sizes=st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.integers(0, 70_000)), max_size=12),
    seed=st.integers(0, 10**9),
)
@settings(max_examples=50)
def test_everything_that_is_sent_arrives_in_order_whatever_the_windows_do(sizes: Any, seed: int) -> None:
    """A peer with windows of its own, which opens them at random and must never be sent beyond them."""
    chance = random.Random(seed)
    peer = Peer(settings={4: 1000})
    streams = {number: peer.open(number) for number in (1, 3, 5)}
    window = {0: 65_535, 1: 1000, 3: 1000, 5: 1000}
    expected = dict.fromkeys(streams, b"")
    got = dict.fromkeys(streams, b"")
    for number, size in sizes:
        data = chance.randbytes(size)
        expected[number] += data
        peer.http2.send_data(streams[number], [data], size, end=False)

    def receive() -> None:
        for sent in peer.sent():
            assert sent.kind == frames.DATA
            got[sent.stream_id] += sent.payload
            for key in (0, sent.stream_id):
                window[key] -= len(sent.payload)
                assert window[key] >= 0

    receive()
    for _ in range(200):
        key = chance.choice([0, 1, 3, 5])
        window[key] += 4000
        peer.send(frames.window_update(key, 4000))
        receive()
    for key in window:
        window[key] += 1 << 20
        peer.send(frames.window_update(key, 1 << 20))
        receive()

    assert got == expected
    assert peer.http2.pending_bytes == 0
