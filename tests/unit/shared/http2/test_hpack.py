"""HPACK against ``hpack``, an implementation that shares no code with the one used here."""

from __future__ import annotations

import hpack
from hypothesis import given
from hypothesis import strategies as st

from lathe_shared.http2.hpack import HeaderDecoder, HeaderEncoder, check_structure, literal_block

names = st.sampled_from([b":path", b"te", b"grpc-timeout", b"x-long-name", b"content-type"])
fields = st.lists(st.tuples(names, st.binary(max_size=200) | st.sampled_from([b"a", b"b"])), max_size=6)


@given(st.lists(fields, max_size=12))
def test_blocks_are_read_as_another_implementation_wrote_them(blocks: list[list[tuple[bytes, bytes]]]) -> None:
    encoder = hpack.Encoder()
    decoder = HeaderDecoder(1 << 20)
    for block in blocks:
        assert decoder.decode(encoder.encode(block)).fields == block
        assert decoder.decode(literal_block(block)).fields == block


@given(st.lists(fields, max_size=12))
def test_another_implementation_reads_our_blocks(blocks: list[list[tuple[bytes, bytes]]]) -> None:
    encoder = HeaderEncoder()
    decoder = hpack.Decoder()
    for number, block in enumerate(blocks):
        if number == 6:
            encoder.limit_table(100)
        for _ in range(2):
            assert [(f[0], f[1]) for f in decoder.decode(encoder.encode(tuple(block)), raw=True)] == block
        assert [(f[0], f[1]) for f in decoder.decode(literal_block(block), raw=True)] == block


@given(st.binary(max_size=30))
def test_any_bytes_are_read_or_refused_as_malformed(block: bytes) -> None:
    from lathe_shared.http2.errors import ConnectionFaultError

    for check in (check_structure, HeaderDecoder(1000).decode):
        try:
            check(block)
        except ConnectionFaultError:
            continue


def test_equal_blocks_are_decoded_once_until_the_table_changes() -> None:
    encoder = hpack.Encoder()
    decoder = HeaderDecoder(1000)
    encoder.encode([(b"a", b"1")])
    decoder.decode(b"\x40\x01a\x011")
    indexed = encoder.encode([(b"a", b"1")])
    first = decoder.decode(indexed)
    assert decoder.decode(indexed) is first

    decoder.decode(b"\x40\x01b\x012")

    again = decoder.decode(indexed)
    assert again is not first
    assert again.fields == [(b"b", b"2")]


def test_what_is_remembered_is_bounded() -> None:
    decoder = HeaderDecoder(10_000)
    encoder = HeaderEncoder()
    for number in range(1000):
        decoder.decode(literal_block([(b"x", str(number).encode())]))
        encoder.encode(((b"grpc-timeout", str(number).encode()),))
    decoder.decode(literal_block([(b"x", b"y" * 5000)]))

    assert len(decoder.remembered) <= 128
    assert len(encoder._remembered) <= 128
    assert all(len(block) <= 256 for block in decoder.remembered)


def test_changing_values_do_not_fill_the_table() -> None:
    encoder = HeaderEncoder()
    constant = (b"user-agent", b"lathe")
    encoder.encode((constant,))
    for number in range(1000):
        encoder.encode((constant, (b"grpc-timeout", f"{number}m".encode())))

    assert len(encoder.encode((constant,))) == 1
