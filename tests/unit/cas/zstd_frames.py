"""Zstd frames made byte by byte, as no encoder would make them. Spec: RFC 8878, section 3.1."""

from __future__ import annotations

import struct

MAGIC = b"\x28\xb5\x2f\xfd"
RAW, RLE = 0, 1
MAX_BLOCK_BYTES = 128 << 10


def block(kind: int, size_bytes: int, body: bytes, *, last: bool = False) -> bytes:
    return (last | kind << 1 | size_bytes << 3).to_bytes(3, "little") + body


def header(window_log: int = 17, content_bytes: int | None = None, *, descriptor: int = 0) -> bytes:
    """A header with a window of its own, and eight bytes of content size if there is one."""
    if content_bytes is not None:
        descriptor |= 3 << 6
    size = b"" if content_bytes is None else struct.pack("<Q", content_bytes)
    return MAGIC + bytes((descriptor, window_log - 10 << 3)) + size


def bomb(blocks: int, window_log: int = 17) -> bytes:
    """A frame that decodes to ``blocks`` times 128 KiB of zeros, from four bytes each."""
    run = block(RLE, MAX_BLOCK_BYTES, b"\0")
    return header(window_log) + run * (blocks - 1) + block(RLE, MAX_BLOCK_BYTES, b"\0", last=True)


def skippable(data: bytes, number: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + number, len(data)) + data
