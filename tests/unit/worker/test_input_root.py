"""Input roots: from Directory messages to files."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from tests.unit.worker.memory_blobs import MemoryBlobs

from lathe_protos import reapi
from lathe_shared.digest import Digest
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.testing.builders import BlobSet
from lathe_worker import directory_loader, input_root
from lathe_worker.directory_loader import DirectoryLoader
from lathe_worker.file_cache import FileCache
from lathe_worker.input_root import InputRootPlan
from lathe_worker.sandbox import ActionUser


class Setup:
    def __init__(self, directory: Path) -> None:
        self.sources = BlobSet()
        self.blobs = MemoryBlobs()
        self.loader = DirectoryLoader(self.blobs)
        self.cache = FileCache(directory / "cache", 1 << 30, self.blobs)
        self.cache.open()
        self.root = directory / "root"
        self.root.mkdir()

    async def plan(self, root: Digest, *extra: str, max_nodes: int = 1000) -> InputRootPlan:
        self.blobs.blobs.update(self.sources.blobs)
        tree = await self.loader.load("main", root)
        return input_root.plan(tree, [path.split("/") for path in extra], max_nodes)

    async def build(self, root: Digest, *extra: str, user: ActionUser | None = None) -> None:
        plan = await self.plan(root, *extra)
        async with self.cache.hold("main", plan.cache_names):
            input_root.build(plan, self.root, self.cache, user)

    def listing(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.root)): f"{path.lstat().st_mode & 0o777:o}"
            for path in sorted(self.root.rglob("*"))
        }


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


async def test_a_tree_becomes_files(setup: Setup) -> None:
    root = setup.sources.directory(
        {"a/b/file": b"1", "a/run": (b"2", True), "a/b/none": b"", "empty/": b""}, {"a/link": "b/file"}
    )
    await setup.build(root)

    assert setup.listing() == {
        "a": "755",
        "a/b": "755",
        "a/b/file": "444",
        "a/b/none": "444",
        "a/link": "777",
        "a/run": "555",
        "empty": "755",
    }
    assert (setup.root / "a/link").read_bytes() == b"1"
    assert (setup.root / "a/b/file").stat().st_nlink == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
async def test_for_another_user_files_are_links_into_the_cache_and_directories_are_theirs(setup: Setup) -> None:
    root = setup.sources.directory({"a/file": b"1", "a/same": b"1", "a/none": b""}, {"link": "/etc"})
    await setup.build(root, "out/deep", user=ActionUser(64321, 64322))

    assert (setup.root / "a/file").stat().st_ino == (setup.root / "a/same").stat().st_ino
    assert (setup.root / "a/file").stat().st_uid == 0
    for path in ("", "a", "out", "out/deep", "link"):
        status = (setup.root / path).lstat()
        assert (status.st_uid, status.st_gid) == (64321, 64322)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
async def test_too_many_links_fall_back_to_a_copy(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(31, "Too many links")

    monkeypatch.setattr(os, "link", refuse)
    await setup.build(setup.sources.directory({"file": b"1"}), user=ActionUser(64321, 64321))

    status = (setup.root / "file").stat()
    assert (status.st_nlink, status.st_mode & 0o777, status.st_uid) == (1, 0o444, 0)


async def test_copying_works_where_the_kernel_cannot_help(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    await setup.build(setup.sources.directory({"file": b"content" * 1000}))

    assert (setup.root / "file").read_bytes() == b"content" * 1000


async def test_parents_of_outputs_are_made_beside_what_is_there(setup: Setup) -> None:
    root = setup.sources.directory({"a/file": b"1"}, {"link": "a"})
    await setup.build(root, "a/new/deep", "a/file/below", "link/below", "fresh")

    assert set(setup.listing()) == {"a", "a/file", "a/new", "a/new/deep", "fresh", "link"}


async def test_node_properties_are_set_on_a_copy(setup: Setup) -> None:
    digest = setup.sources.add(b"1")
    when = reapi.NodeProperties(mtime=datetime.datetime.fromtimestamp(1e9, datetime.UTC), unix_mode=0o4755)
    directory = reapi.Directory(
        files=[reapi.FileNode(name="file", digest=digest.to_message(), node_properties=when)],
        node_properties=reapi.NodeProperties(unix_mode=0o700),
    )
    root = setup.sources.add(bytes(directory))
    await setup.build(root)

    status = (setup.root / "file").stat()
    assert (status.st_mode & 0o7777, status.st_mtime) == (0o755, 1_000_000_000)
    assert status.st_nlink == 1
    assert setup.root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "nul\0"])
@pytest.mark.parametrize("kind", ["files", "directories", "symlinks"])
async def test_names_that_lead_elsewhere_are_refused(setup: Setup, name: str, kind: str) -> None:
    digest = setup.sources.add(b"").to_message()
    directory = reapi.Directory()
    if kind == "files":
        directory.files.append(reapi.FileNode(name=name, digest=digest))
    elif kind == "directories":
        directory.directories.append(reapi.DirectoryNode(name=name, digest=digest))
    else:
        directory.symlinks.append(reapi.SymlinkNode(name=name, target="x"))
    root = setup.sources.add(bytes(directory))

    with pytest.raises(InvalidArgumentError):
        await setup.build(root)
    assert setup.listing() == {}


async def test_a_name_that_is_a_symlink_and_a_directory_is_refused(setup: Setup) -> None:
    """Else the directory's files would go where the symlink leads."""
    inner = setup.sources.directory({"passwd": b"evil"})
    directory = reapi.Directory(
        directories=[reapi.DirectoryNode(name="x", digest=inner.to_message())],
        symlinks=[reapi.SymlinkNode(name="x", target="/etc")],
    )
    root = setup.sources.add(bytes(directory))

    with pytest.raises(InvalidArgumentError, match="twice"):
        await setup.build(root)


