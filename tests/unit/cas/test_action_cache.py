"""The action cache: a result is handed out exactly when all that it names, at any depth, is there."""

from __future__ import annotations

import asyncio
import inspect
import threading

import pytest
from tests.contract.cas.memory_stores import MemoryActionResultStore, MemoryBlobStore

from lathe_cas.action_cache import MAX_TREE_BYTES, ActionCache
from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.tree_walk import INLINE_PARSE_BYTES, MAX_DIRECTORY_BYTES
from lathe_protos import reapi
from lathe_shared.digest import EMPTY_DIGEST, Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.testing.builders import BlobSet
from lathe_shared.wire import message_field

ACTION = Digest.of(b"action")


class Fixture:
    """A cache over stores in memory, and blobs that wait to be put there."""

    def __init__(self) -> None:
        self.blobs = MemoryBlobStore()
        self.results = MemoryActionResultStore(self.blobs)
        self.cache = ActionCache(self.results, self.blobs)
        self.set = BlobSet()

    def upload(self, *without: Digest) -> None:
        for digest, data in self.set.blobs.items():
            if digest not in without:
                self.blobs.put(digest, data)

    async def get(self, instance_name: str = "main", action: Digest = ACTION) -> bytes | None:
        found = self.cache.get(instance_name, action)
        return await found if inspect.isawaitable(found) else found

    def tree(self) -> Digest:
        """Put together a Tree of three directories with three files, one of them empty."""
        leaf = reapi.Directory(files=[self.file("c", b"in the leaf"), self.file("e", b"")])
        middle = reapi.Directory(
            files=[self.file("b", b"in the middle")],
            directories=[reapi.DirectoryNode(name="leaf", digest=Digest.of(bytes(leaf)).to_message())],
        )
        root = reapi.Directory(
            files=[self.file("a", b"in the root")],
            directories=[reapi.DirectoryNode(name="middle", digest=Digest.of(bytes(middle)).to_message())],
        )
        return self.set.add(bytes(reapi.Tree(root=root, children=[middle, leaf])))

    def file(self, name: str, data: bytes) -> reapi.FileNode:
        return reapi.FileNode(name=name, digest=self.set.add(data).to_message())


def with_tree(tree: Digest) -> bytes:
    return bytes(
        reapi.ActionResult(output_directories=[reapi.OutputDirectory(path="out", tree_digest=tree.to_message())])
    )


def with_root(root: Digest) -> bytes:
    return bytes(
        reapi.ActionResult(
            output_directories=[reapi.OutputDirectory(path="out", root_directory_digest=root.to_message())]
        )
    )


async def test_an_unknown_action_is_a_miss() -> None:
    assert await Fixture().get() is None


async def test_a_result_without_outputs_is_a_hit() -> None:
    fixture = Fixture()
    await fixture.cache.update("main", ACTION, b"")
    assert await fixture.get() == b""


async def test_a_result_comes_back_as_the_bytes_that_arrived() -> None:
    """Unknown fields and an odd order of fields included."""
    fixture = Fixture()
    data = b"\x20\x03" + b"\xfa\x07\x03new" + b"\x20\x05"
    await fixture.cache.update("main", ACTION, data)
    assert await fixture.get() == data
    assert await fixture.get("other") is None
    assert await fixture.get("main", Digest.of(b"other action")) is None


@pytest.mark.parametrize("lost", [None, b"one", b"two", b"out", b"err"])
async def test_files_and_streams_must_be_there(lost: bytes | None) -> None:
    fixture = Fixture()
    result = bytes(
        reapi.ActionResult(
            output_files=[
                reapi.OutputFile(path="1", digest=fixture.set.add(b"one").to_message()),
                reapi.OutputFile(path="2", digest=fixture.set.add(b"two").to_message(), is_executable=True),
                reapi.OutputFile(path="empty", digest=EMPTY_DIGEST.to_message()),
            ],
            stdout_digest=fixture.set.add(b"out").to_message(),
            stderr_digest=fixture.set.add(b"err").to_message(),
        )
    )
    await fixture.cache.update("main", ACTION, result)
    assert await fixture.get() is None
    fixture.upload(*([Digest.of(lost)] if lost else []))
    assert await fixture.get() == (None if lost else result)
    fixture.upload()
    assert await fixture.get() == result


