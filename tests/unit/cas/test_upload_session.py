"""Every rule of ByteStream.Write, message by message."""

from __future__ import annotations

import pytest

from lathe_cas.upload_session import (
    MAX_PENDING_BYTES,
    MAX_PENDING_PIECES,
    UploadSession,
    UploadState,
    max_compressed_bytes,
)
from lathe_shared.cas_wire import WriteRequest
from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.resource_name import format_write, parse_write

DATA = bytes(range(100))
NAME = format_write(Digest.of(DATA), "upload", "main")


def message(offset: int, data: bytes = b"", *, finish: bool = False, name: str = "") -> WriteRequest:
    return WriteRequest(name, offset, finish, memoryview(data))


def begun(committed_bytes: int = 0, offset: int = 0, data: bytes = b"", *, finish: bool = False) -> UploadSession:
    session = UploadSession(parse_write)
    session.receive(message(offset, data, finish=finish, name=NAME))
    session.opened(committed_bytes)
    return session


def taken(session: UploadSession) -> bytes:
    pieces, length = session.take()
    data = b"".join(pieces)
    assert len(data) == length
    return data


def test_a_blob_in_one_message() -> None:
    session = UploadSession(parse_write)
    session.receive(message(0, DATA, finish=True, name=NAME))
    assert session.state is UploadState.OPENING
    assert session.resource.digest == Digest.of(DATA)
    assert (session.resource.instance_name, session.resource.upload_id) == ("main", "upload")
    session.opened(0)
    assert session.is_finished()
    assert session.received_bytes == 100
    assert taken(session) == DATA


def test_a_blob_in_several_messages() -> None:
    session = begun(data=DATA[:10])
    session.receive(message(10, DATA[10:40]))
    session.receive(message(40))
    session.receive(message(40, DATA[40:]))
    assert session.state is UploadState.RECEIVING
    session.receive(message(100, finish=True))
    assert session.is_finished()
    assert taken(session) == DATA
    assert taken(session) == b""


ZSTD_NAME = format_write(Digest.of(DATA), "upload", "main", Compressor.ZSTD)


def compressed(committed_bytes: int = 0, offset: int = 0, data: bytes = b"", *, finish: bool = False) -> UploadSession:
    session = UploadSession(parse_write)
    session.receive(message(offset, data, finish=finish, name=ZSTD_NAME))
    session.opened(committed_bytes)
    return session


@pytest.mark.parametrize("stream", [b"", b"a few", DATA, DATA * 3])
def test_a_compressed_upload_may_have_any_length(stream: bytes) -> None:
    session = compressed(data=stream[:3])
    session.receive(message(len(stream[:3]), stream[3:], finish=True))
    assert session.is_finished()
    assert session.committed_size == len(stream)
    assert taken(session) == stream


def test_a_compressed_upload_in_one_message_is_whole_whatever_its_length() -> None:
    session = UploadSession(parse_write)
    session.receive(message(0, b"a few", finish=True, name=ZSTD_NAME))
    assert session.whole is not None
    assert bytes(session.whole) == b"a few"


def test_a_compressed_upload_is_bounded_all_the_same() -> None:
    session = compressed(data=bytes(max_compressed_bytes(100)))
    with pytest.raises(InvalidArgumentError, match="too many to be 100 compressed"):
        session.receive(message(max_compressed_bytes(100), b"x"))
    assert session.state is UploadState.SPOILT


def test_offsets_of_a_compressed_upload_add_what_was_sent() -> None:
    session = compressed(data=b"abc")
    with pytest.raises(InvalidArgumentError, match="4 where 3 is due"):
        session.receive(message(4, b"d"))
    session.receive(message(3, b"d"))


def test_a_compressed_upload_cannot_go_on_where_nothing_is() -> None:
    with pytest.raises(InvalidArgumentError, match="leaves a gap: 0 bytes are committed"):
        compressed(offset=50, data=b"abc")


def test_the_first_message_must_name_the_resource() -> None:
    session = UploadSession(parse_write)
    with pytest.raises(InvalidArgumentError, match="resource_name"):
        session.receive(message(0, DATA))
    assert session.state is UploadState.AWAITING_FIRST


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="resource_name"):
        UploadSession(parse_write).receive(message(0, DATA, name="blobs/nothing"))


def test_a_stream_without_messages_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="first message"):
        UploadSession(parse_write).end_of_stream()


def test_the_stream_may_end_after_its_first_message() -> None:
    session = begun(data=DATA[:10])
    session.end_of_stream()
    assert not session.is_finished()
    assert session.received_bytes == 10


def test_the_name_may_be_repeated() -> None:
    session = begun(data=DATA[:10])
    session.receive(message(10, DATA[10:], name=NAME, finish=True))
    assert session.is_finished()


def test_the_name_may_not_change() -> None:
    session = begun(data=DATA[:10])
    with pytest.raises(InvalidArgumentError, match="resource_name"):
        session.receive(message(10, DATA[10:], name=format_write(Digest.of(DATA), "other", "main")))
    assert session.state is UploadState.RECEIVING, "what came before is worth keeping"
    assert taken(session) == DATA[:10]


