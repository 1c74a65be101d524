import asyncio

import pytest
from tests.unit.scheduler.memory_cas import MemoryCas

from lathe_protos import reapi
from lathe_scheduler.input_tree import InputTrees
from lathe_shared.digest import EMPTY_DIGEST, Digest
from lathe_shared.errors import InternalError, InvalidArgumentError, UnavailableError
from lathe_shared.testing.builders import BlobSet
from lathe_shared.testing.fake_clock import FakeClock

FILES = {"a.txt": b"a", "lib/b.txt": b"b", "lib/deep/c.txt": b"c", "lib/deep/a.txt": b"a", "empty": b""}


class Fixture:
    def __init__(self) -> None:
        self.set = BlobSet()
        self.root = self.set.directory(FILES)
        self.cas = MemoryCas(self.set.blobs)
        self.clock = FakeClock()
        self.trees = InputTrees(self.cas, self.clock, presence_seconds=60.0)

    async def missing(self, root: Digest | None = None) -> set[Digest]:
        return await self.trees.find_missing("main", root or self.root)

    def without(self, *contents: bytes) -> set[Digest]:
        digests = {Digest.of(content) for content in contents}
        for digest in digests:
            del self.cas.blobs[digest]
        return digests


async def test_a_complete_tree_lacks_nothing_and_each_blob_is_asked_for_once() -> None:
    fixture = Fixture()
    assert await fixture.missing() == set()
    assert max(fixture.cas.asked.values()) == 1
    assert set(fixture.cas.asked) | {EMPTY_DIGEST} == set(fixture.set.blobs)
    assert fixture.cas.calls["find_missing"] == 1
    assert fixture.cas.calls["read"] == 3  # one for each level


async def test_all_missing_files_of_all_levels_are_found_at_once() -> None:
    fixture = Fixture()
    gone = fixture.without(b"a", b"c")
    assert await fixture.missing() == gone


async def test_a_missing_directory_is_named_and_the_rest_still_looked_at() -> None:
    fixture = Fixture()
    gone = fixture.without(b"a")
    lib = reapi.Directory().parse(fixture.cas.blobs[fixture.root]).directories[0]
    digest = Digest.from_message(lib.digest)
    del fixture.cas.blobs[digest]
    assert await fixture.missing() == gone | {digest}


async def test_a_missing_root_is_named() -> None:
    fixture = Fixture()
    del fixture.cas.blobs[fixture.root]
    assert await fixture.missing() == {fixture.root}


@pytest.mark.parametrize("what", ["a blob", "an instance"])
async def test_an_error_reaches_who_asked_for_it_and_nobody_beside_them(what: str) -> None:
    fixture = Fixture()
    damaged = fixture.set.directory({"other": b"o"})
    refused = InternalError("refused")
    instance_name = "main" if what == "a blob" else "other"
    fixture.cas.errors[damaged if what == "a blob" else instance_name] = refused

    found = await asyncio.gather(
        fixture.missing(), fixture.trees.find_missing(instance_name, damaged), return_exceptions=True
    )

    assert list(found) == [set(), refused]


async def test_a_refused_question_for_presence_is_no_other_instance_s_error() -> None:
    fixture = Fixture()
    await fixture.missing()
    fixture.clock.advance_nowait(61)  # Directories are known by now, so both only look for blobs.
    refused = fixture.cas.errors["other"] = InternalError("refused")

    found = await asyncio.gather(
        fixture.trees.find_missing("other", EMPTY_DIGEST), fixture.missing(), return_exceptions=True
    )

    assert list(found) == [refused, set()]


async def test_the_empty_root_needs_no_question() -> None:
    fixture = Fixture()
    assert await fixture.missing(EMPTY_DIGEST) == set()
    assert fixture.cas.calls["read"] == 0


async def test_a_tree_that_was_complete_is_believed_for_a_while() -> None:
    fixture = Fixture()
    await fixture.missing()
    fixture.cas.calls.clear()
    fixture.clock.advance_nowait(59)
    assert await fixture.missing() == set()
    assert not fixture.cas.calls
    fixture.clock.advance_nowait(2)
    gone = fixture.without(b"c")
    assert await fixture.missing() == gone
    assert fixture.cas.calls == {"find_missing": 1}  # Directories never change


