"""Archives as their files, one after the other, within bounds and without a way out of their root.

Nothing is ever unpacked onto a disk: what an archive calls its files are names in Directory messages. Symlinks, hard
links, devices and sparse files are refused all the same, since what they mean depends on where they are unpacked.

Spec: POSIX pax; PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol, cast

from lathe_cas.remote_asset.decompression import ForwardReader
from lathe_cas.remote_asset.spool import Spool
from lathe_cas.remote_asset.tar_headers import TarHeaders
from lathe_shared.digest import Digest
from lathe_shared.errors import AbortedError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lathe_shared.digest import DigestFunction

SMALL_BYTES = 1 << 20
"""Files up to this size are held in memory, larger ones in a file without a name."""

_MAX_READ_BYTES = 16 << 20
"""Bound on what is read at once. Only a zip's central directory, some 300,000 names, comes near it."""

_PIECE_BYTES = 1 << 20

_ZIP_ENTRY = b"PK\1\2"
"""What each entry of a zip's directory begins with."""

_MALFORMED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    # Headers in front of headers, without end; a zip that is encrypted, or compressed in a way of its own.
    RecursionError,
    RuntimeError,
)
"""What the standard library raises over bytes that it did not expect."""


class ArchiveError(AbortedError):
    """An archive that is malformed, or holds what is refused."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """How much an archive may hold.

    Attributes:
        max_entries: Files and directories.
        max_bytes: Bytes of all files together.
        max_depth: Directories within one another.
    """

    max_entries: int = 100_000
    max_bytes: int = 16 << 30
    max_depth: int = 64


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """A directory, or a file with its content.

    Attributes:
        path: Where it is, from the root.
        digest: The file's; None for a directory.
        data: The content if it is small.
        spool: The content if not; closed by whoever gets it.
        is_executable: Whether it may be run.
    """

    path: tuple[str, ...]
    digest: Digest | None = None
    data: bytes | None = None
    spool: Spool | None = None
    is_executable: bool = False


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class ArchiveReader:
    """Reads one archive; in any thread, though in one at a time.

    Args:
        file: The archive, at its beginning.
        function: How to hash its files.
        limits: What it may hold.
        spool_directory: Where large files wait.
    """

    def __init__(self, file: IO[bytes], function: DigestFunction, limits: ArchiveLimits, spool_directory: Path) -> None:
        self._file = file
        self._function = function
        self._limits = limits
        self._spool_directory = spool_directory
        self._entries = 0
        self._parents: set[tuple[str, ...]] = set()
        self._left_bytes = limits.max_bytes

    def entries(self) -> Iterator[ArchiveEntry]:
        """Yield the entries.

        Raises:
            ArchiveError: It is no archive of a known form, is malformed, or holds what is refused.
            ResourceExhaustedError: It holds too much.
        """
        magic = self._file.read(4)
        self._file.seek(0)
        try:
            yield from self._zip_entries() if magic in (b"PK\3\4", b"PK\5\6") else self._tar_entries()
        except _MALFORMED as error:
            raise ArchiveError(f"the archive cannot be read: {str(error) or type(error).__name__}") from error

    def _tar_entries(self) -> Iterator[ArchiveEntry]:
        reader = ForwardReader(self._file, _MAX_READ_BYTES)
        headers = TarHeaders(reader)
        # What it needs of a file that it reads is this much.
        with tarfile.open(fileobj=cast("IO[bytes]", headers), mode="r:") as tar:
            while (member := tar.next()) is not None:
                # Or it keeps all of them.
                vars(tar)["members"].clear()
                if not self._counts(member.name):
                    if not member.isdir():
                        # Else its bytes would be passed over, however many they are.
                        raise ArchiveError(f"{member.name!r} is not a name for a file in an archive")
                    continue
                if member.isdir():
                    yield self._directory_entry(member.name)
                elif member.isreg() and not member.issparse():
                    yield self._file_entry(member.name, reader, member.size, bool(member.mode & stat.S_IXUSR))
                else:
                    raise _refused(member.name)
        if headers.last_read.strip(b"\0"):
            # It takes a header that it does not understand for the end.
            raise ArchiveError("the archive is malformed behind its first files")

    def _zip_entries(self) -> Iterator[ArchiveEntry]:
        file = _BoundedFile(self._file, self._limits.max_entries)
        with zipfile.ZipFile(cast("IO[bytes]", file)) as archive:
            # From here on it reads what files hold.
            file.max_entries = None
            for info in archive.infolist():
                if not self._counts(info.filename):
                    continue
                mode = info.external_attr >> 16
                if info.is_dir():
                    yield self._directory_entry(info.filename)
                elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
                    with archive.open(info) as content:
                        yield self._file_entry(info.filename, content, info.file_size, bool(mode & stat.S_IXUSR))
                else:
                    raise _refused(info.filename)

    def _counts(self, name: str) -> bool:
        """Count an entry; False if it is the root itself."""
        self._count()
        return name.strip("/") not in ("", ".")

    def _count(self) -> None:
        self._entries += 1
        if self._entries > self._limits.max_entries:
            raise _too_many(self._limits.max_entries)

    def _path(self, name: str) -> tuple[str, ...]:
        if name.startswith("/") or "\0" in name or "\\" in name or not _is_unicode(name):
            raise ArchiveError(f"{name!r} is not a name for a file in an archive")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if ".." in parts:
            raise ArchiveError(f"{name!r} leads out of the archive")
        if len(parts) > self._limits.max_depth:
            raise ArchiveError(f"{name[:200]!r} is more than {self._limits.max_depth} directories deep")
        # Directories that have no entry of their own: each entry may name as many as it is deep.
        parent = parts[:-1]
        while parent and parent not in self._parents:
            self._count()
            self._parents.add(parent)
            parent = parent[:-1]
        return parts

    def _directory_entry(self, name: str) -> ArchiveEntry:
        path = self._path(name)
        self._parents.add(path)
        return ArchiveEntry(path)

    def _file_entry(self, name: str, content: _Readable, size_bytes: int, is_executable: bool) -> ArchiveEntry:
        path = self._path(name)
        if size_bytes < 0:
            raise ArchiveError(f"{name!r} has {size_bytes} bytes")
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise ResourceExhaustedError(
                f"the archive unpacks to more than {self._limits.max_bytes} bytes "
                "(setting remote_asset_max_unpacked_bytes)"
            )
        if size_bytes <= SMALL_BYTES:
            data = b"".join(_pieces(name, content, size_bytes))
            return ArchiveEntry(path, Digest.of(data, self._function), data, is_executable=is_executable)
        spool = Spool(self._spool_directory, [self._function])
        try:
            for piece in _pieces(name, content, size_bytes):
                spool.write_now(piece)
        except BaseException:
            spool.file.close()
            raise
        return ArchiveEntry(path, spool.digest(self._function), spool=spool, is_executable=is_executable)


def _pieces(name: str, content: _Readable, size_bytes: int) -> Iterator[bytes]:
    """Read exactly so many bytes."""
    while size_bytes:
        piece = content.read(min(size_bytes, _PIECE_BYTES))
        if not piece:
            raise ArchiveError(f"the archive ends within {name!r}")
        size_bytes -= len(piece)
        yield piece


def _refused(name: str) -> ArchiveError:
    return ArchiveError(f"{name!r} in the archive is no file or directory, which is all that is taken")


def _too_many(max_entries: int) -> ResourceExhaustedError:
    return ResourceExhaustedError(f"the archive has more than {max_entries} entries (setting remote_asset_max_entries)")


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _BoundedFile:
    """A file of which not too much is read at once.

    Args:
        file: The file.
        max_entries: How many entries of a zip's directory may be read at once, since zipfile makes an object of each,
            some 500 bytes, before anybody can count them; None for what is no directory.
    """

    def __init__(self, file: IO[bytes], max_entries: int | None) -> None:
        self.max_entries = max_entries
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        # The end of the file, in which zipfile looks for its directory, is asked for without a size.
        is_directory = self.max_entries is not None and size >= 0
        if size < 0:
            size = _MAX_READ_BYTES
        if size > _MAX_READ_BYTES:
            raise ValueError(f"{size} bytes are asked for at once")
        data = self._file.read(size)
        if is_directory and self.max_entries is not None and data.count(_ZIP_ENTRY) > self.max_entries:
            raise _too_many(self.max_entries)
        return data

    def close(self) -> None:
        """Leave the file open: it is not this object's."""
