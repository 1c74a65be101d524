"""What every blob store does: putting, finding, reading, removing."""

from __future__ import annotations

import asyncio

import pytest
from tests.contract.cas.blob_making import blob, content, missing, put, read, upload_name
from tests.contract.cas.conftest import Stores
from tests.contract.cas.lmdb_store import LmdbStore

from lathe_cas.blob_store import BlobStore, UploadStatus
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import BlobNotFoundError, DigestMismatchError, OutOfRangeError

CHUNK = 65_520
SIZES = [1, 100, 2_009, 2_010, 2_011, 4_080, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 20 * CHUNK + 7]
"""Both sides of each border: leaf and overflow page, one chunk and two, on the event loop and in a thread."""


@pytest.mark.parametrize("size_bytes", SIZES)
async def test_what_was_put_is_found_and_read(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    assert missing(blobs, digest) == [digest]
    assert await blobs.put_many([(digest, memoryview(data))]) == [None]
    assert missing(blobs, digest) == []
    assert await blobs.read_many([digest]) == [data]
    assert await read(blobs, digest) == data


async def test_a_blob_survives_closing(stores: Stores) -> None:
    small, large = await put(stores.blobs, content(10), content(300_000))
    await stores.reopen()
    assert missing(stores.blobs, small, large) == []
    assert await stores.blobs.read_many([large, small]) == [content(300_000), content(10)]


RANGES = [
    (0, 0), (0, 1), (1, 0), (5, 10), (CHUNK - 1, 2), (CHUNK, 0), (CHUNK, CHUNK), (CHUNK + 3, 17 * CHUNK),
    (16 * CHUNK - 1, 2), (16 * CHUNK, 1), (20 * CHUNK + 6, 1), (20 * CHUNK + 6, 1000), (20 * CHUNK + 7, 0),
    (3, 20 * CHUNK + 4), (3, 20 * CHUNK + 3), (CHUNK // 2, CHUNK // 4), (0, 1 << 62),
]  # fmt: skip


async def test_a_range_is_the_same_as_a_slice(blobs: BlobStore) -> None:
    digest, data = blob(20 * CHUNK + 7)
    await put(blobs, data)
    for offset_bytes, limit_bytes in RANGES:
        expected = data[offset_bytes : offset_bytes + limit_bytes if limit_bytes else len(data)]
        assert await read(blobs, digest, offset_bytes, limit_bytes) == expected, (offset_bytes, limit_bytes)
        assert blobs.read_at_once(digest, offset_bytes, limit_bytes) in (expected, None)


@pytest.mark.parametrize("size_bytes", [0, 100, 200_000])
async def test_a_range_past_the_end_is_out_of_range(blobs: BlobStore, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    await put(blobs, data)
    assert await read(blobs, digest, size_bytes) == b""
    with pytest.raises(OutOfRangeError):
        await read(blobs, digest, size_bytes + 1)


async def test_a_blob_that_is_not_there_is_not_read(blobs: BlobStore) -> None:
    here, there = content(100, 1), Digest.of(content(100, 2))
    await put(blobs, here)
    with pytest.raises(BlobNotFoundError):
        await read(blobs, there)
    with pytest.raises(BlobNotFoundError):
        await read(blobs, there, 1000)
    assert await blobs.read_many([there, Digest.of(here), there]) == [None, here, None]


async def test_what_is_read_at_once_is_small(lmdb: LmdbStore) -> None:
    blobs = lmdb.blobs
    small, large = await put(blobs, content(2 * CHUNK), content(2 * CHUNK + 1))
    assert blobs.read_at_once(small) == content(2 * CHUNK)
    assert blobs.read_at_once(Digest.of(b"")) == b""
    assert blobs.read_at_once(large) is None
    assert blobs.read_at_once(large, 1, 100) == content(2 * CHUNK + 1)[1:101]
    with pytest.raises(BlobNotFoundError):
        blobs.read_at_once(Digest.of(b"absent"))
    with pytest.raises(OutOfRangeError):
        blobs.read_at_once(small, small.size_bytes + 1)


async def test_a_read_that_is_left_early_harms_nobody(blobs: BlobStore) -> None:
    digest, data = blob(40 * CHUNK)
    await put(blobs, data)
    pieces = blobs.read(digest)
    first = await anext(pieces)
    assert data.startswith(first)
    await pieces.aclose()  # type: ignore[attr-defined]  # an async generator, as the servicers close it
    assert await read(blobs, digest) == data


async def test_each_blob_of_a_batch_has_an_outcome_of_its_own(blobs: BlobStore) -> None:
    good, better = content(10, 1), content(200_000, 2)
    claimed = Digest.of(content(10, 3))
    outcomes = await blobs.put_many(
        [
            (Digest.of(good), memoryview(good)),
            (claimed, memoryview(content(10, 4))),
            (Digest.of(b""), memoryview(b"")),
            (Digest.of(better), memoryview(better)),
            (Digest.of(good), memoryview(good)),
        ]
    )
    assert [type(outcome) for outcome in outcomes] == [
        type(None), DigestMismatchError, type(None), type(None), type(None)
    ]  # fmt: skip
    assert missing(blobs, Digest.of(good), claimed, Digest.of(better)) == [claimed]
    assert await blobs.read_many([claimed, Digest.of(better)]) == [None, better]


async def test_a_batch_without_a_good_blob_stores_nothing(blobs: BlobStore) -> None:
    digest, data = blob(10)
    outcomes = await blobs.put_many(
        [(digest, memoryview(data + b"x")), (Digest.of(b"", digest.function), memoryview(b"y"))]
    )
    assert [type(outcome) for outcome in outcomes] == [DigestMismatchError, DigestMismatchError]
    assert blobs.status().blobs == 0
    assert await blobs.put_many([]) == []


async def test_the_same_hash_with_another_size_is_another_blob(blobs: BlobStore) -> None:
    digest, data = blob(100)
    await put(blobs, data)
    other = Digest(digest.hash, 101)
    assert missing(blobs, digest, other) == [other]
    assert await blobs.read_many([other]) == [None]
    with pytest.raises(BlobNotFoundError):
        await read(blobs, other)
    assert await blobs.remove([other]) == 0
    (outcome,) = await blobs.put_many([(other, memoryview(data))])
    assert isinstance(outcome, DigestMismatchError)
    assert await blobs.upload_status(upload_name(other)) == UploadStatus(0, False)
    assert await blobs.read_many([digest]) == [data]


@pytest.mark.parametrize("function", list(DigestFunction))
async def test_the_empty_blob_is_always_there(blobs: BlobStore, function: DigestFunction) -> None:
    empty = Digest.of(b"", function)
    assert missing(blobs, empty) == []
    assert await blobs.read_many([empty]) == [b""]
    assert await read(blobs, empty) == b""
    assert await blobs.upload_status(upload_name(empty)) == UploadStatus(0, True)
    assert await blobs.put_many([(empty, memoryview(b""))]) == [None]
    assert await blobs.remove([empty]) == 0
    assert missing(blobs, empty) == []
    assert blobs.status().blobs == 0
    with_a_size = Digest(empty.hash, 5, function)
    assert missing(blobs, with_a_size) == [with_a_size]
    of_another_hash = Digest(Digest.of(b"x", function).hash, 0, function)
    assert missing(blobs, of_another_hash) == [of_another_hash]
    assert await blobs.read_many([of_another_hash]) == [None]


@pytest.mark.parametrize("function", list(DigestFunction))
async def test_every_digest_function_has_its_own_blobs(blobs: BlobStore, function: DigestFunction) -> None:
    data = content(1000)
    digests = [Digest.of(data, each) for each in DigestFunction]
    mine = Digest.of(data, function)
    assert await blobs.put_many([(mine, memoryview(data))]) == [None]
    assert missing(blobs, *digests) == [digest for digest in digests if digest != mine]
    assert await read(blobs, mine) == data


async def test_missing_blobs_are_told_in_order_by_the_callers_tokens(blobs: BlobStore) -> None:
    digests = [Digest.of(content(10, seed)) for seed in range(20)]
    await put(blobs, *(content(10, seed) for seed in range(0, 20, 3)))
    tokens = blobs.find_missing([(str(number), digest.key, 10) for number, digest in enumerate(digests)])
    assert tokens == [str(number) for number in range(20) if number % 3]
    assert blobs.find_missing([]) == []


async def test_sizes_are_told_by_the_hash_alone(blobs: BlobStore) -> None:
    digests = await put(blobs, *(content(size_bytes) for size_bytes in (1, 70_000)))
    empty, absent = Digest.of(b""), Digest.of(b"absent")
    other_function = Digest.of(content(1), DigestFunction.SHA1)
    keys = [digest.key for digest in (absent, *digests, empty, other_function, digests[0])]
    assert blobs.find_sizes(keys) == [None, 1, 70_000, 0, None, 1]
    assert blobs.find_sizes([]) == []


async def test_a_removed_blob_is_gone_until_it_is_put_again(blobs: BlobStore) -> None:
    small, large, kept = await put(blobs, content(10, 1), content(100 * CHUNK, 2), content(10, 3))
    assert await blobs.remove([small, large, small, Digest.of(b"never there")]) == 2
    assert missing(blobs, small, large, kept) == [small, large]
    assert await blobs.read_many([small, large, kept]) == [None, None, content(10, 3)]
    await put(blobs, content(100 * CHUNK, 2))
    assert await read(blobs, large) == content(100 * CHUNK, 2)


async def test_writers_of_the_same_blob_all_succeed(blobs: BlobStore) -> None:
    digest, data = blob(300_000)
    outcomes = await asyncio.gather(*(blobs.put_many([(digest, memoryview(data))]) for _ in range(20)))
    assert outcomes == [[None]] * 20
    assert blobs.status().blobs == 1
    assert await read(blobs, digest) == data


async def test_writers_and_readers_of_many_blobs_at_once(blobs: BlobStore) -> None:
    async def write_and_read(seed: int) -> None:
        data = content(1_000 + 50_000 * (seed % 5), seed % 17)
        (digest,) = await put(blobs, data)
        assert missing(blobs, digest) == []
        assert await read(blobs, digest) == data

    await asyncio.gather(*(write_and_read(seed) for seed in range(100)))


async def test_the_status_counts_blobs(blobs: BlobStore) -> None:
    await put(blobs, content(10), content(100_000), content(10))
    status = blobs.status()
    assert status.blobs == 2
    assert status.blob_bytes == 100_010
    assert status.stored_bytes >= 50_000
    assert status.staged_bytes == 0