async def test_another_tree_that_shares_a_subtree_asks_for_the_rest_only() -> None:
    fixture = Fixture()
    await fixture.missing()
    other = fixture.set.directory({**FILES, "new.txt": b"new"})
    fixture.cas.blobs.update(fixture.set.blobs)
    fixture.cas.asked.clear()
    fixture.cas.was_read.clear()
    assert await fixture.missing(other) == set()
    assert set(fixture.cas.asked) == {other, Digest.of(b"new")}
    assert set(fixture.cas.was_read) == {other}


async def test_belief_in_a_whole_never_outlasts_belief_in_its_parts() -> None:
    fixture = Fixture()
    await fixture.missing()
    fixture.clock.advance_nowait(50)
    other = fixture.set.directory({**FILES, "new.txt": b"new"})
    fixture.cas.blobs.update(fixture.set.blobs)
    await fixture.missing(other)
    fixture.clock.advance_nowait(15)
    gone = fixture.without(b"c")
    assert await fixture.missing(other) == gone


async def test_what_was_missing_is_asked_for_again() -> None:
    fixture = Fixture()
    fixture.without(b"c")
    assert await fixture.missing()
    fixture.cas.blobs[Digest.of(b"c")] = b"c"
    assert await fixture.missing() == set()


async def test_nothing_is_believed_after_forgetting() -> None:
    fixture = Fixture()
    await fixture.missing()
    gone = fixture.without(b"b")
    fixture.trees.forget()
    assert await fixture.missing() == gone


async def test_what_was_found_before_forgetting_is_not_believed_after_it() -> None:
    fixture = Fixture()
    under_way = asyncio.create_task(fixture.missing())
    while not fixture.cas.asked:  # noqa: ASYNC110 -- it has no event, and needs a few turns of the loop only
        await asyncio.sleep(0)
    gone = fixture.without(b"b")
    fixture.trees.forget()
    assert await under_way == set()
    assert await fixture.missing() == gone


async def test_checks_at_the_same_time_share_their_questions() -> None:
    fixture = Fixture()
    results = await asyncio.gather(*(fixture.missing() for _ in range(50)))
    assert results == [set()] * 50
    assert max(fixture.cas.asked.values()) == 1
    assert fixture.cas.calls["find_missing"] == 1
    assert fixture.cas.calls["read"] == 3


async def test_a_check_that_is_cancelled_leaves_the_others_their_answer() -> None:
    fixture = Fixture()
    first = asyncio.ensure_future(fixture.missing())
    second = asyncio.ensure_future(fixture.missing())
    await asyncio.sleep(0)
    first.cancel()
    assert await second == set()


async def test_a_storage_that_is_away_is_an_error_for_all_and_no_memory_of_it_stays() -> None:
    fixture = Fixture()
    fixture.cas.is_away = True
    results = await asyncio.gather(*(fixture.missing() for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [UnavailableError] * 3
    fixture.cas.is_away = False
    assert await fixture.missing() == set()


async def test_a_directory_that_doubles_at_each_level_is_walked_once_per_directory() -> None:
    blobs = BlobSet()
    digest = blobs.directory({"leaf": b"leaf"})
    for _ in range(30):
        node = digest.to_message()
        digest = blobs.add(
            bytes(
                reapi.Directory(
                    directories=[reapi.DirectoryNode(name="l", digest=node), reapi.DirectoryNode(name="r", digest=node)]
                )
            )
        )
    cas = MemoryCas(blobs.blobs)
    assert await InputTrees(cas, FakeClock()).find_missing("main", digest) == set()
    assert len(cas.asked) == 32


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        bytes(reapi.Directory(files=[reapi.FileNode(name="..", digest=EMPTY_DIGEST.to_message())])),
        bytes(reapi.Directory(files=[reapi.FileNode(name="a", digest=reapi.Digest(hash="xyz"))])),
        bytes(reapi.Directory(files=[reapi.FileNode(name="a/b", digest=EMPTY_DIGEST.to_message())])),
    ],
)
async def test_a_malformed_directory_is_named(data: bytes) -> None:
    fixture = Fixture()
    root = fixture.set.add(data)
    fixture.cas.blobs[root] = data
    with pytest.raises(InvalidArgumentError, match=str(root)):
        await fixture.missing(root)


async def test_the_memory_for_directories_is_bounded() -> None:
    fixture = Fixture()
    fixture.trees = InputTrees(fixture.cas, fixture.clock, max_directory_entries=1)
    assert await fixture.missing() == set()
    fixture.trees.forget()
    fixture.cas.was_read.clear()
    assert await fixture.missing() == set()
    assert len(fixture.cas.was_read) == 3  # each pushes out the one before