async def test_inlined_streams_name_nothing() -> None:
    fixture = Fixture()
    result = bytes(reapi.ActionResult(stdout_raw=b"out", stderr_raw=b"err", exit_code=1))
    await fixture.cache.update("main", ACTION, result)
    assert await fixture.get() == result


async def test_an_empty_digest_message_names_nothing() -> None:
    fixture = Fixture()
    result = b"\x32\x00"
    await fixture.cache.update("main", ACTION, result)
    assert await fixture.get() == result


@pytest.mark.parametrize("lost", [b"in the root", b"in the middle", b"in the leaf", b"tree"])
async def test_a_leaf_of_a_tree_that_is_missing_makes_a_miss(lost: bytes) -> None:
    fixture = Fixture()
    tree = fixture.tree()
    fixture.upload()
    await fixture.cache.update("main", ACTION, with_tree(tree))
    assert await fixture.get() == with_tree(tree)
    await fixture.blobs.remove([tree if lost == b"tree" else Digest.of(lost)])
    assert await fixture.get() is None
    fixture.upload()
    assert await fixture.get() == with_tree(tree)


@pytest.mark.parametrize("lost", [b"in the root", b"in the middle", b"in the leaf"])
async def test_a_result_may_come_before_its_tree(lost: bytes) -> None:
    fixture = Fixture()
    tree = fixture.tree()
    await fixture.cache.update("main", ACTION, with_tree(tree))
    assert await fixture.get() is None
    fixture.blobs.put(tree, fixture.set.blobs[tree])
    assert await fixture.get() is None, "the Tree alone is not enough"
    fixture.upload(Digest.of(lost))
    assert await fixture.get() is None
    fixture.upload()
    assert await fixture.get() == with_tree(tree)


async def test_what_a_tree_names_is_worked_out_once() -> None:
    fixture = Fixture()
    tree = fixture.tree()
    await fixture.cache.update("main", ACTION, with_tree(tree))
    fixture.upload()
    first = fixture.cache.get("main", ACTION)
    assert inspect.isawaitable(first)
    assert await first == with_tree(tree)
    assert fixture.cache.get("main", ACTION) == with_tree(tree), "an answer at once"


async def test_a_tree_that_came_later_and_is_none_makes_a_miss() -> None:
    fixture = Fixture()
    tree = fixture.set.add(b"\xff\xff no tree")
    await fixture.cache.update("main", ACTION, with_tree(tree))
    fixture.upload()
    assert await fixture.get() is None


async def test_a_large_tree_is_read_as_well() -> None:
    fixture = Fixture()
    files = [fixture.file(f"{'n' * 300}{number}", b"%d" % number) for number in range(1_000)]
    tree = fixture.set.add(bytes(reapi.Tree(root=reapi.Directory(files=files))))
    assert tree.size_bytes > 256 << 10
    fixture.upload()
    await fixture.cache.update("main", ACTION, with_tree(tree))
    assert await fixture.get() == with_tree(tree)
    await fixture.blobs.remove([Digest.of(b"999")])
    assert await fixture.get() is None


DIRECTORY_FILES = {"a": b"1", "d/b": b"2", "d/e/c": b"3", "f/e/c": b"3", "empty/": b""}


@pytest.mark.parametrize("lost", [b"1", b"2", b"3", b"root"])
async def test_all_below_a_root_directory_must_be_there(lost: bytes) -> None:
    fixture = Fixture()
    root = fixture.set.directory(dict(DIRECTORY_FILES))
    fixture.upload()
    await fixture.cache.update("main", ACTION, with_root(root))
    assert await fixture.get() == with_root(root)
    await fixture.blobs.remove([root if lost == b"root" else Digest.of(lost)])
    assert await fixture.get() is None
    fixture.upload()
    assert await fixture.get() == with_root(root)


