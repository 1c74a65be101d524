"""Records come back as they were, and the arithmetic of pages agrees with the pages that LMDB takes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.cas.lmdb_store import MAP_BYTES

from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import cut, delete_chunks, put_chunks, read_chunks
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InternalError

CHUNK = 65_520
PAGE = 4_096

u8 = st.integers(0, 2**8 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


class Shape(NamedTuple):
    record: Any
    fields: tuple[st.SearchStrategy[int], ...]
    length: int


SHAPES = {
    "blob": Shape(records.BlobRecord, (u64, u32, u64, u64, u64, u32, u8, u8), 42),
    "upload": Shape(records.UploadRecord, (u64, u64, u64, u32, u64, u64, u64, u8), 53),
    "action_result": Shape(records.ActionResultRecord, (u32, u64, u64, u64, u32, u32, u8), 37),
    "garbage": Shape(records.GarbageRecord, (u32, u64), 12),
    "totals": Shape(records.Totals, (u64,) * 10, 80),
}


@pytest.mark.parametrize("name", SHAPES)
@given(data=st.data())
def test_records_come_back_as_they_were(name: str, data: st.DataObject) -> None:
    shape = SHAPES[name]
    record = shape.record(*data.draw(st.tuples(*shape.fields)))
    packed = record.pack()
    assert len(packed) == shape.length, "lengths are part of the format"
    assert shape.record.unpack(packed) == record


@pytest.mark.parametrize("name", SHAPES.keys() - {"totals"})
def test_records_of_another_length_are_read_as_far_as_they_go(name: str) -> None:
    shape = SHAPES[name]
    ones = shape.record(*[1] * len(shape.fields))
    assert shape.record.unpack(ones.pack() + b"more") == ones
    assert list(shape.record.unpack(ones.pack()[:-1])) == [*ones[:-1], 0]


def test_totals_of_another_length_are_refused() -> None:
    with pytest.raises(struct.error):
        records.Totals.unpack(bytes(81))


def test_a_total_that_a_damaged_record_would_take_below_zero_is_zero() -> None:
    assert records.Totals.unpack(records.Totals(blobs=-1, blob_bytes=5).pack()) == records.Totals(blob_bytes=5)


@given(size=u64, step=u32, later=u32)
def test_look_ups_compare_slices(size: int, step: int, later: int) -> None:
    value = records.BlobRecord(size, step, 1, size, 1, 1).pack()
    assert value[records.BLOB_SIZE] == records.SIZE.pack(size)
    assert (value[records.BLOB_STEP] < records.STEP.pack(later)) == (step < later)
    result = records.ActionResultRecord(step, 1, 2, 3, 4, 5).pack()
    assert result[records.ACTION_RESULT_STEP] == records.STEP.pack(step)


@given(st.tuples(u64, u32), st.tuples(u64, u32))
def test_the_order_of_keys_is_the_order_of_numbers(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (records.CHUNK_PREFIX.pack(*one) < records.CHUNK_PREFIX.pack(*other)) == (one < other)
    assert records.CHUNK_KEY.pack(*one, b"checksum").startswith(records.CHUNK_PREFIX.pack(*one))


@pytest.mark.parametrize("function", list(DigestFunction))
def test_keys_fit_into_lmdb_and_tell_everything_apart(function: DigestFunction) -> None:
    key = Digest.of(b"blob", function).key
    keys = {
        records.upload_key("main", "upload", key, 4),
        records.upload_key("main", "upload", key, 5),
        records.upload_key("main", "other", key, 4),
        records.upload_key("other", "upload", key, 4),
        records.upload_key("", "mainupload", key, 4),
        records.upload_key("main" * 1000, "upload" * 1000, key, 4),
        records.action_result_key("main", key),
        records.action_result_key("", key),
    }
    assert len(keys) == 8
    assert max(map(len, keys)) <= 511, "LMDB's largest key"
    assert records.action_result_key("main", key)[records.ACTION_RESULT_DIGEST_KEY] == key


def test_totals_add_up() -> None:
    totals = records.Totals(stored_bytes=100, staged_bytes=20, garbage_bytes=3, action_result_bytes=4_000)
    assert totals.kept_bytes == 4_120
    assert totals.used_bytes == 4_123


@pytest.mark.parametrize(
    ("size_bytes", "chunks"),
    [(0, 0), (1, 1), (CHUNK - 1, 1), (CHUNK, 1), (CHUNK + 1, 2), (2 * CHUNK, 2), (10**9, 15_263)],
)
def test_chunks_are_counted(size_bytes: int, chunks: int) -> None:
    assert records.chunk_count(size_bytes) == chunks


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2_011])
def test_a_cut_blob_is_as_large_as_its_chunks(size_bytes: int) -> None:
    data = bytes(size_bytes)
    chunks = cut(data, 7)
    assert len(chunks) == records.chunk_count(size_bytes)
    assert sum(chunk.disk_bytes for chunk in chunks) == records.blob_disk_bytes(size_bytes)
    assert b"".join(bytes(chunk.data) for chunk in chunks) == data


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    environment = LmdbEnvironment(tmp_path, MAP_BYTES)
    yield environment
    environment.close()


def pages(environment: LmdbEnvironment) -> tuple[int, int]:
    """Return how many leaf and how many overflow pages the chunks take."""
    with environment.read() as txn:
        stat = txn.stat(environment.chunks)
    return stat["leaf_pages"], stat["overflow_pages"]


def put_many(environment: LmdbEnvironment, size_bytes: int, count: int) -> int:
    """Put chunks of one size and return the bytes that they should take."""
    chunks = cut(bytes(size_bytes), 7)
    with environment.env.begin(write=True) as txn:
        for storage_id in range(1, count + 1):
            put_chunks(txn, environment.chunks, storage_id, 0, chunks, newest=True)
    return count * records.blob_disk_bytes(size_bytes)


@pytest.mark.parametrize("length", [2_011, 4_080, 4_081, 8_176, 8_177, 65_519, CHUNK])
def test_overflow_pages_are_what_lmdb_takes(environment: LmdbEnvironment, length: int) -> None:
    expected_bytes = put_many(environment, length, 100)
    leaf_pages, overflow_pages = pages(environment)
    node_bytes = expected_bytes - overflow_pages * PAGE
    assert 0 < node_bytes < PAGE * leaf_pages, "what is left are the nodes in the leaves"
    assert overflow_pages == 100 * -(-(length + 16) // PAGE)


@pytest.mark.parametrize("length", [1, 100, 1_000, 2_009, 2_010])
def test_small_chunks_take_no_overflow_pages(environment: LmdbEnvironment, length: int) -> None:
    """They share leaves; when two large nodes leave no room for a third, up to a third of a page is lost."""
    expected_bytes = put_many(environment, length, 500)
    leaf_pages, overflow_pages = pages(environment)
    assert overflow_pages == 0
    assert 0.64 < expected_bytes / (leaf_pages * PAGE) <= 1.0


def test_a_full_chunk_fills_its_pages(environment: LmdbEnvironment) -> None:
    put_many(environment, CHUNK, 10)
    assert pages(environment)[1] == 160
    assert records.chunk_disk_bytes(CHUNK + 1) == records.chunk_disk_bytes(CHUNK) + PAGE


def test_a_chunk_that_cannot_be_appended_is_an_error(environment: LmdbEnvironment) -> None:
    with environment.env.begin(write=True) as txn:
        put_chunks(txn, environment.chunks, 2, 0, cut(b"second", 7), newest=True)
        with pytest.raises(InternalError):
            put_chunks(txn, environment.chunks, 1, 0, cut(b"first", 7), newest=True)
        put_chunks(txn, environment.chunks, 1, 0, cut(b"first", 7), newest=False)
        assert read_chunks(txn, environment.chunks, 1, 7, 0, 1) == [b"first"]


@pytest.mark.parametrize("function", list(DigestFunction))
@pytest.mark.parametrize("compression", [0, 1])
def test_an_uploads_key_tells_its_blobs(function: DigestFunction, compression: int) -> None:
    key = Digest.of(b"x", function).key
    assert records.upload_blob_key(records.upload_key("main", "upload", key, 1, compression)) == key


def test_deleted_chunks_give_their_pages_back(environment: LmdbEnvironment) -> None:
    data = bytes(5 * CHUNK)
    with environment.env.begin(write=True) as txn:
        for storage_id in (1, 2, 3):
            put_chunks(txn, environment.chunks, storage_id, 0, cut(data, 7), newest=True)
        assert delete_chunks(txn, environment.chunks, 2, 0, 3) == 3
        assert delete_chunks(txn, environment.chunks, 2, 3, 100) == 2
        assert delete_chunks(txn, environment.chunks, 2, 0, 100) == 0
        assert delete_chunks(txn, environment.chunks, 3, 4, 100) == 1
        assert delete_chunks(txn, environment.chunks, 99, 0, 100) == 0
        assert read_chunks(txn, environment.chunks, 1, 7, 0, 5) == [bytes(CHUNK)] * 5
        assert read_chunks(txn, environment.chunks, 3, 7, 0, 4) == [bytes(CHUNK)] * 4
        assert read_chunks(txn, environment.chunks, 3, 7, 2, 1) == [bytes(CHUNK)]
    assert pages(environment)[1] == 9 * 16


@pytest.mark.parametrize("count", [1_000, 10_000])
def test_the_overhead_of_an_entry_is_enough(environment: LmdbEnvironment, count: int) -> None:
    """Keys come in random order, so pages of the index are two thirds full."""
    with environment.env.begin(write=True) as txn:
        for number in range(count):
            record = records.BlobRecord(number, 1, number, number, number, 1)
            txn.put(Digest.of(str(number).encode()).key, record.pack(), db=environment.blobs)
    with environment.read() as txn:
        stat = txn.stat(environment.blobs)
    log_entry_bytes = 34 * 1.5
    assert stat["leaf_pages"] * PAGE / count + log_entry_bytes <= records.INDEX_OVERHEAD_BYTES
