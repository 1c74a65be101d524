"""The framing of zstd streams: where frames and blocks begin and end, followed without decoding them.

The decoder of the library says neither whether a stream stopped in the middle of a frame nor how much a few bytes are
going to become. Both can be read from the framing: a frame's header tells its window, and no block is more than
128 KiB when decoded.

Spec: RFC 8878, section 3.1.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from lathe_shared.errors import InvalidArgumentError

MAX_WINDOW_BYTES = 8 << 20
"""Largest window that is accepted, and so the memory that one stream takes. Spec: RFC 8878, 3.1.1.1.2, recommends that
decoders support so much and that encoders not use more; all levels up to 19 keep to it."""

MAX_BLOCK_BYTES = 128 << 10
"""What a block decodes to at most. Spec: RFC 8878, 3.1.1.2.4."""

SPAN_BLOCKS = 8
"""Blocks that end in one span, which bounds what decoding it gives to 1 MiB and what was left of a block before."""

_MAGIC = 0xFD2FB528
_FIRST_SKIPPABLE_MAGIC = 0x184D2A50
_RLE_BLOCK, _RESERVED_BLOCK = 1, 3
_DICTIONARY_FIELD_BYTES = (0, 1, 2, 4)
_CONTENT_FIELD_BYTES = (0, 2, 4, 8)
_CHECKSUM_BYTES = 4


class MalformedZstdError(InvalidArgumentError):
    """Bytes that are no zstd stream, or not one of the blob that they were sent as."""

    def __init__(self, reason: str) -> None:
        super().__init__("data", reason)


class Span(NamedTuple):
    """Part of the bytes that were given: at most SPAN_BLOCKS blocks of one frame.

    Attributes:
        stop: Where it ends.
        ends_frame: Whether its frame ends with it.
        content_bytes: What its frame decodes to, as its header says; None if that does not say or is not complete.
    """

    stop: int
    ends_frame: bool
    content_bytes: int | None


class _Head(enum.Enum):
    """What the next header is that has to be complete before it can be read."""

    MAGIC = enum.auto()
    DESCRIPTOR = enum.auto()
    FIELDS = enum.auto()
    BLOCK = enum.auto()
    SKIPPABLE_SIZE = enum.auto()


class ZstdFraming:
    """Follows one stream of any number of frames, given in any pieces.

    Attributes:
        heads: Frames and blocks that have begun.
    """

    def __init__(self) -> None:
        self.heads = 0
        self._content_bytes: int | None = None
        self._kind = _Head.MAGIC
        self._head = bytearray()
        self._head_bytes = 4
        self._body_bytes = 0
        self._descriptor = 0
        self._is_last_block = False
        self._new_blocks = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether the stream may end here."""
        return self._kind is _Head.MAGIC and not self._head and not self._body_bytes

    def follow(self, data: memoryview, start: int = 0) -> Span:
        """Follow bytes from ``start`` on to the end of one span; there must be some.

        Raises:
            MalformedZstdError: The bytes cannot be part of a stream, or of one that is accepted.
        """
        end = len(data)
        position = start
        self._new_blocks = 0
        while position < end:
            if self._body_bytes:
                step = min(self._body_bytes, end - position)
                self._body_bytes -= step
                position += step
            else:
                step = min(self._head_bytes - len(self._head), end - position)
                self._head += data[position : position + step]
                position += step
                if len(self._head) == self._head_bytes:
                    self._read_head(int.from_bytes(self._head, "little"))
            if not self._body_bytes and self._is_last_block:
                span = Span(position, True, self._content_bytes)
                self._end_frame()
                return span
            if self._new_blocks == SPAN_BLOCKS and not self._body_bytes:
                break
        return Span(position, False, self._content_bytes)

    def _read_head(self, value: int) -> None:
        self._head.clear()
        if self._kind is _Head.MAGIC:
            self._read_magic(value)
        elif self._kind is _Head.DESCRIPTOR:
            self._read_descriptor(value)
        elif self._kind is _Head.FIELDS:
            self._read_fields(value)
        elif self._kind is _Head.BLOCK:
            self._read_block(value)
        else:
            self._body_bytes = value
            self._is_last_block = True

    def _await(self, kind: _Head, head_bytes: int) -> None:
        self._kind = kind
        self._head_bytes = head_bytes

    def _read_magic(self, magic: int) -> None:
        self.heads += 1
        if magic == _MAGIC:
            self._await(_Head.DESCRIPTOR, 1)
        elif magic & ~0xF == _FIRST_SKIPPABLE_MAGIC:
            self._await(_Head.SKIPPABLE_SIZE, 4)
        else:
            raise MalformedZstdError(f"no zstd frame begins with {magic.to_bytes(4, 'little').hex()}")

    def _read_descriptor(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._await(_Head.FIELDS, self._window_field_bytes + self._dictionary_field_bytes + self._content_field_bytes)

    @property
    def _is_single_segment(self) -> bool:
        return bool(self._descriptor & 0b10_0000)

    @property
    def _window_field_bytes(self) -> int:
        return 0 if self._is_single_segment else 1

    @property
    def _dictionary_field_bytes(self) -> int:
        return _DICTIONARY_FIELD_BYTES[self._descriptor & 0b11]

    @property
    def _content_field_bytes(self) -> int:
        field_bytes = _CONTENT_FIELD_BYTES[self._descriptor >> 6]
        return 1 if not field_bytes and self._is_single_segment else field_bytes

    def _read_fields(self, fields: int) -> None:
        rest = fields >> 8 * self._window_field_bytes
        if rest & (1 << 8 * self._dictionary_field_bytes) - 1:
            raise MalformedZstdError("the zstd frame needs a dictionary; frames have to do without one")
        content_bytes = rest >> 8 * self._dictionary_field_bytes
        if self._content_field_bytes == 2:
            content_bytes += 256
        if self._content_field_bytes:
            self._content_bytes = content_bytes
        if self._is_single_segment:
            window_bytes = content_bytes
        else:
            exponent, mantissa = (fields & 0xFF) >> 3, fields & 0b111
            window_bytes = (8 + mantissa) << 10 + exponent - 3
        if window_bytes > MAX_WINDOW_BYTES:
            raise MalformedZstdError(
                f"the zstd frame has a window of {window_bytes} bytes; at most {MAX_WINDOW_BYTES} are accepted"
            )
        self._await(_Head.BLOCK, 3)

    def _read_block(self, head: int) -> None:
        kind, size_bytes = head >> 1 & 0b11, head >> 3
        if kind == _RESERVED_BLOCK or size_bytes > MAX_BLOCK_BYTES:
            raise MalformedZstdError(f"a zstd block begins with {head.to_bytes(3, 'little').hex()}, which none does")
        self._body_bytes = 1 if kind == _RLE_BLOCK else size_bytes
        self._is_last_block = bool(head & 1)
        if self._is_last_block and self._descriptor & 0b100:
            self._body_bytes += _CHECKSUM_BYTES
        self._new_blocks += 1
        self.heads += 1

    def _end_frame(self) -> None:
        self._content_bytes = None
        self._is_last_block = False
        self._await(_Head.MAGIC, 4)