async def test_each_directory_below_a_root_must_be_there() -> None:
    fixture = Fixture()
    root = fixture.set.directory(dict(DIRECTORY_FILES))
    fixture.upload()
    await fixture.cache.update("main", ACTION, with_root(root))
    for digest, data in fixture.set.blobs.items():
        if digest.is_empty:
            continue
        await fixture.blobs.remove([digest])
        assert await fixture.get() is None
        fixture.blobs.put(digest, data)
        assert await fixture.get() == with_root(root)


async def test_a_result_may_come_before_its_root_directory() -> None:
    fixture = Fixture()
    root = fixture.set.directory(dict(DIRECTORY_FILES))
    await fixture.cache.update("main", ACTION, with_root(root))
    assert await fixture.get() is None
    fixture.blobs.put(root, fixture.set.blobs[root])
    assert await fixture.get() is None
    fixture.upload()
    assert await fixture.get() == with_root(root)


async def test_a_directory_with_both_forms_needs_both() -> None:
    fixture = Fixture()
    tree, root = fixture.tree(), fixture.set.directory({"x": b"only in the root directory"})
    result = bytes(
        reapi.ActionResult(
            output_directories=[
                reapi.OutputDirectory(
                    path="out", tree_digest=tree.to_message(), root_directory_digest=root.to_message()
                )
            ]
        )
    )
    fixture.upload(Digest.of(b"only in the root directory"))
    await fixture.cache.update("main", ACTION, result)
    assert await fixture.get() is None
    fixture.upload()
    assert await fixture.get() == result


async def test_a_doubled_dag_is_expanded_in_linear_time() -> None:
    fixture = Fixture()
    digest = fixture.set.directory({"leaf": b"x"})
    for _ in range(30):
        nodes = [reapi.DirectoryNode(name=name, digest=digest.to_message()) for name in ("l", "r")]
        digest = fixture.set.add(bytes(reapi.Directory(directories=nodes)))
    fixture.upload()
    await fixture.cache.update("main", ACTION, with_root(digest))
    assert await fixture.get() == with_root(digest)
    assert len(fixture.results.results["main", ACTION].references) == 32


async def test_a_hash_with_two_sizes_can_never_be_complete() -> None:
    fixture = Fixture()
    right = fixture.set.add(b"output")
    fixture.upload()
    for digests in ([right, Digest(right.hash, 7)], [Digest(right.hash, 7), right]):
        files = [reapi.OutputFile(path=str(at), digest=digest.to_message()) for at, digest in enumerate(digests)]
        await fixture.cache.update("main", ACTION, bytes(reapi.ActionResult(output_files=files)))
        assert await fixture.get() is None


def named(hash_: str, size_bytes: int) -> bytes:
    digest = reapi.Digest(hash=hash_, size_bytes=size_bytes)
    return bytes(reapi.ActionResult(output_files=[reapi.OutputFile(path="x", digest=digest)]))


@pytest.mark.parametrize(
    "action_result",
    [
        b"\xff\xff\xff",
        b"\x12\x05\x0a",
        named("abc", 3),
        named("A" * 64, 3),
        named("g" * 64, 3),
        named(ACTION.hash, -1),
        named(Digest.of(b"", DigestFunction.SHA1).hash, 1),
        with_tree(Digest("0" * 64, MAX_TREE_BYTES + 1)),
        with_root(Digest("0" * 64, MAX_DIRECTORY_BYTES + 1)),
    ],
)
async def test_a_malformed_result_is_refused(action_result: bytes) -> None:
    fixture = Fixture()
    with pytest.raises(InvalidArgumentError):
        await fixture.cache.update("main", ACTION, action_result)
    assert not fixture.results.results


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x02\xff\xff", b"\x0a\x0a\x0a\x08\x0a\x01a\x12\x03\x0a\x01z"])
async def test_a_tree_that_is_none_is_refused(data: bytes) -> None:
    fixture = Fixture()
    tree = fixture.set.add(data)
    fixture.upload()
    with pytest.raises(InvalidArgumentError, match=f"tree {tree}"):
        await fixture.cache.update("main", ACTION, with_tree(tree))


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x12\x08\x0a\x01a\x12\x03\x0a\x01z"])
async def test_a_directory_that_is_none_is_refused(data: bytes) -> None:
    fixture = Fixture()
    root = fixture.set.add(data)
    fixture.upload()
    with pytest.raises(InvalidArgumentError, match=f"directory {root}"):
        await fixture.cache.update("main", ACTION, with_root(root))