@pytest.mark.parametrize("offset", [0, 9, 11, 100, -1])
def test_each_message_must_begin_where_the_last_one_ended(offset: int) -> None:
    session = begun(data=DATA[:10])
    with pytest.raises(InvalidArgumentError, match="write_offset"):
        session.receive(message(offset, DATA[10:20]))
    assert session.received_bytes == 10
    assert taken(session) == DATA[:10]


@pytest.mark.parametrize("offset", [-1, 101, 1 << 40])
def test_the_first_offset_must_be_within_the_blob(offset: int) -> None:
    with pytest.raises(InvalidArgumentError, match="write_offset"):
        UploadSession(parse_write).receive(message(offset, name=NAME))


@pytest.mark.parametrize(("committed_bytes", "offset"), [(0, 1), (10, 11), (10, 100)])
def test_a_gap_is_refused(committed_bytes: int, offset: int) -> None:
    with pytest.raises(InvalidArgumentError, match=r"write_offset.*gap"):
        begun(committed_bytes, offset, DATA[offset:])


@pytest.mark.parametrize("committed_bytes", [1, 10, 99, 100])
def test_an_upload_goes_on_where_it_stopped(committed_bytes: int) -> None:
    session = begun(committed_bytes, committed_bytes, DATA[committed_bytes:], finish=True)
    assert not session.restarts
    assert session.is_finished()
    assert taken(session) == DATA[committed_bytes:]


@pytest.mark.parametrize("first_bytes", [0, 3, 5, 8, 95])
def test_bytes_that_are_there_already_are_passed_over(first_bytes: int) -> None:
    session = begun(10, 5, DATA[5 : 5 + first_bytes])
    assert session.received_bytes == max(10, 5 + first_bytes)
    session.receive(message(5 + first_bytes, DATA[5 + first_bytes :], finish=True))
    assert session.is_finished()
    assert taken(session) == DATA[10:]


def test_a_stream_from_the_first_byte_begins_anew() -> None:
    session = begun(10, 0, DATA, finish=True)
    assert session.restarts
    assert taken(session) == DATA


@pytest.mark.parametrize("finish", [False, True])
def test_too_many_bytes_spoil_the_upload(finish: bool) -> None:
    session = begun(data=DATA[:10])
    with pytest.raises(InvalidArgumentError, match="data"):
        session.receive(message(10, DATA[10:] + b"x", finish=finish))
    assert session.state is UploadState.SPOILT


def test_too_many_bytes_in_the_first_message_spoil_the_upload() -> None:
    session = UploadSession(parse_write)
    session.receive(message(0, DATA + b"x", name=NAME))
    with pytest.raises(InvalidArgumentError, match="101 bytes are more than the 100"):
        session.opened(0)
    assert session.state is UploadState.SPOILT


def test_finishing_too_early_spoils_the_upload() -> None:
    session = begun(data=DATA[:10])
    with pytest.raises(InvalidArgumentError, match="finish_write"):
        session.receive(message(10, DATA[10:99], finish=True))
    assert session.state is UploadState.SPOILT


def test_nothing_may_follow_the_finish() -> None:
    session = begun(data=DATA, finish=True)
    with pytest.raises(InvalidArgumentError, match="finish_write"):
        session.receive(message(100))
    assert session.is_finished()


def test_all_bytes_without_a_finish_are_not_finished() -> None:
    session = begun(data=DATA)
    session.end_of_stream()
    assert session.state is UploadState.RECEIVING
    assert session.received_bytes == 100


def test_many_tiny_messages_are_joined() -> None:
    data = bytes(10_000)
    session = UploadSession(parse_write)
    session.receive(message(0, name=format_write(Digest.of(data), "upload")))
    session.opened(0)
    for offset in range(MAX_PENDING_PIECES - 1):
        session.receive(message(offset, b"\0"))
        assert not session.has_enough
    session.receive(message(MAX_PENDING_PIECES - 1, b"\0"))
    assert session.has_enough
    pieces, length = session.take()
    assert (len(pieces), length) == (1, MAX_PENDING_PIECES)
    assert bytes(pieces[0]) == bytes(MAX_PENDING_PIECES)
    assert not session.has_enough


def test_large_messages_stay_views() -> None:
    data = bytes(MAX_PENDING_BYTES)
    half = MAX_PENDING_BYTES // 2
    session = UploadSession(parse_write)
    session.receive(message(0, data[:half], name=format_write(Digest.of(data), "upload")))
    session.opened(0)
    second = message(half, data[half:])
    session.receive(second)
    assert session.has_enough
    pieces, length = session.take()
    assert [len(piece) for piece in pieces] == [half, half]
    assert length == MAX_PENDING_BYTES
    assert pieces[1].obj is second.data.obj


def test_the_order_of_calls_is_checked() -> None:
    session = UploadSession(parse_write)
    with pytest.raises(RuntimeError):
        session.opened(0)
    with pytest.raises(RuntimeError):
        str(session.resource)
    session.receive(message(0, name=NAME))
    with pytest.raises(RuntimeError):
        session.receive(message(0))
