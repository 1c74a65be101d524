"""SplitBlob and SpliceBlob over every store: chunks are blobs, layouts are remembered as long as they are true."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tests.contract.cas.blob_making import blob, content, missing, put, read
from tests.contract.cas.conftest import Stores
from tests.contract.cas.lmdb_store import STEP_SECONDS, LmdbStore

from lathe_cas import blob_chunking
from lathe_cas.blob_chunking import BlobChunking
from lathe_cas.cas_metrics import CasCounters
from lathe_cas.fast_cdc import FastCdcCutter, FastCdcParameters
from lathe_protos import reapi
from lathe_shared.digest import EMPTY_DIGEST, Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from lathe_shared.instance_name import InstanceNames

PARAMETERS = FastCdcParameters(1 << 10)
FAST_CDC = reapi.ChunkingFunctionValue.FAST_CDC_2020
UNKNOWN = reapi.ChunkingFunctionValue.UNKNOWN


class Chunking:
    """Chunking over a store's parts; made anew after a restart."""

    def __init__(self, stores: Stores | LmdbStore, parameters: FastCdcParameters = PARAMETERS) -> None:
        self.counters = CasCounters()
        self.chunking = BlobChunking(stores.blobs, stores.results, parameters, self.counters)

    async def split(self, digest: Digest, *, any_layout: bool = False) -> tuple[list[Digest], int]:
        answer = await self.chunking.split(digest, any_layout=any_layout)
        response = reapi.SplitBlobResponse().parse(answer)
        chunks = [Digest.from_message(chunk, digest.function) for chunk in response.chunk_digests]
        return chunks, response.chunking_function

    async def splice(self, digest: Digest, chunks: list[Digest], *, by_fast_cdc: bool = False) -> None:
        await self.chunking.splice(digest, chunks, by_fast_cdc=by_fast_cdc)


@pytest.fixture
def chunking(stores: Stores) -> Chunking:
    return Chunking(stores)


def fast_cdc_chunks(data: bytes) -> list[bytes]:
    cutter = FastCdcCutter(PARAMETERS)
    return [bytes(chunk) for chunk in cutter.feed(data) + cutter.finish()]


def parts(data: bytes, part_bytes: int) -> list[bytes]:
    return [data[start : start + part_bytes] for start in range(0, len(data), part_bytes)]


# Where the cuts are does not depend on the store; how the chunks are written does on whether they fit one transaction.
@pytest.mark.parametrize(
    ("stores", "size_bytes"),
    [
        *(("memory", size) for size in (0, 1, 256, 5_000, 3_000_000)),
        *((store, 5_000) for store in ("lmdb", "lmdb, compressing", "sharded")),
        ("lmdb", 3_000_000),
    ],
    indirect=["stores"],
)
async def test_split_makes_the_chunks_of_fast_cdc(stores: Stores, chunking: Chunking, size_bytes: int) -> None:
    digest, data = blob(size_bytes)
    await put(stores.blobs, data)

    chunks, function = await chunking.split(digest)

    assert chunks == [Digest.of(chunk) for chunk in fast_cdc_chunks(data)]
    assert function == FAST_CDC
    assert b"".join([await read(stores.blobs, chunk) for chunk in chunks]) == data


async def test_split_keeps_to_the_digest_function(stores: Stores, chunking: Chunking) -> None:
    data = content(5_000)
    digest = Digest.of(data, DigestFunction.SHA1)
    await stores.blobs.put_many([(digest, memoryview(data))])

    chunks, _ = await chunking.split(digest)

    assert chunks == [Digest.of(chunk, DigestFunction.SHA1) for chunk in fast_cdc_chunks(data)]
    assert missing(stores.blobs, *chunks) == []