async def test_a_refused_result_leaves_the_old_one() -> None:
    fixture = Fixture()
    await fixture.cache.update("main", ACTION, b"\x20\x01")
    with pytest.raises(InvalidArgumentError):
        await fixture.cache.update("main", ACTION, b"\xff")
    assert await fixture.get() == b"\x20\x01"


@pytest.mark.parametrize("function", list(DigestFunction))
async def test_digests_are_by_the_function_of_the_action(function: DigestFunction) -> None:
    fixture = Fixture()
    action, output = Digest.of(b"action", function), Digest.of(b"output", function)
    await fixture.cache.update("main", action, named(output.hash, output.size_bytes))
    assert await fixture.get("main", action) is None
    fixture.blobs.put(output, b"output")
    assert await fixture.get("main", action) == named(output.hash, output.size_bytes)


async def test_a_result_that_was_replaced_while_its_tree_was_read_stays_replaced() -> None:
    fixture = Fixture()
    tree = fixture.tree()
    await fixture.cache.update("main", ACTION, with_tree(tree))
    fixture.upload()
    look_up = fixture.cache.get("main", ACTION)
    assert inspect.isawaitable(look_up)
    reading = asyncio.ensure_future(look_up)
    await asyncio.sleep(0)
    fixture.results.results["main", ACTION] = StoredActionResult(b"\x20\x07", [])
    assert await reading == b"\x20\x07"
    assert await fixture.get() == b"\x20\x07"


@pytest.mark.parametrize("kind", ["tree", "root"])
@pytest.mark.parametrize("files", [100, 5_000])
async def test_a_large_directory_keeps_nobody_waiting(kind: str, files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Fixture()
    directory = bytes(reapi.Directory(files=[fixture.file(f"{number:05}", b"%d" % number) for number in range(files)]))
    is_large = len(directory) > INLINE_PARSE_BYTES
    message = message_field(1, directory) if kind == "tree" else directory
    result = (with_tree if kind == "tree" else with_root)(fixture.set.add(message))
    fixture.upload()
    threads: set[threading.Thread] = set()
    parse = Digest.parse

    def watched(hash_: str, size_bytes: int, function: DigestFunction, field: str) -> Digest:
        if field.startswith(("tree ", "directory ")):
            threads.add(threading.current_thread())
        return parse(hash_, size_bytes, function, field)

    monkeypatch.setattr(Digest, "parse", watched)
    await fixture.cache.update("main", ACTION, result)
    assert await fixture.get() == result
    assert [thread is threading.current_thread() for thread in threads] == [not is_large]


@pytest.mark.parametrize("files", [3, 5_000])
async def test_a_large_action_result_is_taken_apart_beside_others(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Fixture()
    outputs = [
        reapi.OutputFile(path=f"{number:05}", digest=fixture.set.add(b"%d" % number).to_message())
        for number in range(files)
    ]
    result = bytes(reapi.ActionResult(output_files=outputs))
    fixture.upload()
    threads: set[threading.Thread] = set()
    parse = Digest.parse

    def watched(hash_: str, size_bytes: int, function: DigestFunction, field: str) -> Digest:
        threads.add(threading.current_thread())
        return parse(hash_, size_bytes, function, field)

    monkeypatch.setattr(Digest, "parse", watched)
    await fixture.cache.update("main", ACTION, result)
    assert await fixture.get() == result
    assert [thread is threading.current_thread() for thread in threads] == [len(result) <= INLINE_PARSE_BYTES]
