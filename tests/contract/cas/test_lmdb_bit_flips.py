"""Single bits of ``data.mdb`` flipped at random: found, never served, reported missing, healed; and fsck finds them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.cas.blob_making import content, missing, put, read
from tests.contract.cas.lmdb_store import MAP_BYTES, LmdbStore

from lathe_cas.action_result_store import FoundActionResult, StoredActionResult
from lathe_cas.fsck.child import check_here
from lathe_cas.fsck.command import main
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_shared.digest import Digest
from lathe_shared.errors import BlobNotFoundError, UnavailableError

PAGE = 4_096
P_LEAF_OR_BRANCH, P_OVERFLOW = 3, 4
SIZES_BYTES = (10, 500, 2_000, 3_000, 70_000)
BLOBS = [content(SIZES_BYTES[seed % 5], seed) for seed in range(100)]
DIGESTS = [Digest.of(data) for data in BLOBS]
PROBLEMS, REPAIRED, BROKEN = 1, 3, 4


def fsck(path: Path, *flags: str) -> int:
    return int(main([f"--data-dir={path}", f"--temp-dir={path.parent}", *flags], {}, check_here))


async def written(path: Path) -> LmdbStore:
    """Write blobs and action results, and leave the store closed."""
    store = LmdbStore(path)
    await store.open()
    await put(store.blobs, *BLOBS)
    for number in range(30):
        await store.results.put("main", *action_result(number))
    await store.close()
    return store


def action_result(number: int) -> tuple[Digest, StoredActionResult]:
    named = [(digest.key, digest.size_bytes) for digest in DIGESTS[number : number + 3]]
    return Digest.of(b"action %d" % number), StoredActionResult(b"result %d" % number, named)


@pytest.mark.parametrize("seed", range(3))
async def test_flipped_blobs_are_found_dropped_counted_and_healed(tmp_path: Path, seed: int) -> None:
    store = await written(tmp_path / "store")
    chunks_of = storage_ids(store.path)
    flipped = set(random.Random(seed).sample([index for index, data in enumerate(BLOBS) if len(data) > 10], 20))
    image = bytearray((store.path / "data.mdb").read_bytes())
    for index in flipped:
        # A chunk, wherever it lies; old copies of its page are no use to anybody.
        start = image.rfind(BLOBS[index][:65_520])
        while start >= 0:
            image[start + random.Random(index).randrange(min(len(BLOBS[index]), 65_520))] ^= 1 << index % 8
            start = image.rfind(BLOBS[index][:65_520])
    (store.path / "data.mdb").write_bytes(image)

    assert fsck(store.path) == PROBLEMS
    await store.open()
    for index, digest in enumerate(DIGESTS):
        if index in flipped:
            with pytest.raises(BlobNotFoundError):
                await read(store.blobs, digest)
        else:
            assert await read(store.blobs, digest) == BLOBS[index]
    await store.settle()
    assert store.blobs.status().counters["damaged_blobs"] == len(flipped)
    assert missing(store.blobs, *DIGESTS) == [DIGESTS[index] for index in sorted(flipped)]
    await put(store.blobs, *BLOBS)
    for digest, data in zip(DIGESTS, BLOBS, strict=True):
        assert await read(store.blobs, digest) == data
    store.damaged_ids.update(chunks_of[DIGESTS[index].key] for index in flipped)
    await store.recount()
    await store.close()
    assert [fsck(store.path), fsck(store.path, "--repair"), fsck(store.path)] == [PROBLEMS, REPAIRED, 0]


def storage_ids(path: Path) -> dict[bytes, int]:
    """Return for each blob where its chunks are."""
    environment = LmdbEnvironment(path, MAP_BYTES)
    with environment.read() as txn:
        found = {key: records.BlobRecord.unpack(value).storage_id for key, value in txn.cursor(environment.blobs)}
    environment.close()
    return found


async def test_what_fsck_drops_is_what_reads_would_have_found(tmp_path: Path) -> None:
    store = await written(tmp_path / "store")
    path = store.path / "data.mdb"
    path.write_bytes(path.read_bytes().replace(BLOBS[4][:1000], bytes(1000)))
    assert fsck(store.path, "--repair") == REPAIRED
    await store.open()
    assert missing(store.blobs, *DIGESTS) == [DIGESTS[4]]
    assert store.results.get("main", action_result(4)[0]) is None
    await store.recount()
    await store.close()


def index_pages(image: bytes) -> Iterator[int]:
    """Give the places of all pages that are part of a B-tree, or were."""
    number = 2
    while number * PAGE < len(image):
        (flags,) = struct.unpack_from("=H", image, number * PAGE + 10)
        if flags & P_OVERFLOW:
            (pages,) = struct.unpack_from("=I", image, number * PAGE + 12)
            number += pages
            continue
        if flags & P_LEAF_OR_BRANCH:
            yield number * PAGE
        number += 1


async def test_flipped_index_pages_never_have_wrong_bytes_served(tmp_path: Path) -> None:
    whole = (await written(tmp_path / "whole")).path / "data.mdb"
    image = whole.read_bytes()
    pages = list(index_pages(image))
    seen = 0
    for seed in range(25):
        choose = random.Random(seed)
        # Headers and pointers of a page are few among its bytes, and what LMDB itself goes by.
        place = choose.choice(pages) + choose.randrange(12, 64 if seed % 2 else PAGE)
        damaged = bytearray(image)
        damaged[place] ^= 1 << choose.randrange(8)
        store = LmdbStore(tmp_path / str(seed))
        store.path.mkdir()
        (store.path / "data.mdb").write_bytes(damaged)
        found = fsck(store.path)
        await store.open()
        lost = await look(store)
        assert not lost or found in (PROBLEMS, BROKEN), f"seed {seed}: fsck missed what a read found"
        seen += found in (PROBLEMS, BROKEN)
        await store.close()
    assert seen > 5


async def look(store: LmdbStore) -> bool:
    """Read everything; whether anything was not there. Whatever else goes wrong is raised."""
    lost = False
    for digest, data in zip(DIGESTS, BLOBS, strict=True):
        try:
            assert await read(store.blobs, digest) == data
        except BlobNotFoundError:
            lost = True
    for number in range(30):
        action, stored = action_result(number)
        found = store.results.get("main", action)
        assert found in (None, FoundActionResult(stored.action_result, True))
        lost |= found is None
    for digest, data in zip(DIGESTS, BLOBS, strict=True):
        try:
            await store.blobs.put_many([(digest, memoryview(data))])
        except UnavailableError as error:
            assert "damaged" in error.message  # noqa: PT017 -- whether it is raised depends on the flip
    return lost
