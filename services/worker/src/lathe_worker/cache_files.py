"""Files of the input cache: how they are named, made, copied and found again.

The name carries digest and form; the mode is read-only, executable or not. Both together tell a good file from a torn
one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from typing import TYPE_CHECKING

from lathe_shared.digest import Digest, DigestFunction

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILE_NAME = re.compile(r"([0-9a-f]+)-([0-9]+)-([0-9]+)(x?)", re.ASCII)


def file_name(hash_: str, size_bytes: int, function: DigestFunction, *, is_executable: bool) -> str:
    """Return the name under which the cache keeps a blob in one of its two forms."""
    return f"{hash_}-{size_bytes}-{function.value}{'x' if is_executable else ''}"


def digest_of(name: str) -> Digest:
    """Return the digest of what the cache keeps under a name made by ``file_name``."""
    hash_, size, function = name.removesuffix("x").split("-")
    return Digest(hash_, int(size), DigestFunction(int(function)))


def mode(name: str) -> int:
    """Return the permissions of a cache file."""
    return 0o555 if name.endswith("x") else 0o444


@contextlib.contextmanager
def new_file(path: str, name: str) -> Iterator[int]:
    """Open a fresh file for a cache name, and remove it if it cannot be filled."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:  # unknown to the index: a remnant
        os.unlink(path)
        fd = os.open(path, flags, 0o600)
    try:
        yield fd
        os.fchmod(fd, mode(name))
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def copy_contents(source_fd: int, target_fd: int) -> None:
    """Copy a file from its beginning, sharing its blocks or copying inside the kernel where the file system can."""
    try:
        while os.copy_file_range(source_fd, target_fd, 1 << 30):
            pass
    except OSError:
        os.lseek(source_fd, 0, os.SEEK_SET)
        os.ftruncate(target_fd, 0)
        os.lseek(target_fd, 0, os.SEEK_SET)
        with open(source_fd, "rb", closefd=False) as source, open(target_fd, "wb", closefd=False) as target:
            shutil.copyfileobj(source, target, 1 << 20)


def take_stock(entry: os.DirEntry[str]) -> tuple[float, str, int] | None:
    """Return last use, name and size of a valid cache file; remove anything else."""
    match = _FILE_NAME.fullmatch(entry.name)
    status = entry.stat(follow_symlinks=False)
    if match is None or status.st_size != int(match[2]) or status.st_mode & 0o777 != mode(entry.name):
        os.unlink(entry.path)
        return None
    # Making and removing links changes the ctime, reading the atime: the later one is the last use.
    return max(status.st_atime, status.st_ctime), entry.name, status.st_size
