"""Cutting bytes into chunks: however they come, the chunks are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe_cas.stores.lmdb_chunks import cut, cut_pieces
from lathe_cas.stores.lmdb_records import CHUNK_BYTES

SIZES = st.one_of(
    st.integers(0, 9),
    st.sampled_from([CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7]),
)


def content(size_bytes: int) -> bytes:
    return (b"0123456789abcdefg" * (size_bytes // 17 + 1))[:size_bytes]


@given(st.lists(SIZES, max_size=6))
def test_pieces_are_cut_as_their_bytes_together_are(sizes: list[int]) -> None:
    data = content(sum(sizes))
    pieces = []
    start = 0
    for size in sizes:
        pieces.append(memoryview(data)[start : start + size])
        start += size

    chunks = cut_pieces(pieces, 7, 3)

    whole = cut(data, 7, 3)
    assert [(bytes(chunk.data), chunk.checksum, chunk.disk_bytes) for chunk in chunks] == [
        (bytes(chunk.data), chunk.checksum, chunk.disk_bytes) for chunk in whole
    ]


@pytest.mark.parametrize(("begin", "copied"), [(0, []), (5, [CHUNK_BYTES, 5])])
def test_only_a_chunk_that_two_pieces_share_is_copied(begin: int, copied: list[int]) -> None:
    pieces = [memoryview(content(begin)), memoryview(content(3 * CHUNK_BYTES))]

    chunks = cut_pieces(pieces, 7, 3)

    views = [chunk.data for chunk in chunks if isinstance(chunk.data, memoryview)]
    assert all(view.obj is pieces[1].obj for view in views)
    assert [len(chunk.data) for chunk in chunks if isinstance(chunk.data, bytes)] == copied
