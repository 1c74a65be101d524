"""Archives become Directories; what is malformed, too large or leads elsewhere becomes an error."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import random
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.contract.cas.blob_making import content, missing, read
from tests.contract.cas.conftest import Stores, in_memory

from lathe_cas.blob_store import BlobStore
from lathe_cas.remote_asset import unpacking as unpacking_module
from lathe_cas.remote_asset.archive import ArchiveEntry, ArchiveError, ArchiveLimits
from lathe_cas.remote_asset.spool import Spool
from lathe_cas.remote_asset.unpacking import unpack
from lathe_protos import reapi
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import LatheError, NotFoundError, ResourceExhaustedError

FILES = {
    "top/script.sh": b"#!/bin/sh\n",
    "top/below/large.bin": content(3_000_000),
    "top/below/empty": b"",
    "top/b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.txt": b"books",
    f"top/{'long' * 40}/{'name' * 40}.txt": b"long",
}
EXECUTABLE = "top/script.sh"


def tar(files: dict[str, bytes], *more: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755 if name == EXECUTABLE else 0o644
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return stream.getvalue()


STORED_AS_IT_IS = random.Random(0).randbytes(1000)
"""Not to be compressed, so a zip has it byte for byte."""


def zipped(files: dict[str, bytes], *more: zipfile.ZipInfo) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o100755 if name == EXECUTABLE else 0o100644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
        for info in more:
            archive.writestr(info, b"target")
    return stream.getvalue()


FORMS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "tar": tar,
    "tar-gnu": lambda files: tar(files, form=tarfile.GNU_FORMAT),
    "tar.gz": lambda files: gzip.compress(tar(files)),
    "tar.gz in members": lambda files: b"".join(
        gzip.compress(tar(files)[start : start + 100_000]) for start in range(0, len(tar(files)), 100_000)
    ),
    "tar.bz2": lambda files: bz2.compress(tar(files)),
    "tar.xz": lambda files: lzma.compress(tar(files), preset=0),
    "zip": zipped,
}


class Unpacking:
    """Unpacks bytes into a store."""

    def __init__(self, blobs: BlobStore, directory: Path) -> None:
        self.blobs = blobs
        self.directory = directory
        self.limits = ArchiveLimits()

    async def __call__(self, archive: bytes, subdirectory: tuple[str, ...] = ()) -> Digest:
        with Spool(self.directory, []) as spool:
            await spool.write(archive)
            await spool.flush()
            function = DigestFunction.SHA256
            return await unpack(spool, self.blobs, function, self.limits, subdirectory, self.directory)

    async def files(self, root: Digest, above: str = "") -> dict[str, bytes]:
        """Read all files below a Directory; those that may be run end with a star."""
        directory = reapi.Directory().parse(await read(self.blobs, root))
        found: dict[str, bytes] = {}
        for file in directory.files:
            name = above + file.name + ("*" if file.is_executable else "")
            found[name] = await read(self.blobs, Digest.from_message(file.digest))
        for child in directory.directories:
            found |= await self.files(Digest.from_message(child.digest), f"{above}{child.name}/")
        names = [child.name for child in directory.directories]
        assert names == sorted(names), "a Directory has one form only"
        return found


@pytest.fixture
def unpacking(stores: Stores, tmp_path: Path) -> Unpacking:
    return Unpacking(stores.blobs, tmp_path)


@pytest.mark.parametrize(
    ("stores", "form"),
    [*(("memory", form) for form in FORMS), ("lmdb", "tar"), ("lmdb, compressing", "tar"), ("sharded", "tar")],
    indirect=["stores"],
)
async def test_an_archive_becomes_a_tree_of_directories(unpacking: Unpacking, form: str) -> None:
    root = await unpacking(FORMS[form](FILES))

    expected = {name + ("*" if name == EXECUTABLE else ""): data for name, data in FILES.items()}
    assert await unpacking.files(root) == expected
    assert [path.name for path in unpacking.directory.iterdir() if path.name != "store"] == []


@in_memory
@pytest.mark.parametrize("form", ["tar.gz", "zip"])
async def test_part_of_an_archive_is_taken_alone(unpacking: Unpacking, form: str) -> None:
    root = await unpacking(FORMS[form](FILES), ("top", "below"))

    assert set(await unpacking.files(root)) == {"large.bin", "empty"}
    assert missing(unpacking.blobs, Digest.of(b"books")) == [Digest.of(b"books")]
    with pytest.raises(NotFoundError, match="top/beyond"):
        await unpacking(FORMS[form](FILES), ("top", "beyond"))


@in_memory
async def test_empty_directories_and_odd_spellings_of_names(unpacking: Unpacking) -> None:
    empty, root_entry = tarfile.TarInfo("./top/empty"), tarfile.TarInfo("./")
    empty.type = root_entry.type = tarfile.DIRTYPE

    root = await unpacking(tar({"./top//a": b"a"}, root_entry, empty, empty))

    top = reapi.Directory().parse(await read(unpacking.blobs, root)).directories[0]
    directory = reapi.Directory().parse(await read(unpacking.blobs, Digest.from_message(top.digest)))
    assert ([file.name for file in directory.files], [node.name for node in directory.directories]) == (
        ["a"],
        ["empty"],
    )


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "target"
    return info


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def described(kind: bytes, description: bytes, times: int = 1) -> bytes:
    """Make a tar of one file with headers in front of its own."""
    header = member("description", kind, len(description)).tobuf(format=tarfile.GNU_FORMAT)
    padding = bytes(-len(description) % tarfile.BLOCKSIZE)
    return (header + description + padding) * times + tar({"a": b"1"})


COMMENT = b"21 comment=some text\n"


def cut_off_between_files() -> bytes:
    """Make a gzip whose end is missing, and whose beginning is one whole file of a tar."""
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(tar({"a": b"1", "b": b"2"})[:1024]) + compressor.flush(zlib.Z_SYNC_FLUSH)


REFUSED = {
    "cut off gzip between files": cut_off_between_files(),
    "absolute": tar({"/etc/passwd": b""}),
    "absolute zip": zipped({"/etc/passwd": b""}),
    "parent": tar({"a/../../b": b""}),
    "parent zip": zipped({"../b": b""}),
    "backslash": tar({"..\\b": b""}),
    "symlink": tar({}, member("link", tarfile.SYMTYPE)),
    "symlink zip": zipped({}, zip_link("link")),
    "hard link": tar({"target": b""}, member("link", tarfile.LNKTYPE)),
    "character device": tar({}, member("null", tarfile.CHRTYPE)),
    "fifo": tar({}, member("pipe", tarfile.FIFOTYPE)),
    "not UTF-8": tar({"caf\udce9": b""}, form=tarfile.GNU_FORMAT),
    "twice": tar({"a": b"1"}, member("a", size=5)),
    "file and directory": tar({"a": b"1", "a/b": b"2"}),
    "directory and file": tar({"a/b": b"2", "a": b"1"}),
    "file at the root": tar({}, member("./", size=100)),
    "pax header without records": described(tarfile.XHDTYPE, b"1" * 1000),
    "pax header whose records overlap": described(tarfile.XHDTYPE, b"3 a" * 300 + b"=1\n"),
    "pax header that goes on and on": described(tarfile.XGLTYPE, COMMENT * 20_000),
    "pax header with a path without end": described(tarfile.XHDTYPE, b"6000 path=" + b"a" * 5989 + b"\n"),
    "pax header of a sparse file": described(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n"),
    "header after header": described(tarfile.XHDTYPE, COMMENT, times=9),
    "too deep": tar({"/".join(["d"] * 65): b""}),
    "nothing": b"",
    "no archive": b"certainly not an archive" * 100,
    "a gzip of none": gzip.compress(b"certainly not an archive" * 100),
    "cut off": tar(FILES)[:1_000_000],
    "cut off gzip": gzip.compress(tar(FILES))[:1_000_000],
    "cut off bzip2": bz2.compress(tar({"a": content(100_000)}))[:50_000],
    "cut off xz": lzma.compress(tar({"a": content(100_000)}))[:50_000],
    "cut off zip": zipped(FILES)[:1_000_000],
    "damaged header": tar({"a": b"1", "b": b"2"})[:1024] + b"x" * 512 + bytes(10_240),
    "damaged zip": zipped({"a": b"1" * 1000}).replace(b"PK\1\2", b"PK\1\3"),
    "zip of other content": zipped({"a": STORED_AS_IT_IS}).replace(STORED_AS_IT_IS[100:110], bytes(10)),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(100),
}


@in_memory
@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_refused(unpacking: Unpacking, name: str) -> None:
    with pytest.raises(ArchiveError):
        await unpacking(REFUSED[name])


@in_memory
async def test_a_header_cannot_make_us_read_without_end(unpacking: Unpacking) -> None:
    # A pax header of a gigabyte, which as zeros is a megabyte of gzip.
    header = member("pax", tarfile.XHDTYPE, 1 << 30).tobuf()

    with pytest.raises(ArchiveError, match="a header of 1073741824 bytes"):
        await unpacking(gzip.compress(header + bytes(1_000_000)))


@in_memory
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
async def test_headers_that_say_nothing_of_use_do_no_harm(unpacking: Unpacking, kind: bytes) -> None:
    root = await unpacking(described(kind, COMMENT, times=8))

    assert await unpacking.files(root) == {"a": b"1"}


@in_memory
async def test_headers_of_headers_come_to_an_end(unpacking: Unpacking) -> None:
    long_name = member("././@LongLink", tarfile.GNUTYPE_LONGNAME, 512).tobuf(format=tarfile.GNU_FORMAT) + b"a" * 512

    with pytest.raises(ArchiveError):
        await unpacking(gzip.compress(long_name * 5_000))


@in_memory
async def test_a_zip_cannot_make_us_read_a_huge_directory(unpacking: Unpacking) -> None:
    size_bytes = 17 << 20
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size_bytes, 4, 0)

    with pytest.raises(ArchiveError, match="at once"):
        await unpacking(b"PK\3\4" + bytes(size_bytes) + end)


@in_memory
async def test_entries_of_a_zip_are_counted_before_there_is_an_object_for_each(
    unpacking: Unpacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped(dict.fromkeys("abcd", b""))
    unpacking.limits = ArchiveLimits(max_entries=3)
    monkeypatch.setattr(zipfile, "ZipInfo", None)

    with pytest.raises(ResourceExhaustedError, match="remote_asset_max_entries"):
        await unpacking(archive)


@in_memory
async def test_a_zip_within_a_zip_is_no_directory(unpacking: Unpacking) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for name in "abcd":
            archive.writestr(name, b"")
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("inner.zip", inner.getvalue())
    unpacking.limits = ArchiveLimits(max_entries=3)

    assert await unpacking.files(await unpacking(outer.getvalue())) == {"inner.zip": inner.getvalue()}


@in_memory
@pytest.mark.parametrize("form", ["tar.gz", "zip"])
async def test_bounds_on_entries_and_bytes(unpacking: Unpacking, form: str) -> None:
    make = FORMS[form]
    unpacking.limits = ArchiveLimits(max_entries=3, max_bytes=2_000_000)

    await unpacking(make({"a": bytes(1_000_000), "b": bytes(1_000_000), "c": b""}))
    with pytest.raises(ResourceExhaustedError, match="remote_asset_max_entries"):
        await unpacking(make(dict.fromkeys("abcd", b"")))
    await unpacking(make({"a/b/c": b""}))
    with pytest.raises(ResourceExhaustedError, match="remote_asset_max_entries"):
        await unpacking(make({"a/b/c/d": b""}))
    with pytest.raises(ResourceExhaustedError, match="remote_asset_max_unpacked_bytes"):
        await unpacking(make({"a": bytes(1_000_000), "b": bytes(1_000_001)}))


@in_memory
async def test_a_size_that_is_only_claimed_is_refused_before_anything_is_read(unpacking: Unpacking) -> None:
    huge = member("huge", size=1 << 50).tobuf(format=tarfile.GNU_FORMAT)

    with pytest.raises(ResourceExhaustedError):
        await unpacking(gzip.compress(huge))


@in_memory
@pytest.mark.parametrize("form", FORMS)
async def test_damage_anywhere_is_an_error_of_ours_or_none(unpacking: Unpacking, form: str) -> None:
    data = FORMS[form]({"a/b": content(200), "c": content(2_000, 1)})
    for place in range(0, len(data), max(1, len(data) // 60)):
        damaged = data[:place] + bytes((data[place] ^ 0x55,)) + data[place + 1 :]
        with contextlib.suppress(LatheError):
            await unpacking(damaged)


async def test_an_archive_keeps_no_thread_from_others(unpacking: Unpacking, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    next_group = unpacking_module._next_group

    def watched(entries: Iterator[ArchiveEntry]) -> list[ArchiveEntry]:
        threads.add(threading.current_thread().name)
        return next_group(entries)

    monkeypatch.setattr(unpacking_module, "_next_group", watched)
    await unpacking(tar({"a": b"a"}))
    assert threads
    assert all(name.startswith("unpack") for name in threads)
