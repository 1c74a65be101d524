"""What every action result store does: whole results, only when all that they refer to is there."""

from __future__ import annotations

import asyncio

import pytest
from tests.contract.cas.blob_making import content, put
from tests.contract.cas.conftest import Stores

from lathe_cas.action_result_store import FoundActionResult, StoredActionResult
from lathe_cas.soon import settled
from lathe_shared.digest import Digest, DigestFunction

ACTION = Digest.of(b"action")
CHUNK = 65_520


def result(action_result: bytes, *digests: Digest, expanded: bool = True) -> StoredActionResult:
    return StoredActionResult(action_result, [(digest.key, digest.size_bytes) for digest in digests], expanded)


async def test_an_unknown_action_has_no_result(stores: Stores) -> None:
    assert stores.results.get("main", ACTION) is None


@pytest.mark.parametrize("references", [0, 1, 100, 3_000])
async def test_a_result_comes_back_as_it_was_put(stores: Stores, references: int) -> None:
    data = [content(3, seed) for seed in range(references)]
    digests = await put(stores.blobs, *data)
    for size_bytes in (0, 1, 2_000, CHUNK, CHUNK + 1, 5 * CHUNK):
        payload = content(size_bytes)
        await stores.results.put("main", ACTION, result(payload, *digests))
        assert await settled(stores.results.get("main", ACTION)) == FoundActionResult(payload, True)
        if digests:
            await stores.blobs.remove([digests[-1]])
            assert await settled(stores.results.get("main", ACTION)) is None
            await put(stores.blobs, data[-1])
            assert await settled(stores.results.get("main", ACTION)) == FoundActionResult(payload, True)


async def test_a_result_survives_closing(stores: Stores) -> None:
    (digest,) = await put(stores.blobs, b"output")
    await stores.results.put("main", ACTION, result(b"result", digest, expanded=False))
    await stores.reopen()
    assert stores.results.get("main", ACTION) == FoundActionResult(b"result", False)


@pytest.mark.parametrize("lost", range(3))
async def test_a_result_is_hidden_while_anything_is_missing(stores: Stores, lost: int) -> None:
    data = [content(1_000, seed) for seed in range(3)]
    digests = await put(stores.blobs, *data)
    await stores.results.put("main", ACTION, result(b"result", *digests))
    await stores.blobs.remove([digests[lost]])
    assert stores.results.get("main", ACTION) is None
    await put(stores.blobs, data[lost])
    assert stores.results.get("main", ACTION) == FoundActionResult(b"result", True)


async def test_a_reference_is_there_only_with_its_size(stores: Stores) -> None:
    (digest,) = await put(stores.blobs, b"output")
    await stores.results.put("main", ACTION, result(b"result", Digest(digest.hash, 5)))
    assert stores.results.get("main", ACTION) is None


async def test_the_same_hash_with_two_sizes_is_two_references(stores: Stores) -> None:
    (digest,) = await put(stores.blobs, b"output")
    await stores.results.put("main", ACTION, result(b"result", Digest(digest.hash, 5), digest))
    assert stores.results.get("main", ACTION) is None


@pytest.mark.parametrize("function", list(DigestFunction))
async def test_the_empty_blob_is_never_missing_from_a_result(stores: Stores, function: DigestFunction) -> None:
    action = Digest.of(b"action", function)
    empty = Digest.of(b"", function)
    await stores.results.put("main", action, result(b"result", empty))
    assert stores.results.get("main", action) == FoundActionResult(b"result", True)


async def test_the_empty_hash_with_a_size_is_always_missing(stores: Stores) -> None:
    empty = Digest.of(b"")
    await stores.results.put("main", ACTION, result(b"result", Digest(empty.hash, 7)))
    assert stores.results.get("main", ACTION) is None


@pytest.mark.parametrize("function", list(DigestFunction))
async def test_references_are_by_the_function_of_the_action(stores: Stores, function: DigestFunction) -> None:
    action, output = Digest.of(b"action", function), Digest.of(b"output", function)
    assert await stores.blobs.put_many([(output, memoryview(b"output"))]) == [None]
    await stores.results.put("main", action, result(b"result", output))
    assert stores.results.get("main", action) == FoundActionResult(b"result", True)
    await stores.blobs.remove([output])
    assert stores.results.get("main", action) is None


async def test_a_new_result_takes_the_old_ones_place(stores: Stores) -> None:
    first, second = await put(stores.blobs, b"first", b"second")
    await stores.results.put("main", ACTION, result(content(3 * CHUNK), first))
    await stores.results.put("main", ACTION, result(b"", expanded=False))
    assert await settled(stores.results.get("main", ACTION)) == FoundActionResult(b"", False)
    await stores.results.put("main", ACTION, result(content(2 * CHUNK), second))
    await stores.blobs.remove([first])
    assert await settled(stores.results.get("main", ACTION)) == FoundActionResult(content(2 * CHUNK), True)


async def test_instances_and_actions_are_kept_apart(stores: Stores) -> None:
    other = Digest.of(b"other action")
    names = ["", "main", "main/nested", "a" * 1_000]
    for name in names:
        await stores.results.put(name, ACTION, result(b"of " + name.encode()))
    assert [stores.results.get(name, ACTION) for name in names] == [
        FoundActionResult(b"of " + name.encode(), True) for name in names
    ]
    assert stores.results.get("main", other) is None
    assert stores.results.get("other", ACTION) is None


async def test_writers_of_the_same_action_leave_one_whole_result(stores: Stores) -> None:
    digests = await put(stores.blobs, *(content(10, seed) for seed in range(20)))
    candidates = [result(content(40_000, seed), digest) for seed, digest in enumerate(digests)]
    await asyncio.gather(*(stores.results.put("main", ACTION, candidate) for candidate in candidates))
    found = await settled(stores.results.get("main", ACTION))
    assert found is not None
    assert found.action_result in [candidate.action_result for candidate in candidates]
