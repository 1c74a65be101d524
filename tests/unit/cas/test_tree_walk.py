"""GetTree's walk: each Directory once, in an order that page tokens can rely on."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import pytest
from tests.contract.cas.memory_stores import MemoryBlobStore
from typing_extensions import override

from lathe_cas import tree_walk
from lathe_cas.tree_walk import MAX_DIRECTORY_BYTES, MAX_PAGE_BYTES, TreeWalk, _DirectoryQueue, read_together
from lathe_protos import reapi
from lathe_shared import tree_wire
from lathe_shared.digest import EMPTY_DIGEST, Digest, DigestFunction
from lathe_shared.errors import BlobNotFoundError, InvalidArgumentError, ResourceExhaustedError
from lathe_shared.testing.builders import BlobSet
from lathe_shared.tree_wire import DirectoryContents
from lathe_shared.wire import message_field, string_field

FILES = {"a/x/1": b"1", "a/y/2": b"2", "b/3": b"3", "c/x/1": b"1", "d/": b""}


class CountingStore(MemoryBlobStore):
    """Counts how often each blob is read, and how much at once."""

    def __init__(self, blobs: BlobSet) -> None:
        super().__init__()
        self.was_read: Counter[Digest] = Counter()
        self.largest_read = 0
        for digest, data in blobs.blobs.items():
            self.put(digest, data)

    @override
    async def read_many(self, digests: Sequence[Digest]) -> list[bytes | None]:
        self.was_read.update(digests)
        self.largest_read = max(self.largest_read, sum(digest.size_bytes for digest in digests))
        return await super().read_many(digests)


def tree(files: dict[str, bytes] | None = None) -> tuple[CountingStore, Digest]:
    blobs = BlobSet()
    root = blobs.directory(dict(FILES if files is None else files))
    return CountingStore(blobs), root


async def walk(
    store: MemoryBlobStore, root: Digest, page_size: int = 0, page_token: str = ""
) -> list[reapi.GetTreeResponse]:
    return [reapi.GetTreeResponse().parse(page) async for page in TreeWalk(store, root, page_size, page_token).pages()]


def directories(pages: list[reapi.GetTreeResponse]) -> list[Digest]:
    return [Digest.of(bytes(directory)) for page in pages for directory in page.directories]


def names(pages: list[reapi.GetTreeResponse]) -> list[list[str]]:
    return [
        [entry.name for entry in directory.directories] + [entry.name for entry in directory.files]
        for page in pages
        for directory in page.directories
    ]


async def test_each_directory_comes_once_breadth_first() -> None:
    store, root = tree()
    pages = await walk(store, root)
    assert len(pages) == 1
    assert pages[0].next_page_token == ""
    assert names(pages) == [["a", "b", "c", "d"], ["x", "y"], ["3"], ["x"], [], ["1"], ["2"]]
    assert max(store.was_read.values()) == 1


async def test_a_single_directory() -> None:
    store, root = tree({"file": b"x"})
    assert names(await walk(store, root)) == [["file"]]


async def test_the_empty_directory_needs_no_storing() -> None:
    assert names(await walk(MemoryBlobStore(), EMPTY_DIGEST)) == [[]]


@pytest.mark.parametrize("page_size", [1, 2, 3, 6, 7, 100])
async def test_pages_have_no_more_than_was_asked_for(page_size: int) -> None:
    store, root = tree()
    whole = directories(await walk(store, root))
    pages = await walk(store, root, page_size)
    assert directories(pages) == whole
    assert [len(page.directories) for page in pages[:-1]] == [page_size] * (len(pages) - 1)
    assert [bool(page.next_page_token) for page in pages] == [True] * (len(pages) - 1) + [False]


@pytest.mark.parametrize("page_size", [1, 2, 3, 6])
async def test_a_token_leads_to_what_follows(page_size: int) -> None:
    store, root = tree()
    whole = directories(await walk(store, root))
    first = (await walk(store, root, page_size))[0]
    assert directories([first, *await walk(store, root, 0, first.next_page_token)]) == whole
    assert directories([first, *await walk(store, root, 2, first.next_page_token)]) == whole


async def test_one_page_at_a_time_arrives_at_the_end() -> None:
    store, root = tree()
    seen: list[Digest] = []
    token = ""
    while True:
        page = (await walk(store, root, 2, token))[0]
        seen += directories([page])
        token = page.next_page_token
        if not token:
            break
    assert seen == directories(await walk(store, root))


@pytest.mark.parametrize("token", ["1", "-1", "nonsense", "0123456789abcdef-1", "-", "{root}", "{root}--1", "{root}-x",
                                   "{root}-1.5", "{root}-²", "{root}-999999999999999"])  # fmt: skip
async def test_a_token_that_was_never_given_is_refused(token: str) -> None:
    store, root = tree()
    with pytest.raises(InvalidArgumentError, match="page_token"):
        TreeWalk(store, root, 0, token.replace("{root}", root.hash[:16]))


async def test_a_token_of_another_root_is_refused() -> None:
    store, root = tree()
    other, other_root = tree({"a/b/c": b"x"})
    (page, *_) = await walk(other, other_root, 1)
    with pytest.raises(InvalidArgumentError, match="page_token"):
        await walk(store, root, 1, page.next_page_token)


async def test_a_position_behind_the_end_gives_an_empty_page() -> None:
    store, root = tree()
    assert await walk(store, root, 0, f"{root.hash[:16]}-1000") == [reapi.GetTreeResponse()]


async def test_a_missing_root_is_not_found() -> None:
    store, root = tree()
    await store.remove([root])
    with pytest.raises(BlobNotFoundError):
        await walk(store, root)
    with pytest.raises(BlobNotFoundError):
        await walk(store, root, 0, f"{root.hash[:16]}-3")


async def test_a_missing_directory_is_left_out_with_what_is_below() -> None:
    store, root = tree()
    (a,) = [Digest.of(bytes(d)) for d in (await walk(store, root))[0].directories if len(d.directories) == 2]
    await store.remove([a])
    assert names(await walk(store, root)) == [["a", "b", "c", "d"], ["3"], ["x"], [], ["1"]]
    pages = await walk(store, root, 2)
    assert [len(page.directories) for page in pages] == [2, 2, 1]
    assert names([*pages[:1], *await walk(store, root, 2, pages[0].next_page_token)]) == names(pages)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x12\x05\x0a\x03abc", b"\x12\x08\x0a\x01a\x12\x03\x0a\x01z"])
async def test_a_blob_that_is_no_directory_is_refused(data: bytes) -> None:
    blobs = BlobSet()
    below = blobs.add(data)
    root = blobs.add(bytes(reapi.Directory(directories=[reapi.DirectoryNode(name="d", digest=below.to_message())])))
    store = CountingStore(blobs)
    with pytest.raises(InvalidArgumentError):
        await walk(store, root)
    with pytest.raises(InvalidArgumentError):
        await walk(store, below)


async def test_a_directory_that_is_too_large_is_refused_unread() -> None:
    large = Digest("0" * 64, MAX_DIRECTORY_BYTES + 1)
    blobs = BlobSet()
    root = blobs.add(bytes(reapi.Directory(directories=[reapi.DirectoryNode(name="big", digest=large.to_message())])))
    store = CountingStore(blobs)
    with pytest.raises(InvalidArgumentError, match="'big'"):
        await walk(store, root)
    with pytest.raises(InvalidArgumentError, match="root_digest"):
        await walk(store, large)
    assert large not in store.was_read


async def test_a_doubled_dag_is_walked_in_linear_time() -> None:
    """Thirty levels whose two entries are the same Directory: 2^30 paths, thirty Directories."""
    blobs = BlobSet()
    digest = blobs.directory({"leaf": b""})
    for _ in range(30):
        message = digest.to_message()
        nodes = [reapi.DirectoryNode(name="l", digest=message), reapi.DirectoryNode(name="r", digest=message)]
        digest = blobs.add(bytes(reapi.Directory(directories=nodes)))
    store = CountingStore(blobs)
    pages = await walk(store, digest)
    assert len(directories(pages)) == 31
    assert max(store.was_read.values()) == 1


async def test_pages_are_bounded_in_bytes() -> None:
    files = {f"{number}/{number}{'x' * 200_000}": b"" for number in range(12)}
    store, root = tree(files)
    pages = await walk(store, root)
    assert len(directories(pages)) == 13
    assert len(pages) > 1
    assert all(len(bytes(page)) <= MAX_PAGE_BYTES + 1000 for page in pages)
    assert store.largest_read <= MAX_PAGE_BYTES


async def test_a_tree_of_too_many_directories_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store, root = tree({f"{number}/{number}": b"" for number in range(20)})
    monkeypatch.setattr(tree_walk, "MAX_TREE_DIRECTORIES", 21)
    assert len(directories(await walk(store, root))) == 21
    monkeypatch.setattr(tree_walk, "MAX_TREE_DIRECTORIES", 20)
    with pytest.raises(ResourceExhaustedError, match="more than 20 distinct directories"):
        await walk(store, root)
    store.was_read.clear()
    with pytest.raises(ResourceExhaustedError):
        await walk(store, root)
    assert list(store.was_read) == [root], "refused when it is seen, not when all is read"


@pytest.mark.parametrize("function", [DigestFunction.SHA256, DigestFunction.SHA512])
def test_a_queue_of_many_directories_takes_little_memory(function: DigestFunction) -> None:
    """All of them may wait at once, and all are remembered to the end."""
    count = 1 << 14  # where a set has just grown: the worst moment is not better than the usual one by luck
    length = function.hash_length
    root = Digest("f" * length, 1000, function)
    taken = []
    tracemalloc.start()
    try:
        queue = _DirectoryQueue(root)
        for number in range(count):
            queue.add(Digest(f"{number:0{length}x}", 1000 + number % 1000, function))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < (160 + length) * count
    while queue:
        taken += queue.take_together()
    assert taken[0] == root
    assert taken[1:] == [Digest(f"{number:0{length}x}", 1000 + number % 1000, function) for number in range(count)]


def test_what_is_read_together_is_bounded() -> None:
    small = [Digest("0" * 64, 10) for _ in range(1000)]
    assert len(read_together(small)) == 256
    assert len(read_together(small, 900)) == 100
    large = [Digest("0" * 64, MAX_PAGE_BYTES + 1) for _ in range(3)]
    assert len(read_together(large)) == 1
    assert len(read_together([small[0], *large])) == 1


@pytest.mark.parametrize("entries", [100, 5_000])
async def test_a_large_directory_keeps_nobody_waiting(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryBlobStore()
    child = reapi.DirectoryNode(digest=Digest.of(b"absent").to_message())
    root = b"".join(message_field(2, bytes(child) + string_field(1, f"{number:05}")) for number in range(entries))
    store.put(Digest.of(root), root)
    threads: list[threading.Thread] = []

    def read_directory_blob(data: bytes, field: str) -> DirectoryContents:
        threads.append(threading.current_thread())
        return tree_wire.read_directory_blob(data, field)

    monkeypatch.setattr(tree_walk, "read_directory_blob", read_directory_blob)
    assert len(await walk(store, Digest.of(root))) == 1
    is_large = len(root) > tree_walk.INLINE_PARSE_BYTES
    assert [thread is threading.current_thread() for thread in threads] == [not is_large]
