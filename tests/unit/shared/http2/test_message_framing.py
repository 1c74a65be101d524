"""gRPC's length-prefixed messages: reassembled from any pieces, bounded, decompressed."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe_shared.http2.message_framing import (
    InvalidMessageError,
    MessageError,
    MessageReader,
    MessageTooLargeError,
    UnsupportedEncodingError,
    decompress,
)


def framed(data: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(data).to_bytes(4, "big") + data


def read_all(reader: MessageReader) -> list[bytes]:
    messages = []
    while (message := reader.next()) is not None:
        messages.append(message)
    return messages


@given(
    messages=st.lists(st.binary(max_size=5000), max_size=8),
    cuts=st.lists(st.integers(1, 3000), max_size=40),
    as_views=st.booleans(),
    eager=st.booleans(),
)
def test_messages_are_whole_again_however_they_were_cut(
    messages: list[bytes], cuts: list[int], as_views: bool, eager: bool
) -> None:
    data = b"".join(map(framed, messages))
    reader = MessageReader(5000)
    got = []
    for cut in [*cuts, len(data)]:
        piece, data = data[:cut], data[cut:]
        if piece:
            reader.add(memoryview(piece) if as_views else piece)
        if eager:
            got += read_all(reader)
    got += read_all(reader)

    assert got == messages
    assert all(type(message) is bytes for message in got)
    assert reader.size_bytes == 0
    assert not reader.is_inside_message


def test_a_message_that_came_in_one_piece_is_cut_out_once() -> None:
    reader = MessageReader(100)
    reader.add(framed(b"one") + framed(b"two") + b"\0")

    assert read_all(reader) == [b"one", b"two"]
    assert reader.is_inside_message
    assert reader.take(10) == b"\0"


def test_bytes_one_by_one_are_collected_in_few_pieces() -> None:
    reader = MessageReader(1 << 20)
    for byte in framed(b"x" * 100_000):
        reader.add(bytes([byte]))

    assert len(reader._parts) < 100
    assert reader.next() == b"x" * 100_000


def test_a_length_above_the_limit_is_refused_before_the_bytes_come() -> None:
    reader = MessageReader(1000)
    reader.add(framed(b"x" * 1001)[:5])

    assert reader.is_too_large
    with pytest.raises(MessageTooLargeError, match="a message of 1001 bytes is larger than the 1000 bytes accepted"):
        reader.next()


def test_clearing_forgets_a_message_under_way() -> None:
    reader = MessageReader(1000)
    reader.add(framed(b"abc")[:6])
    assert not reader.has_message
    reader.clear()

    assert not reader.is_inside_message
    reader.add(framed(b"new"))
    assert reader.next() == b"new"


def test_gzip_is_decompressed() -> None:
    reader = MessageReader(100_000)
    reader.encoding = "gzip"
    reader.add(framed(gzip.compress(b"x" * 50_000), 1) + framed(b"plain"))

    assert read_all(reader) == [b"x" * 50_000, b"plain"]


@pytest.mark.parametrize(
    ("data", "flag", "encoding", "error"),
    [
        (gzip.compress(b"x"), 2, "gzip", InvalidMessageError),
        (gzip.compress(b"x"), 1, "", InvalidMessageError),
        (gzip.compress(b"x"), 1, "identity", InvalidMessageError),
        (gzip.compress(b"x"), 1, "deflate", UnsupportedEncodingError),
        (b"no gzip", 1, "gzip", InvalidMessageError),
        (b"", 1, "gzip", InvalidMessageError),
        (gzip.compress(b"x" * 100)[:-1], 1, "gzip", InvalidMessageError),
        (gzip.compress(b"x") + b"behind", 1, "gzip", InvalidMessageError),
        (gzip.compress(b"x" * 1001), 1, "gzip", MessageTooLargeError),
    ],
)
def test_what_cannot_be_decompressed_is_refused(
    data: bytes, flag: int, encoding: str, error: type[MessageError]
) -> None:
    with pytest.raises(error):
        decompress(data, flag, encoding, 1000)


def test_a_bomb_takes_no_more_memory_than_the_limit() -> None:
    bomb = gzip.compress(b"\0" * (64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(MessageTooLargeError):
            decompress(bomb, 1, "gzip", 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
