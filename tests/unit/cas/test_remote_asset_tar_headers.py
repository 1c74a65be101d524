"""What tarfile is shown of a tar."""

from __future__ import annotations

import io
import tarfile

import pytest

from lathe_cas.remote_asset.decompression import ForwardReader
from lathe_cas.remote_asset.tar_headers import TarHeaders, used_records

PATH = b"19 path=a/long/one\n"
SIZE = b"12 size=123\n"
MTIME = b"20 mtime=1234567890\n"


def record(keyword: bytes, value: bytes) -> bytes:
    """Write a record, whose length counts its own digits."""
    rest = b" %s=%s\n" % (keyword, value)
    length = len(rest) + len(str(len(rest)))
    return b"%d%s" % (length + (len(str(length)) - len(str(len(rest)))), rest)


@pytest.mark.parametrize(
    ("data", "used"),
    [
        (b"", b""),
        (bytes(512), b""),
        (PATH, PATH),
        (MTIME + PATH + SIZE + bytes(100), PATH + SIZE),
        (PATH + record(b"path", b"b"), record(b"path", b"b")),
        (record(b"path", b"a=b\nc"), record(b"path", b"a=b\nc")),
        (record(b"SCHILY.xattr.user.x", bytes(5_000)), b""),
        (record(b"hdrcharset", b"BINARY"), b""),
    ],
)
def test_of_a_pax_header_paths_and_sizes_are_used(data: bytes, used: bytes) -> None:
    assert used_records(data) == used


@pytest.mark.parametrize(
    "data",
    [
        b"1" * 100,
        b"path=a\n",
        b" path=a\n",
        b"0 path=a\n",
        b"-9 path=a\n",
        b"3 a3 a3 a=1\n",
        b"11 path=abc",
        b"10 path=ab\n",
        b"13 path=abc\n",
        b"5 ab\n",
        b"5 =b\n",
        b"00000000011 path=abc\n",
        "\N{ARABIC-INDIC DIGIT ONE}1 path=abc\n".encode(),
        PATH + b"x",
    ],
)
def test_what_is_no_list_of_records_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="malformed"):
        used_records(data)


def test_what_is_shown_is_as_long_as_what_is_there() -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(MTIME + PATH)
    block = (MTIME + PATH).ljust(512, b"\0")
    headers = TarHeaders(ForwardReader(io.BytesIO(header.tobuf() + block + bytes(512)), 1 << 20))

    assert headers.read(512) == header.tobuf()
    assert headers.read(512) == PATH.ljust(512, b"\0")
    assert headers.tell() == 1024
    assert headers.read(512) == headers.last_read == bytes(512)


def test_a_list_of_holes_is_not_read() -> None:
    header = tarfile.TarInfo("sparse")
    header.type = tarfile.GNUTYPE_SPARSE
    headers = TarHeaders(ForwardReader(io.BytesIO(header.tobuf() + b"\1" * 512_000), 1 << 20))

    with pytest.raises(ValueError, match="sparse"):
        headers.read(512)
    assert headers.tell() == 512
