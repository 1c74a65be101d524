"""``lathe-cas fsck --salvage``: of a sound store everything, of a damaged one all but what the damage hit."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import lmdb as lmdb_library
import pytest
import zstandard
from tests.contract.cas.blob_making import content, feed, put, upload_name
from tests.contract.cas.lmdb_store import LmdbStore
from tests.contract.cas.recount import recount

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.fsck.child import check_here
from lathe_cas.fsck.command import main
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_shared.digest import Digest, DigestFunction

PAGE = 4_096
CHUNK = 65_520
EVERYTHING, NOT_EVERYTHING, CANNOT_SALVAGE = range(3)
SIZES_BYTES = (1, 60, 500, 2_010, 2_011, 4_000, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 77)


def fsck(path: Path, *flags: str) -> int:
    return int(main([f"--data-dir={path}", f"--temp-dir={path.parent}", *flags], {}, check_here))


def salvage(path: Path, target: Path) -> int:
    return fsck(path, f"--salvage={target}")


@dataclass
class Contents:
    """What a store holds, by key: touch step and bytes.

    Attributes:
        blobs: The blobs, decoded.
        results: The action results, with references.
    """

    blobs: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    results: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)


def contents(path: Path) -> Contents:
    """Read a store, and check on the way that all its parts agree: each blob's digest included."""
    environment = LmdbEnvironment(path, 1 << 30, create=False)
    recount(environment)
    found = Contents()
    with environment.read() as txn:
        for key, value in txn.cursor(environment.blobs):
            blob = records.BlobRecord.unpack(value)
            stored = _joined(txn, environment, blob.storage_id)
            if blob.compression:
                with zstandard.ZstdDecompressor().stream_reader(stored, read_across_frames=True) as reader:
                    stored = reader.read()
            found.blobs[key] = blob.step, stored
        for key, value in txn.cursor(environment.action_results):
            result = records.ActionResultRecord.unpack(value)
            found.results[key] = result.step, _joined(txn, environment, result.storage_id)
    environment.close()
    return found


def _joined(txn: lmdb_library.Transaction[bytes], environment: LmdbEnvironment, storage_id: int) -> bytes:
    cursor = txn.cursor(environment.chunks)
    cursor.set_range(records.STORAGE_ID.pack(storage_id))
    pieces = []
    for key, value in cursor:
        if key[:8] != records.STORAGE_ID.pack(storage_id):
            break
        pieces.append(value)
    return b"".join(pieces)


