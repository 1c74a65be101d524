"""What ``tarfile`` is shown of a tar: headers within bounds, and of pax headers only what is used.

``tarfile`` believes what it reads. One header may be described by others in front of it, without a bound on their
number, and all of them are in memory at once; a list of holes may have any length; and before Python 3.11.10 and 3.12.6
a pax header of a megabyte keeps its regular expressions busy for half an hour, in which no other thread runs
(CVE-2024-6232), or becomes keywords whose sizes add up to the square of its own.

Spec: POSIX, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar, "Basic Tar Format".
"""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe_cas.remote_asset.decompression import ForwardReader

MAX_DESCRIPTIONS = 8
"""Headers in front of one entry that describe it: programs write two or three."""

MAX_DESCRIPTION_BYTES = 256 << 10
"""Length of one of these. They hold extended attributes, too, which file systems bound to 64 KiB."""

MAX_VALUE_BYTES = 4096
"""Length of a value that is used, a path or a size: what Linux takes as a path."""

_PAX_KINDS = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE})
_DESCRIPTION_KINDS = _PAX_KINDS | {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_USED_KEYWORDS = (b"path", b"size")
_SPARSE_KEYWORD = b"GNU.sparse."
_KIND_PLACE = 156
_MAX_LENGTH_DIGITS = 7


class TarHeaders:
    """A tar as ``tarfile`` reads it, which is headers alone: what files hold is read from the tar itself.

    Args:
        tar: The tar, at its beginning.

    Attributes:
        last_read: What was read last; at the end, the header that made ``tarfile`` stop.
    """

    def __init__(self, tar: ForwardReader) -> None:
        self.seek = tar.seek
        self.tell = tar.tell
        self.last_read = b""
        self._tar = tar
        self._kind = b""
        self._descriptions = 0

    def read(self, size: int) -> bytes:
        """Return a header, or what follows one that describes the next.

        Raises:
            ValueError: It is not within bounds, or malformed.
        """
        if self._kind in _DESCRIPTION_KINDS:
            self.last_read = self._read_description(size)
            self._kind = b""
            return self.last_read
        if size > tarfile.BLOCKSIZE:
            raise ValueError(f"{size} bytes are asked for where a header should be")
        header = self.last_read = self._tar.read(size)
        self._kind = header[_KIND_PLACE : _KIND_PLACE + 1]
        if self._kind == tarfile.GNUTYPE_SPARSE:
            raise ValueError("a sparse file is refused")
        if self._kind in _DESCRIPTION_KINDS:
            self._descriptions += 1
            if self._descriptions > MAX_DESCRIPTIONS:
                raise ValueError(f"more than {MAX_DESCRIPTIONS} headers describe one entry")
        elif self._kind:
            self._descriptions = 0
        return header

    def _read_description(self, size: int) -> bytes:
        if size > MAX_DESCRIPTION_BYTES:
            raise ValueError(f"a header of {size} bytes is more than {MAX_DESCRIPTION_BYTES}")
        data = self._tar.read(size)
        return used_records(data).ljust(len(data), b"\0") if self._kind in _PAX_KINDS else data


def used_records(data: bytes) -> bytes:
    """Return what is used of a pax header's records; each is its length, a blank, ``keyword=value`` and a line feed.

    Raises:
        ValueError: It is no list of such records, a value that is used is too long, or it describes a sparse file.
    """
    used: dict[bytes, bytes] = {}
    position = 0
    while position < len(data) and data[position]:
        blank = data.find(b" ", position, position + _MAX_LENGTH_DIGITS + 1)
        digits = data[position:blank] if blank > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        keyword, separator, _ = data[blank + 1 : end].partition(b"=")
        if not (keyword and separator and end <= len(data) and data.endswith(b"\n", blank, end)):
            raise ValueError(f"a pax header is malformed at byte {position}")
        if keyword.startswith(_SPARSE_KEYWORD):
            raise ValueError("a sparse file is refused")
        if keyword in _USED_KEYWORDS:
            if end - position > MAX_VALUE_BYTES:
                raise ValueError(f"the {keyword.decode()} of a pax header has more than {MAX_VALUE_BYTES} bytes")
            used[keyword] = data[position:end]
        position = end
    return b"".join(used.values())
