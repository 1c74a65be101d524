"""gRPC messages in a stream of bytes: five bytes of prefix, then the message.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md, Length-Prefixed-Message) and doc/compression.md.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lathe_shared.http2.stream import Bytes

PREFIX_BYTES: Final = 5

ACCEPTED_ENCODINGS: Final = "identity,gzip"
"""For ``grpc-accept-encoding``."""

_PREFIX: Final = struct.Struct(">BI")
_SMALL_BYTES: Final = 1024
"""Parts below this size are collected in one piece: each of many tiny ones would cost fifty times its size."""

pack_prefix = _PREFIX.pack
"""Return the prefix for a compressed flag and a length."""

unpack_prefix = _PREFIX.unpack_from
"""Return the compressed flag and the length at a position."""


class MessageError(Exception):
    """A message cannot be taken; the text is for whoever sent it."""


class MessageTooLargeError(MessageError):
    """A message is larger than is accepted."""


class UnsupportedEncodingError(MessageError):
    """A message is compressed in a way that is not supported."""


class InvalidMessageError(MessageError):
    """A message breaks the rules of framing or of its compression."""


class MessageReader:
    """Collects bytes as they come and gives whole messages.

    A message that came in one piece is cut out of it, one in several is joined once.

    Args:
        max_message_bytes: Bound on a message, checked when its length is known and before it is collected; also on
            what a compressed one grows to.

    Attributes:
        size_bytes: What is here and was not given yet.
        encoding: The name of the peer's compression, from its headers.
    """

    __slots__ = (
        "_compressed",
        "_length",
        "_max_message_bytes",
        "_offset",
        "_parts",
        "_refusal",
        "encoding",
        "is_untouched",
        "size_bytes",
    )

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._parts: deque[Bytes] = deque()
        self._offset = 0
        self._length = -1
        self._compressed = 0
        self._refusal: str | None = None
        self.size_bytes = 0
        self.encoding = ""
        self.is_untouched = True

    def add(self, data: Bytes) -> None:
        """Take bytes."""
        self.is_untouched = False
        self.size_bytes += len(data)
        parts = self._parts
        if parts and len(data) < _SMALL_BYTES:
            last = parts[-1]
            if isinstance(last, bytearray):
                last += data
                if len(last) < _SMALL_BYTES << 2:
                    return
                parts[-1] = bytes(last)
                return
            if len(last) < _SMALL_BYTES:
                parts[-1] = bytearray().join((last, data))
                return
        parts.append(data)

    @property
    def has_message(self) -> bool:
        """Whether ``next`` has something to say: a message, or what is wrong with it."""
        if self._refusal is not None:
            return True
        if self._length < 0:
            if self.size_bytes < PREFIX_BYTES:
                return False
            self._compressed, self._length = unpack_prefix(self._take(PREFIX_BYTES))
        return self.size_bytes >= self._length or self._length > self._max_message_bytes

    @property
    def is_too_large(self) -> bool:
        """Whether the next message is known to be larger than is accepted."""
        return self.has_message and (self._refusal is not None or self._length > self._max_message_bytes)

    @property
    def is_inside_message(self) -> bool:
        """Whether a message has begun whose end has not come."""
        return self._length >= 0 or self.size_bytes > 0

    def next(self) -> bytes | None:
        """Return the next message; None if it is not here yet.

        Raises:
            MessageError: It cannot be taken.
        """
        if not self.has_message:
            return None
        if self._refusal is not None:
            raise MessageTooLargeError(self._refusal)
        length = self._length
        if length > self._max_message_bytes:
            raise MessageTooLargeError(too_large(length, self._max_message_bytes))
        self._length = -1
        data = self._take(length)
        if self._compressed:
            return decompress(data, self._compressed, self.encoding, self._max_message_bytes)
        return data

    @property
    def next_bytes(self) -> int:
        """Length of the next message, as its prefix says it; -1 before that is here. Ask ``has_message`` first."""
        return self._length

    @property
    def next_is_compressed(self) -> bool:
        """Whether the next message claims to be compressed; meaningful while ``next_bytes`` is."""
        return self._length >= 0 and self._compressed != 0

    def put_back(self, message: bytes) -> None:
        """Have ``next`` return a message again that it has just returned."""
        rest = self._take(self.size_bytes)
        self.clear()
        self.add(pack_prefix(0, len(message)))
        self.add(message)
        if rest:
            self.add(rest)

    def refuse(self, reason: str) -> None:
        """Take nothing more: the message under way is too large for its surroundings."""
        self.clear()
        self._refusal = reason

    def take(self, size_bytes: int) -> bytes:
        """Return bytes without regard to messages; at most what is here."""
        return self._take(min(size_bytes, self.size_bytes))

    def clear(self) -> None:
        """Forget everything."""
        self._parts.clear()
        self._offset = self.size_bytes = 0
        self._length = -1

    def _take(self, size: int) -> bytes:
        if not size:
            return b""
        parts = self._parts
        self.size_bytes -= size
        begin = self._offset
        first = parts[0]
        end = begin + size
        if end < len(first):
            self._offset = end
            return bytes(first[begin:end])
        taken: list[Bytes] = []
        while size:
            first = parts[0]
            here = len(first) - begin
            if here > size:
                taken.append(memoryview(first)[begin : begin + size])
                self._offset = begin + size
                break
            taken.append(memoryview(first)[begin:] if begin else first)
            parts.popleft()
            size -= here
            begin = self._offset = 0
        if len(taken) == 1:
            return bytes(taken[0])
        return b"".join(taken)


def too_large(size_bytes: int, limit_bytes: int) -> str:
    """Say that a message is too large."""
    return f"a message of {size_bytes} bytes is larger than the {limit_bytes} bytes accepted here"


def decompress(data: bytes, flag: int, encoding: str, max_bytes: int) -> bytes:
    """Return a message that was sent with the compressed flag.

    Args:
        data: The message.
        flag: The flag's byte.
        encoding: What the peer's ``grpc-encoding`` says.
        max_bytes: Bound on the result; no more memory than that is taken for it.

    Raises:
        MessageError: The message cannot be decompressed.
    """
    if flag != 1:
        raise InvalidMessageError(f"compressed flag {flag}")
    if encoding in ("", "identity"):
        raise InvalidMessageError("a compressed message without grpc-encoding")
    if encoding != "gzip":
        raise UnsupportedEncodingError(f"grpc-encoding {encoding[:40]} is not supported; {ACCEPTED_ENCODINGS} are")
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        result = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InvalidMessageError(f"a message that is no gzip: {error}") from None
    if len(result) > max_bytes:
        raise MessageTooLargeError(f"a message grows beyond the {max_bytes} bytes accepted here")
    if not inflater.eof or inflater.unused_data:
        raise InvalidMessageError("a message of truncated gzip, or with something behind it")
    return result
