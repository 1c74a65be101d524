"""Zstd streams from strangers: decoded in bounded pieces, or refused for what is wrong with them."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.cas.zstd_frames import MAX_BLOCK_BYTES, RAW, RLE, block, bomb, header, skippable

from lathe_cas.compression.zstd_decoder import ZstdDecoder, decode_whole
from lathe_cas.compression.zstd_encoder import FRAME_BYTES, ZstdEncoder
from lathe_cas.compression.zstd_framing import MalformedZstdError

MAX_PIECE_BYTES = 9 * MAX_BLOCK_BYTES


def text(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(-(-size_bytes // 2)).hex().encode()[:size_bytes]


def encoded(data: bytes, *, level: int = 3, checksum: bool = False, size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size).compress(data)


def decode(pieces: Iterable[bytes], size_bytes: int) -> bytes:
    decoder = ZstdDecoder(size_bytes)
    decoded = [piece for given in pieces for piece in decoder.decode(given)]
    decoder.finish()
    assert all(len(piece) <= MAX_PIECE_BYTES for piece in decoded)
    return b"".join(decoded)


def refusal(stream: bytes, size_bytes: int) -> str:
    """Return why a stream is refused, which it is whether it comes whole or byte by byte."""
    with pytest.raises(MalformedZstdError, match=r"^data: ") as caught:
        decode([stream], size_bytes)
    reason = str(caught.value)
    with pytest.raises(MalformedZstdError) as caught:
        decode_whole(stream, size_bytes)
    assert str(caught.value) == reason
    with pytest.raises(MalformedZstdError):
        decode([stream[at : at + 1] for at in range(len(stream))], size_bytes)
    return reason


frames = st.lists(
    st.one_of(
        st.builds(
            lambda data, repeat, level, checksum, size: (
                data * repeat,
                encoded(data * repeat, level=level, checksum=checksum, size=size),
            ),
            st.binary(max_size=300),
            st.sampled_from([1, 2, 50, 1000]),
            st.sampled_from([1, 3, 9, 19]),
            st.booleans(),
            st.booleans(),
        ),
        st.builds(lambda data, number: (b"", skippable(data, number)), st.binary(max_size=40), st.integers(0, 15)),
    ),
    max_size=4,
)


@given(frames, st.data())
def test_any_frames_cut_anywhere_are_decoded(made: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    whole = b"".join(content for content, _ in made)
    stream = b"".join(frame for _, frame in made)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(pieces, len(whole)) == whole
    assert decode_whole(stream, len(whole)) == whole
    offset = data.draw(st.integers(0, len(whole)))
    decoder = ZstdDecoder(len(whole), offset)
    rest = b""
    for piece in pieces:
        for decoded in decoder.decode(piece):
            rest += decoded[max(0, offset - (decoder.decoded_bytes - len(decoded))) :]
    decoder.finish()
    assert rest == whole[offset:]


@given(frames, st.data())
def test_a_stream_that_is_cut_off_is_refused(made: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    ends = [0]
    for _, frame in made:
        ends.append(ends[-1] + len(frame))
    stream = b"".join(frame for _, frame in made)
    stop = data.draw(st.integers(0, len(stream)))
    if stop in ends:
        return
    size_bytes = sum(len(content) for content, _ in made)
    decoder = ZstdDecoder(size_bytes)
    for _ in decoder.decode(stream[:stop]):
        pass
    with pytest.raises(MalformedZstdError, match="middle of a frame"):
        decoder.finish()


@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_break_the_decoder(data: bytes, size_bytes: int) -> None:
    for stream in (data, header() + data, encoded(b"abc" * 30)[:-4] + data):
        try:
            whole = decode([stream[:50], stream[50:]], size_bytes)
        except MalformedZstdError:
            with pytest.raises(MalformedZstdError):
                decode_whole(stream, size_bytes)
        else:
            assert decode_whole(stream, size_bytes) == whole


@pytest.mark.parametrize(
    ("size_bytes", "level"), [(0, 3), (1, 3), (300, 19), (65_536, 19), (FRAME_BYTES, 1), (3 * FRAME_BYTES + 7, 1)]
)
def test_what_the_encoder_makes_any_decoder_reads(size_bytes: int, level: int) -> None:
    data = text(size_bytes)
    stream = ZstdEncoder(level).encode(data)
    with zstandard.ZstdDecompressor(max_window_size=8 << 20).stream_reader(stream, read_across_frames=True) as reader:
        assert reader.read() == data
    assert decode([stream], size_bytes) == data


def test_frames_before_the_offset_are_not_decoded() -> None:
    data = text(3 * FRAME_BYTES)
    stream = bytearray(ZstdEncoder().encode(data))
    # A byte of the first frame's last block that the decoder would stumble over.
    second = bytes(stream).index(b"\x28\xb5\x2f\xfd", 4)
    stream[second - 20 : second] = b"\xff" * 20
    decoder = ZstdDecoder(len(data), FRAME_BYTES)
    assert b"".join(decoder.decode(stream)) == data[FRAME_BYTES:]
    decoder.finish()
    with pytest.raises(MalformedZstdError):
        decode([bytes(stream)], len(data))


def test_a_checksum_is_verified() -> None:
    stream = encoded(b"abc" * 100, checksum=True)
    assert decode([stream], 300) == b"abc" * 100
    assert "checksum" in refusal(stream[:-1] + bytes((stream[-1] ^ 1,)), 300)


@pytest.mark.parametrize("size", [True, False])
def test_a_stream_of_another_size_than_the_digest_is_refused(size: bool) -> None:
    stream = encoded(b"abc" * 100, size=size)
    assert "more than the 299 bytes" in refusal(stream, 299)
    assert "to 300 bytes, where the digest has 301" in refusal(stream, 301)
    assert "more than the 300 bytes" in refusal(stream + encoded(b"x"), 300)
    assert "to 0 bytes" in refusal(b"", 300)


def test_what_follows_the_last_frame_has_to_be_a_frame() -> None:
    stream = encoded(b"abc" * 100)
    assert "begins with 67617262" in refusal(stream + b"garbage", 300)
    assert "middle of a frame" in refusal(stream + skippable(b"skipped")[:-1], 300)
    with pytest.raises(MalformedZstdError):
        decode([stream + b"\x28"], 300)


@pytest.mark.parametrize("magic", ["1eb52ffd", "27b52ffd", "37a430ec", "1f8b0800"])
def test_other_formats_are_refused(magic: str) -> None:
    """Older zstd, a dictionary, gzip."""
    assert f"begins with {magic}" in refusal(bytes.fromhex(magic) + b"\0" * 20, 300)


def test_a_frame_that_needs_a_dictionary_is_refused() -> None:
    assert "dictionary" in refusal(header(descriptor=1) + b"\1" + block(RAW, 1, b"x", last=True), 1)


@pytest.mark.parametrize("window_log", [23, 24, 31, 41])
def test_a_window_that_takes_much_memory_is_refused(window_log: int) -> None:
    stream = header(window_log) + block(RAW, 3, b"abc", last=True)
    if window_log == 23:
        assert decode([stream], 3) == b"abc"
    else:
        assert "window" in refusal(stream, 3)


def test_a_frame_whose_content_is_its_window_is_refused_if_it_is_large() -> None:
    single_segment = 0b1110_0000
    stream = b"\x28\xb5\x2f\xfd" + bytes((single_segment,)) + (1 << 40).to_bytes(8, "little")
    with pytest.raises(MalformedZstdError, match="window of 1099511627776 bytes"):
        decode([stream], 1 << 41)


def test_a_header_that_promises_too_much_is_refused_before_anything_is_decoded() -> None:
    decoder = ZstdDecoder(1000)
    with pytest.raises(MalformedZstdError, match="more than the 1000 bytes"):
        list(decoder.decode(header(content_bytes=1 << 40)))
    assert decoder.decoded_bytes == 0


def test_a_block_that_none_is_is_refused() -> None:
    assert "zstd block" in refusal(header() + block(3, 1, b"x", last=True), 1)
    assert "zstd block" in refusal(header(23) + block(RLE, MAX_BLOCK_BYTES + 1, b"x", last=True), MAX_BLOCK_BYTES + 1)


WASTE = {
    "empty frames": encoded(b"") * 6000,
    "frames that are skipped": skippable(b"") * 6000,
    "empty blocks": header() + block(RAW, 0, b"") * 6000 + block(RAW, 100, b"x" * 100, last=True),
    "blocks of a byte": header() + block(RAW, 1, b"x") * 6000 + block(RAW, 0, b"", last=True),
}


@pytest.mark.parametrize("waste", WASTE)
def test_countless_blocks_that_hold_next_to_nothing_are_refused(waste: str) -> None:
    decoder = ZstdDecoder(6000)
    with pytest.raises(MalformedZstdError, match="1024 bytes each on average"):
        list(decoder.decode(WASTE[waste]))
    verified = ZstdDecoder(6000, is_verified=True)
    assert sum(map(len, verified.decode(WASTE[waste]))) == {"blocks of a byte": 6000, "empty blocks": 100}.get(waste, 0)


def test_a_stream_that_was_flushed_often_is_taken() -> None:
    encoder = zstandard.ZstdCompressor().compressobj()
    data = text(20_000 * 1024)
    stream = b"".join(
        encoder.compress(data[at : at + 1024]) + encoder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for at in range(0, len(data), 1024)
    )
    assert decode([stream + encoder.flush()], len(data)) == data


def test_a_bomb_ends_with_the_declared_size() -> None:
    stream = bomb(1 << 16)
    decoder = ZstdDecoder(10 * MAX_BLOCK_BYTES)
    with pytest.raises(MalformedZstdError, match="more than the 1310720 bytes"):
        list(decoder.decode(stream))
    assert decoder.decoded_bytes <= 10 * MAX_BLOCK_BYTES + MAX_PIECE_BYTES
    with pytest.raises(MalformedZstdError, match="more than"):
        decode_whole(stream, 10 * MAX_BLOCK_BYTES)


def test_a_bomb_of_the_declared_size_takes_little_memory() -> None:
    """Of 1 TiB the first 256 MiB, at 64 KiB that were sent."""
    decoder = ZstdDecoder(1 << 40)
    tracemalloc.start()
    try:
        decoded = sum(len(piece) for piece in decoder.decode(header(23) + block(RLE, MAX_BLOCK_BYTES, b"\0") * 2048))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert decoded == 256 << 20
    assert peak_bytes < 4 << 20