async def live(store: LmdbStore, choose: random.Random, *, rounds: int = 12) -> None:
    """Do what a store does in its life, at random: writes, uploads, uses, overwrites, evictions, an end in between."""
    written: list[Digest] = []
    for number in range(rounds):
        store.now += choose.choice((0, 300, 900))
        for _ in range(choose.randrange(1, 25)):
            data = content(choose.choice(SIZES_BYTES) - choose.randrange(2) or 1, choose.randrange(10**6))
            digest = Digest.of(data, choose.choice(list(DigestFunction)))
            assert await store.blobs.put_many([(digest, memoryview(data))]) == [None]
            written.append(digest)
        for _ in range(choose.randrange(5)):
            named = [d for d in choose.sample(written, min(4, len(written))) if d.function is DigestFunction.SHA256]
            result = StoredActionResult(b"result %d" % number, [(d.key, d.size_bytes) for d in named])
            await store.results.put("main", Digest.of(b"action %d" % choose.randrange(10)), result)
        await store.results.put("main", Digest.of(b"nothing"), StoredActionResult(b"", []))
        store.blobs.find_missing([(d, d.key, d.size_bytes) for d in choose.sample(written, len(written) // 3)])
        big = content(choose.randrange(2, 20) * CHUNK, number)
        upload = await store.blobs.open_upload(upload_name(Digest.of(big), f"upload {number}"))
        await feed(upload, big if number % 2 else big[: len(big) // 2])
        await (upload.finish() if number % 2 else upload.suspend())
        if number == rounds // 2:
            await store.settle()
            await store.close()
            store.configure_compression(on=choose.random() < 0.5)
            await store.open()
    await store.settle()


@pytest.mark.parametrize("seed", range(6))
async def test_of_a_sound_store_everything_is_saved(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    store = LmdbStore(tmp_path / "store", limit_bytes=5 << 20, compress_stored=seed % 2 == 1)
    await store.open()
    await live(store, choose)
    assert store.blobs.status().counters["evicted_blobs"]
    id_ = store.storage.environment.id
    await store.close()
    before = (store.path / "data.mdb").read_bytes()

    assert salvage(store.path, tmp_path / "new") == EVERYTHING

    assert (store.path / "data.mdb").read_bytes() == before
    assert contents(tmp_path / "new") == contents(store.path)
    assert fsck(tmp_path / "new", "--digests") == 0
    new = LmdbStore(tmp_path / "new", limit_bytes=4 << 20)
    await new.open()
    assert new.storage.environment.id == id_
    # It goes on living: what was used least recently still goes first.
    new.now = store.now
    await live(new, choose, rounds=2)
    await new.recount()
    await new.close()


# Damage


@dataclass
class Base:
    """A store before it is damaged.

    Attributes:
        image: Its file.
        contents: What is in it.
        pages: By page, keys of what may be lost with it.
        written: By key of an action result, whatever was stored under it once.
    """

    image: bytes
    contents: Contents
    pages: dict[int, set[bytes]]
    written: dict[bytes, set[bytes]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return asyncio.run(make_base(tmp_path_factory.mktemp("base")))


async def make_base(folder: Path) -> Base:
    store = LmdbStore(folder, limit_bytes=3 << 20)
    await store.open()
    choose = random.Random(4)
    written = defaultdict(set)
    for number in range(8):
        store.now += 300
        seeds = range(40 * number, 40 * number + 40)
        await put(store.blobs, *[content(choose.choice(SIZES_BYTES[:7]), seed) for seed in seeds])
        await put(store.blobs, content(6 * CHUNK, number))
        for action in range(20):
            payload = b"result %d %d" % (number, action)
            digest = Digest.of(b"action %d" % action)
            await store.results.put("main", digest, StoredActionResult(payload, []))
            written[records.action_result_key("main", digest.key)].add(payload)
    await store.settle()
    assert store.blobs.status().counters["evicted_blobs"]
    await store.close()
    image = (folder / "data.mdb").read_bytes()
    return Base(image, contents(folder), pages_of(folder, image), written)


def pages_of(path: Path, image: bytes) -> dict[int, set[bytes]]:
    """Return for each page the keys of blobs and action results of which a part is in it, be it in use or old."""
    pages: dict[int, set[bytes]] = defaultdict(set)

    def note(key: bytes, entry: bytes, size_bytes: int = 0) -> None:
        start = image.find(entry)
        assert start >= 0
        while start >= 0:
            for page in range(start // PAGE, (start + max(size_bytes, len(entry)) - 1) // PAGE + 1):
                pages[page].add(key)
            start = image.find(entry, start + 1)

    environment = LmdbEnvironment(path, 1 << 30, create=False)
    with environment.read() as txn:
        chunks = defaultdict(list)
        for key, value in txn.cursor(environment.chunks):
            chunks[key[:8]].append((key, value))
        for database, place in ((environment.blobs, slice(12, 20)), (environment.action_results, slice(4, 12))):
            for key, value in txn.cursor(database):
                note(key, key + value)
                for chunk_key, data in chunks[value[place]]:
                    note(key, chunk_key)
                    # What is longer lies in overflow pages.
                    if len(data) > 2_010:
                        note(key, data)
    environment.close()
    return pages


def damaged_page(choose: random.Random, page: bytes, other: bytes) -> bytes:
    """Damage a page in one of the ways in which pages go bad."""
    kind = choose.randrange(8)
    if kind < 4:
        # Headers and pointers are few among a page's bytes, and what everything else hangs on.
        place = choose.randrange(PAGE if kind < 2 else 64)
        return page[:place] + bytes((page[place] ^ 1 << choose.randrange(8),)) + page[place + 1 :]
    if kind == 4:
        return bytes(PAGE)
    if kind == 5:
        return choose.randbytes(PAGE)
    if kind == 6:
        return other
    sector = 512 * choose.randrange(8)
    return page[:sector] + choose.randbytes(512) + page[sector + 512 :]


def tree_pages(image: bytes | bytearray) -> list[int]:
    """Return the pages that are of B-trees, or were."""
    return [start // PAGE for start in range(0, len(image), PAGE) if image[start + 10] in (1, 2)]


def salvaged(tmp_path: Path, base: Base, image: bytes, name: str) -> tuple[int, Contents]:
    """Salvage a damaged file, and check that nothing wrong came of it."""
    path, target = tmp_path / f"{name} old", tmp_path / f"{name} new"
    path.mkdir()
    (path / "data.mdb").write_bytes(image)
    code = salvage(path, target)
    assert (path / "data.mdb").read_bytes() == image
    found = contents(target)
    for key, (_, payload) in found.results.items():
        assert payload in base.written[key], name
    if name.endswith("0"):
        assert fsck(target) == 0, name
    shutil.rmtree(path)
    shutil.rmtree(target)
    return code, found


def lost(base: Base, found: Contents) -> set[bytes]:
    return (base.contents.blobs.keys() - found.blobs.keys()) | (base.contents.results.keys() - found.results.keys())


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_page_costs_no_more_than_what_was_in_it(tmp_path: Path, base: Base, seed: int) -> None:
    choose = random.Random(seed)
    everywhere, trees = range(len(base.image) // PAGE), tree_pages(base.image)
    branches = [page for page in trees if base.image[page * PAGE + 10] == 1]
    losses = 0
    for number in range(39):
        page = choose.choice((everywhere[2:], trees, branches)[number % 3])
        other = choose.choice(everywhere) * PAGE
        start = page * PAGE
        bad = damaged_page(choose, base.image[start : start + PAGE], base.image[other : other + PAGE])
        image = base.image[:start] + bad + base.image[start + PAGE :]
        code, found = salvaged(tmp_path, base, image, f"{seed} {number}")
        gone = lost(base, found)
        assert gone <= base.pages[page], f"page {page}, case {number}"
        assert code == (NOT_EVERYTHING if gone else code), f"page {page}, case {number}: a loss was not told"
        losses += len(gone)
    assert losses


def test_without_a_branch_or_the_list_of_databases_all_is_found_and_nothing_deleted(tmp_path: Path, base: Base) -> None:
    branches = [page for page in tree_pages(base.image) if base.image[page * PAGE + 10] == 1]
    lists = [page for page in tree_pages(base.image) if b"garbage" in base.image[page * PAGE : (page + 1) * PAGE]]
    assert branches
    assert lists
    for page in random.Random(1).sample(branches, min(len(branches), 16)) + lists[:16]:
        image = base.image[: page * PAGE] + bytes(PAGE) + base.image[(page + 1) * PAGE :]
        assert salvaged(tmp_path, base, image, str(page)) == (EVERYTHING, base.contents)


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 1)])
def test_without_meta_pages_nothing_is_lost(tmp_path: Path, base: Base, gone: tuple[int, ...]) -> None:
    image = bytearray(base.image)
    for page in gone:
        image[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    code, found = salvaged(tmp_path, base, bytes(image), "metas")
    assert not lost(base, found)
    assert {key: found.blobs[key] for key in base.contents.blobs} == base.contents.blobs
    assert {key: found.results[key] for key in base.contents.results} == base.contents.results
    assert code == NOT_EVERYTHING, "nobody can tell whether that is all"


def test_flipped_bits_of_meta_pages_lose_nothing(tmp_path: Path, base: Base) -> None:
    choose = random.Random(1)
    flips = [(choose.randrange(2), choose.randrange(152), choose.randrange(8)) for _ in range(15)]
    # The number of the transaction, by which the newer page is told: its lowest bits can have the older one seem newer.
    flips += [(page, 144 if sys.byteorder == "little" else 151, bit) for page in range(2) for bit in range(3)]
    for page, place, bit in flips:
        image = bytearray(base.image)
        image[page * PAGE + place] ^= 1 << bit
        code, found = salvaged(tmp_path, base, bytes(image), f"{page} {place} {bit}")
        assert not lost(base, found), f"page {page}, byte {place}, bit {bit}"
        assert code == NOT_EVERYTHING or found == base.contents, f"page {page}, byte {place}, bit {bit}"


def test_however_much_is_damaged_nothing_wrong_is_saved(tmp_path: Path, base: Base) -> None:
    count = len(base.image) // PAGE
    for seed in range(20):
        choose = random.Random(seed)
        image = bytearray(base.image)
        for _ in range(2 << choose.randrange(8)):
            start, other = choose.randrange(count) * PAGE, choose.randrange(count) * PAGE
            page = bytes(image[start : start + PAGE])
            image[start : start + PAGE] = damaged_page(choose, page, bytes(image[other : other + PAGE]))
        del image[choose.choice((len(image), len(image), len(image) // 2 + 100)) :]
        salvaged(tmp_path, base, bytes(image), str(seed))


def test_a_sector_that_the_disk_does_not_give_costs_its_page(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = random.Random(1)
    pages = [*choose.sample(tree_pages(base.image), 8), *choose.sample(range(2, len(base.image) // PAGE), 8), 0]
    read = os.pread
    for page in pages:

        def refuse(descriptor: int, length: int, place: int, page: int = page) -> bytes:
            if place < (page + 1) * PAGE and place + length > page * PAGE:
                raise OSError(5, "Input/output error")
            return read(descriptor, length, place)

        monkeypatch.setattr(os, "pread", refuse)
        code, found = salvaged(tmp_path, base, base.image, str(page))
        gone = lost(base, found)
        assert gone <= base.pages[page]
        assert code == NOT_EVERYTHING or not gone
    assert "pages that the disk did not give" in capsys.readouterr().out


# What a client sends is not taken for pages


def leaf_page(number: int, entries: list[tuple[bytes, bytes]]) -> bytes:
    """Make a leaf of LMDB."""
    nodes, pointers, upper = b"", [], PAGE
    for key, value in entries:
        node = struct.pack("=HHHH", len(value), 0, 0, len(key)) + key + value
        node += bytes(len(node) % 2)
        upper -= len(node)
        pointers.append(upper)
        nodes = node + nodes
    head = struct.pack("=QHHHH", number, 0, 2, 16 + 2 * len(pointers), upper)
    head += struct.pack(f"={len(pointers)}H", *pointers)
    return head + bytes(PAGE - len(head) - len(nodes)) + nodes


def forged_entries() -> list[tuple[bytes, bytes]]:
    """Return record and chunk of an action result that nobody stored."""
    key = records.action_result_key("main", Digest.of(b"forged").key)
    record = records.ActionResultRecord(1, 10**6, 6, records.blob_disk_bytes(6) + 192, 1, 0)
    chunk = cut(b"forged", chunk_seed(record.identity(key)))[0]
    return [(key, record.pack()), (records.CHUNK_KEY.pack(10**6, 0, chunk.checksum), b"forged")]


async def store_with(path: Path, data: bytes) -> bytes:
    store = LmdbStore(path)
    await store.open()
    await put(store.blobs, *[content(1_000, seed) for seed in range(50)])
    await put(store.blobs, data)
    await store.close()
    return (path / "data.mdb").read_bytes()


@pytest.mark.parametrize("damage", ["branches", "metas", "metas and leaf"])
async def test_pages_inside_of_a_blob_are_not_taken_for_the_stores_own(tmp_path: Path, damage: str) -> None:
    # Where a blob comes to lie can be foreseen: here by storing another of its size.
    marker = content(CHUNK)
    first = ((await store_with(tmp_path / "first", marker)).index(marker) - 16) // PAGE
    pages = [leaf_page(first + number, forged_entries()) for number in range(1, 16)]
    data = (b"forger".ljust(PAGE - 16, b".") + b"".join(pages))[:CHUNK]
    image = bytearray(await store_with(tmp_path / "store", data))
    assert image[(first + 1) * PAGE :].startswith(pages[0])
    bad = [page for page in tree_pages(image) if image[page * PAGE + 10] == 1] if damage == "branches" else [0, 1]
    if damage == "metas and leaf":
        # Then nothing is left that says that these pages are a blob's, but for the first of them.
        pointer = struct.pack("=Q", first)
        bad += [page for page in tree_pages(image) if pointer in image[page * PAGE + 16 : (page + 1) * PAGE]]
        assert len(bad) > 2
    for page in bad:
        image[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    (tmp_path / "store" / "data.mdb").write_bytes(image)
    salvage(tmp_path / "store", tmp_path / "new")
    found = contents(tmp_path / "new")
    assert len(found.blobs) == 51 or len(bad) > 2
    assert not found.results
    # Alone, it would have been taken.
    (tmp_path / "store" / "data.mdb").write_bytes(bytes(2 * PAGE) + leaf_page(2, forged_entries()))
    salvage(tmp_path / "store", tmp_path / "forged")
    assert len(contents(tmp_path / "forged").results) == 1


# The command


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A small store, closed."""
    store = LmdbStore(tmp_path / "store")
    await store.open()
    await put(store.blobs, *[content(size_bytes) for size_bytes in SIZES_BYTES])
    await store.close()
    return store.path


def test_it_says_what_is_lost(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = path / "data.mdb"
    file.write_bytes(file.read_bytes().replace(content(4_000), bytes(4_000)))
    assert salvage(path, tmp_path / "new") == NOT_EVERYTHING
    shown = " ".join(capsys.readouterr().out.split())
    assert f"blob {Digest.of(content(4_000)).hash}: 0 of 1 chunks are whole" in shown
    assert f"blobs {len(SIZES_BYTES) - 1} 1 bytes of blobs {sum(SIZES_BYTES) - 4_000:,} 4,000" in shown
    assert "clients upload the rest again" in shown
    assert {entry.name for entry in (tmp_path / "new").iterdir()} == {"data.mdb"}
    assert (tmp_path / "new" / "data.mdb").stat().st_mode & 0o777 == 0o600


def test_it_refuses_what_it_cannot_do(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*flags: str) -> str:
        assert fsck(path, *flags) == CANNOT_SALVAGE
        return capsys.readouterr().err

    assert "is not empty" in refusal("--salvage", str(path))
    assert "needs a value" in refusal("--salvage")
    assert "not together with --repair" in refusal("--salvage=x", "--repair")
    assert "one folder at a time" in refusal("--salvage=x", f"--data-dirs={path},{tmp_path}")
    new = tmp_path / "new"
    monkeypatch.setattr(records, "FORMAT_VERSION", records.FORMAT_VERSION)
    monkeypatch.setattr("lathe_cas.salvage.salvaging.FORMAT_VERSION", records.FORMAT_VERSION + 1)
    assert f"a store of format {records.FORMAT_VERSION}" in refusal(f"--salvage={new}")
    (path / "data.mdb").write_bytes(content(100_000))
    assert "no page of 4096 bytes" in refusal(f"--salvage={new}")
    (path / "data.mdb").unlink()
    assert "holds no store" in refusal(f"--salvage={new}")
    assert not new.exists()


def test_what_cannot_be_written_leaves_nothing_behind(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lathe_cas.salvage.new_store.map_size_for", lambda limit_bytes: 1 << 17)
    assert salvage(path, tmp_path / "new") == CANNOT_SALVAGE
    assert "cannot be written" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


async def test_a_store_in_use_is_not_salvaged(path: Path, tmp_path: Path) -> None:
    store = LmdbStore(path)
    await store.open()
    # From another process: locks are the process's.
    command = [sys.executable, "-m", "lathe_cas", "fsck", f"--data-dir={path}", f"--salvage={tmp_path / 'new'}"]
    refused = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert (refused.returncode, "stop lathe-cas first" in refused.stderr) == (CANNOT_SALVAGE, True)
    await store.close()
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert (done.returncode, "everything was saved" in done.stdout) == (EVERYTHING, True)