async def test_a_layout_is_remembered_over_a_restart(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(50_000)
    await put(stores.blobs, data)
    first = await chunking.split(digest)
    assert chunking.counters.split_blobs == 1

    await stores.reopen()
    again = Chunking(stores)

    assert await again.split(digest) == first
    assert again.counters.split_blobs == 0


async def test_a_layout_by_other_parameters_is_not_used(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(50_000)
    await put(stores.blobs, data)
    chunks, _ = await chunking.split(digest)

    others, _ = await Chunking(stores, FastCdcParameters(1 << 12)).split(digest)

    assert len(others) < len(chunks)


async def test_a_layout_that_lost_a_chunk_is_made_again(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(50_000)
    await put(stores.blobs, data)
    chunks, _ = await chunking.split(digest)
    await stores.blobs.remove([chunks[3]])

    assert (await chunking.split(digest))[0] == chunks

    assert missing(stores.blobs, *chunks) == []
    assert chunking.counters.split_blobs == 2


async def test_a_blob_that_is_gone_is_not_split_though_its_chunks_are_there(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(50_000)
    await put(stores.blobs, data)
    await chunking.split(digest)
    await stores.blobs.remove([digest])

    with pytest.raises(NotFoundError, match=digest.hash):
        await chunking.split(digest)


async def test_many_who_ask_at_once_share_the_work(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(300_000)
    await put(stores.blobs, data)

    answers = await asyncio.gather(*(chunking.split(digest) for _ in range(10)))

    assert answers == [answers[0]] * 10
    assert chunking.counters.split_blobs == 1


async def test_work_goes_on_when_nobody_waits_for_it_any_more(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(300_000)
    await put(stores.blobs, data)
    asking = asyncio.create_task(chunking.split(digest))
    await asyncio.sleep(0)

    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await chunking.chunking._work.settle()

    assert chunking.counters.split_blobs == 1


async def test_closing_ends_the_work(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(300_000)
    await put(stores.blobs, data)
    asking = asyncio.create_task(chunking.split(digest))
    await asyncio.sleep(0)

    await chunking.chunking.aclose()

    with pytest.raises(asyncio.CancelledError):
        await asking
    assert chunking.counters.split_blobs == 0


# The second one is within the average, and has more chunks than that all the same.
@pytest.mark.parametrize(("size_bytes", "seed", "max_chunks"), [(50_000, 0, 10), (2_000, 8, 2)])
async def test_a_blob_of_too_many_chunks_is_left_whole(
    stores: Stores, chunking: Chunking, monkeypatch: pytest.MonkeyPatch, size_bytes: int, seed: int, max_chunks: int
) -> None:
    monkeypatch.setattr(blob_chunking, "MAX_CHUNKS", max_chunks)
    digest, data = blob(size_bytes, seed)
    await put(stores.blobs, data)
    assert len(fast_cdc_chunks(data)) > max_chunks

    with pytest.raises(NotFoundError, match=f"more than {max_chunks} chunks"):
        await chunking.split(digest)

    assert stores.blobs.status().blobs == 1


async def test_splice_makes_a_blob_and_remembers_its_chunks(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(3_000_000)
    chunks = await put(stores.blobs, *parts(data, 400_000))

    await chunking.splice(digest, chunks)

    assert await read(stores.blobs, digest) == data
    assert stores.blobs.status().staged_bytes == 0
    await stores.reopen()
    again = Chunking(stores)
    assert await again.split(digest, any_layout=True) == (chunks, UNKNOWN)
    assert again.counters.split_blobs == 0
    # Who wants FastCDC gets it all the same.
    assert await again.split(digest) == ([Digest.of(chunk) for chunk in fast_cdc_chunks(data)], FAST_CDC)


async def test_splice_with_chunks_of_all_sizes_even_none(stores: Stores, chunking: Chunking) -> None:
    sizes = [0, 5 << 20, 1, 0, 3 << 20, 2 << 20, *[10] * 1_200]
    pieces = [content(size, seed) for seed, size in enumerate(sizes)]
    data = b"".join(pieces)
    chunks = await put(stores.blobs, *pieces)

    await chunking.splice(Digest.of(data), chunks)

    assert await read(stores.blobs, Digest.of(data)) == data


async def test_fast_cdc_chunks_that_a_client_made_are_used_for_its_blob(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(50_000)
    chunks = await put(stores.blobs, *fast_cdc_chunks(data))

    await chunking.splice(digest, chunks, by_fast_cdc=True)

    assert await chunking.split(digest) == (chunks, FAST_CDC)
    assert chunking.counters.split_blobs == 0


async def test_chunks_that_only_claim_to_be_by_fast_cdc_are_no_layout_by_it(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(50_000)
    chunks = await put(stores.blobs, *parts(data, 1_000))

    await chunking.splice(digest, chunks, by_fast_cdc=True)

    assert await chunking.split(digest, any_layout=True) == (chunks, UNKNOWN)
    assert (await chunking.split(digest))[0] == [Digest.of(chunk) for chunk in fast_cdc_chunks(data)]


async def test_a_second_splice_is_answered_from_memory(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(50_000)
    chunks = await put(stores.blobs, *parts(data, 1_000))
    await chunking.splice(digest, chunks)

    await chunking.splice(digest, chunks)

    assert chunking.counters.spliced_blobs == 1


async def test_wrong_chunks_make_no_blob(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(3_000_000)
    chunks = await put(stores.blobs, *parts(data, 1_000_000))
    before = stores.blobs.status()

    with pytest.raises(InvalidArgumentError, match=digest.hash):
        await chunking.splice(digest, chunks[::-1])

    assert missing(stores.blobs, digest) == [digest]
    assert stores.blobs.status().blobs == before.blobs
    assert stores.blobs.status().staged_bytes == 0


async def test_wrong_chunks_are_no_layout_of_a_blob_that_is_there(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(3_000)
    chunks = await put(stores.blobs, *parts(data, 1_000))
    await put(stores.blobs, data)

    with pytest.raises(InvalidArgumentError, match=digest.hash):
        await chunking.splice(digest, chunks[::-1])

    assert (await chunking.split(digest, any_layout=True))[1] == FAST_CDC


async def test_right_chunks_of_a_blob_that_is_there_are_remembered(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(3_000)
    chunks = await put(stores.blobs, *parts(data, 1_000))
    await put(stores.blobs, data)

    await chunking.splice(digest, chunks)

    assert await chunking.split(digest, any_layout=True) == (chunks, UNKNOWN)


async def test_a_missing_chunk_is_named(stores: Stores, chunking: Chunking) -> None:
    digest, data = blob(3_000)
    chunks = await put(stores.blobs, *parts(data, 1_000))
    await stores.blobs.remove(chunks[1:])

    with pytest.raises(NotFoundError, match=f"{chunks[1].hash}.* 1 more"):
        await chunking.splice(digest, chunks)


async def test_a_chunk_that_goes_meanwhile_leaves_nothing_behind(
    stores: Stores, chunking: Chunking, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, data = blob(6_000_000)
    chunks = await put(stores.blobs, data[:3_000_000], data[3_000_000:])
    read_many = stores.blobs.read_many

    async def lose_the_last(digests: list[Digest]) -> list[bytes | None]:
        await stores.blobs.remove(chunks[1:])
        return await read_many(digests)

    monkeypatch.setattr(stores.blobs, "read_many", lose_the_last)

    with pytest.raises(NotFoundError, match=chunks[1].hash):
        await chunking.splice(digest, chunks)

    assert missing(stores.blobs, digest) == [digest]
    assert stores.blobs.status().staged_bytes == 0


@pytest.mark.parametrize("count", [0, 2, 4])
async def test_chunks_must_have_the_size_of_the_blob(stores: Stores, chunking: Chunking, count: int) -> None:
    digest, data = blob(3_000)
    (chunk,) = await put(stores.blobs, data[:1_000])

    with pytest.raises(InvalidArgumentError, match=r"chunk_digests.* 3000") as refused:
        await chunking.splice(digest, [chunk] * count)

    assert refused.value.field == "chunk_digests"


async def test_chunks_are_counted_before_they_are_looked_at(
    stores: Stores, chunking: Chunking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_chunking, "MAX_CHUNKS", 2)
    digest, _ = blob(3_000)

    with pytest.raises(InvalidArgumentError, match="3 are more than 2"):
        await chunking.splice(digest, [Digest.of(bytes(1_000))] * 3)


async def test_the_empty_blob_is_of_no_chunks(stores: Stores, chunking: Chunking) -> None:
    await chunking.splice(EMPTY_DIGEST, [])

    assert (await chunking.split(EMPTY_DIGEST))[0] == []


async def test_layouts_are_out_of_reach_of_clients(stores: Stores, chunking: Chunking) -> None:
    for name in [*chunking.chunking._layouts._instance_names.values(), blob_chunking._SPLICE_INSTANCE]:
        with pytest.raises(InvalidArgumentError, match="empty segment"):
            InstanceNames().check(name)


async def test_chunks_that_find_no_room_fail_the_split() -> None:
    stores = Stores(None)
    digest, data = blob(50_000)
    await put(stores.blobs, data)
    stores.memory.limit_bytes = max(map(len, fast_cdc_chunks(data))) - 1
    chunking = Chunking(stores)

    with pytest.raises(ResourceExhaustedError):
        await chunking.split(digest)

    assert chunking.counters.split_blobs == 0


async def test_a_spliced_blob_larger_than_the_store_is_refused(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store", 4_000_000)
    await store.open()
    try:
        (chunk,) = await put(store.blobs, bytes(100_000))

        with pytest.raises(ResourceExhaustedError, match="max_size_bytes"):
            await Chunking(store).splice(Digest.of(bytes(5_000_000)), [chunk] * 50)
    finally:
        await store.close()


async def test_a_layout_keeps_its_chunks_and_goes_before_them(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store", 1_000_000)
    await store.open()
    try:
        digest, data = blob(200_000)
        await put(store.blobs, data)
        chunking = Chunking(store)
        chunks, _ = await chunking.split(digest)
        rng = random.Random(1)
        for _ in range(20):
            # What comes in would push the chunks out, were they not touched by each look at the layout.
            store.now += STEP_SECONDS
            await put(store.blobs, rng.randbytes(100_000))
            await chunking.split(digest)
            await store.settle()
        assert chunking.counters.split_blobs == 1
        assert missing(store.blobs, *chunks) == []
        for _ in range(20):
            store.now += STEP_SECONDS
            await put(store.blobs, rng.randbytes(100_000))
            await store.settle()
        assert missing(store.blobs, digest, *chunks) == [digest, *chunks]
        assert store.blobs.status().action_results == 0
    finally:
        await store.close()