async def test_a_name_too_long_for_the_disk_is_the_client_s_fault(setup: Setup) -> None:
    with pytest.raises(InvalidArgumentError, match="too long"):
        await setup.build(setup.sources.directory({"x" * 300: b"1"}))


async def test_directories_that_unfold_without_bound_are_refused(setup: Setup) -> None:
    digest = setup.sources.directory({})
    for _ in range(40):
        node = digest.to_message()
        directory = reapi.Directory(
            directories=[reapi.DirectoryNode(name="a", digest=node), reapi.DirectoryNode(name="b", digest=node)]
        )
        digest = setup.sources.add(bytes(directory))

    with pytest.raises(InvalidArgumentError, match="more than 1000 nodes"):
        await setup.plan(digest)


async def test_a_small_tree_comes_in_one_call_and_is_remembered(setup: Setup) -> None:
    root = setup.sources.directory({f"{a}/{b}/file{a}{b}": b"1" for a in "abc" for b in "xyz"})
    await setup.plan(root)
    await setup.plan(root)

    assert (setup.blobs.tree_calls, setup.blobs.read_calls) == (1, 0)


async def test_a_large_tree_is_fetched_level_by_level_for_what_is_new(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_loader, "MAX_PREFETCHED_DIRECTORIES", 3)
    files = {f"{a}/{b}/file{a}{b}": b"1" for a in "abc" for b in "xyz"}
    await setup.plan(setup.sources.directory(files))
    await setup.plan(setup.sources.directory({**files, "a/x/more": b"2"}))

    assert (setup.blobs.tree_calls, setup.blobs.read_calls) == (1, 3)
    assert sum(setup.blobs.reads.values()) == 3  # the root, a, and a/x


async def test_remembered_directories_are_bounded(setup: Setup) -> None:
    setup.loader = DirectoryLoader(setup.blobs, max_remembered_nodes=3)
    for number in range(10):
        await setup.plan(setup.sources.directory({f"file{number}": b"1"}))

    assert len(setup.loader._remembered) == 1
    assert setup.loader._remembered_nodes == 2


async def test_missing_directories_are_reported_and_the_rest_is_planned(setup: Setup) -> None:
    root = setup.sources.directory({"a/one": b"1", "b/two": b"2"})
    gone = setup.sources.directory({"one": b"1"})
    setup.blobs.blobs.update(setup.sources.blobs)
    del setup.blobs.blobs[gone]
    tree = await setup.loader.load("main", root)

    assert tree.missing == [gone]
    assert [file[0] for file in input_root.plan(tree, []).files] == ["b/two"]
