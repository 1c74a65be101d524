"""The cache of input files: single flight, holding, eviction, restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from tests.unit.worker.memory_blobs import MemoryBlobs

from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import MissingInputsError, UnavailableError
from lathe_worker.cache_files import digest_of, file_name
from lathe_worker.file_cache import SMALL_BLOB_BYTES, FileCache

LARGE = b"large" * SMALL_BLOB_BYTES


def name_of(data: bytes, *, is_executable: bool = False) -> str:
    digest = Digest.of(data)
    return file_name(digest.hash, digest.size_bytes, DigestFunction.SHA256, is_executable=is_executable)


class Setup:
    def __init__(self, directory: Path, max_size_bytes: int = 1 << 30) -> None:
        self.blobs = MemoryBlobs()
        self.directory = directory
        self.max_size_bytes = max_size_bytes
        self.cache = self.reopened()

    def reopened(self) -> FileCache:
        cache = FileCache(self.directory, self.max_size_bytes, self.blobs)
        cache.open()
        self.cache = cache
        return cache

    def put(self, data: bytes, *, is_executable: bool = False) -> str:
        self.blobs.blobs[Digest.of(data)] = data
        return name_of(data, is_executable=is_executable)

    def file(self, name: str) -> Path:
        return Path(self.cache.path(name))

    def content(self, name: str) -> bytes:
        return self.file(name).read_bytes()

    def modes(self, names: list[str]) -> list[int]:
        return [self.file(name).stat().st_mode & 0o7777 for name in names]

    def exist(self, names: list[str]) -> list[bool]:
        return [self.file(name).exists() for name in names]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "cache")


def test_names_tell_digests() -> None:
    digest = Digest.of(b"x", DigestFunction.SHA1)
    name = file_name(digest.hash, digest.size_bytes, digest.function, is_executable=True)

    assert digest_of(name) == digest


@pytest.mark.parametrize("data", [b"small", LARGE])
async def test_both_forms_are_read_only_files_of_their_own(setup: Setup, data: bytes) -> None:
    names = [setup.put(data), setup.put(data, is_executable=True)]
    async with setup.cache.hold("main", names):
        assert setup.modes(names) == [0o444, 0o555]
        assert [setup.content(name) for name in names] == [data, data]
    assert setup.blobs.reads[Digest.of(data)] == 1


async def test_small_blobs_come_together(setup: Setup) -> None:
    names = [setup.put(str(number).encode()) for number in range(500)]
    async with setup.cache.hold("main", names):
        assert setup.content(names[17]) == b"17"

    assert setup.blobs.read_calls == 1


@pytest.mark.parametrize("data", [b"small", LARGE])
async def test_what_two_actions_want_at_once_is_fetched_once(setup: Setup, data: bytes) -> None:
    name = setup.put(data)
    setup.blobs.gate = asyncio.Event()

    async def want() -> bytes:
        async with setup.cache.hold("main", [name]):
            return setup.content(name)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(want()) for _ in range(5)]
        await asyncio.sleep(0)
        setup.blobs.gate.set()

    assert [task.result() for task in tasks] == [data] * 5
    assert setup.blobs.reads[Digest.of(data)] == 1


async def test_an_action_that_gives_up_does_not_take_the_download_from_another(setup: Setup) -> None:
    name = setup.put(b"data")
    setup.blobs.gate = asyncio.Event()

    async def want() -> bytes:
        async with setup.cache.hold("main", [name]):
            return setup.content(name)

    first, second = asyncio.ensure_future(want()), asyncio.ensure_future(want())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    setup.blobs.gate.set()

    assert await second == b"data"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_all_missing_blobs_are_named_and_nothing_stays_held(setup: Setup) -> None:
    present = setup.put(b"present")
    missing = [name_of(b"one"), name_of(LARGE), name_of(b"two", is_executable=True)]
    with pytest.raises(MissingInputsError) as raised:
        async with setup.cache.hold("main", [present, *missing]):
            raise AssertionError

    assert set(raised.value.digests) == {Digest.of(b"one"), Digest.of(LARGE), Digest.of(b"two")}
    assert setup.cache._held_bytes == 0
    assert len(setup.cache) == 1


async def test_a_failure_is_everybody_s_and_the_next_try_is_fresh(setup: Setup) -> None:
    name = setup.put(b"data")
    setup.blobs.failure = UnavailableError("away")
    with pytest.raises(UnavailableError):
        async with setup.cache.hold("main", [name]):
            raise AssertionError
    setup.blobs.failure = None

    async with setup.cache.hold("main", [name]):
        assert setup.content(name) == b"data"


async def test_a_full_disk_is_an_os_error(setup: Setup) -> None:
    name = setup.put(b"data")
    (setup.directory / name[:2]).rmdir()
    with pytest.raises(OSError, match=name):
        async with setup.cache.hold("main", [name]):
            raise AssertionError


async def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    setup = Setup(tmp_path, max_size_bytes=30)
    names = [setup.put(bytes([65 + number]) * 10) for number in range(4)]
    for name in (names[0], names[1], names[2], names[0], names[3]):
        async with setup.cache.hold("main", [name]):
            pass

    assert setup.exist(names) == [True, False, True, True]
    assert setup.cache.size_bytes == 30


async def test_what_is_held_stays_even_over_the_limit(tmp_path: Path) -> None:
    setup = Setup(tmp_path, max_size_bytes=30)
    names = [setup.put(bytes([65 + number]) * 10) for number in range(8)]
    async with setup.cache.hold("main", names):
        assert [setup.content(name)[:1] for name in names] == [bytes([65 + number]) for number in range(8)]
        assert setup.cache.size_bytes == 80

    assert setup.cache.size_bytes == 30
    assert setup.cache._held_bytes == 0


async def test_files_survive_a_restart_in_their_order(tmp_path: Path) -> None:
    setup = Setup(tmp_path, max_size_bytes=100)
    names = [setup.put(bytes([65 + number]) * 10, is_executable=number == 1) for number in range(3)]
    for age, name in enumerate(names):
        async with setup.cache.hold("main", [name]):
            pass
        os.utime(setup.cache.path(name), (2e9 - age, 1e9))  # beyond now: atime decides
    setup.max_size_bytes = 20
    cache = setup.reopened()

    assert len(cache) == 2
    assert cache.size_bytes == 20
    assert setup.exist(names) == [True, True, False]
    setup.blobs.blobs.clear()
    async with cache.hold("main", names[:2]):
        assert setup.content(names[1]) == b"B" * 10


async def test_damaged_and_foreign_files_are_removed_at_start(setup: Setup) -> None:
    name = setup.put(b"data")
    async with setup.cache.hold("main", [name]):
        pass
    folder = setup.directory / name[:2]
    torn = folder / name_of(b"whole").replace("-5-", "-6-")
    torn.write_bytes(b"whol")
    (folder / ".temporary").write_bytes(b"x")
    os.chmod(setup.cache.path(name), 0o644)
    setup.reopened()

    assert len(setup.cache) == 0
    assert list(folder.iterdir()) == []


async def test_a_remnant_under_the_same_name_is_replaced(setup: Setup) -> None:
    name = setup.put(b"data")
    setup.file(name).write_bytes(b"junk")
    async with setup.cache.hold("main", [name]):
        assert setup.content(name) == b"data"


async def test_what_vanished_is_forgotten_and_fetched_again(setup: Setup) -> None:
    name = setup.put(b"data")
    async with setup.cache.hold("main", [name]):
        pass
    os.unlink(setup.cache.path(name))
    setup.cache.forget(name)
    assert setup.cache.size_bytes == 0

    async with setup.cache.hold("main", [name]):
        assert setup.content(name) == b"data"


async def test_who_held_what_was_forgotten_lets_go_of_nobody_elses_file(tmp_path: Path) -> None:
    setup = Setup(tmp_path / "cache", max_size_bytes=10)
    name, other = setup.put(b"eight by"), setup.put(b"8 others")
    async with contextlib.AsyncExitStack() as first:
        await first.enter_async_context(setup.cache.hold("main", [name]))
        setup.cache.forget(name)
        async with setup.cache.hold("main", [name]):
            await first.aclose()
            async with setup.cache.hold("main", [other]):
                assert setup.exist([name, other]) == [True, True]  # both in use, over the limit

    async with setup.cache.hold("main", [other]):
        pass
    assert setup.cache.size_bytes <= 10
