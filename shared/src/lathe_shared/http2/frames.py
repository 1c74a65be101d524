"""The layout of frames: constants, and bytes for the small ones.

A frame begins with 24 bits of length, 8 of type, 8 of flags, 1 reserved and 31 of stream id. ``FRAME`` reads and
writes that as three numbers, the first of them ``length << 8 | type``: one C call for a header.

Spec: RFC 9113 sections 4.1 and 6.
"""

from __future__ import annotations

import struct
from typing import Final

CLIENT_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends before its first frame. Spec: RFC 9113 section 3.4."""

FRAME: Final = struct.Struct(">IBI")
"""Header of a frame: ``length << 8 | type``, flags, stream id with the reserved bit."""

FRAME_HEADER_BYTES: Final = 9
STREAM_ID_MASK: Final = 0x7FFFFFFF

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

MAX_STREAM_ID: Final = 2**31 - 1
MAX_WINDOW: Final = 2**31 - 1
"""Largest flow-control window. Spec: RFC 9113 section 6.9.1."""

DEFAULT_WINDOW: Final = 65_535
"""Window of a connection, and of a stream without SETTINGS_INITIAL_WINDOW_SIZE. Spec: RFC 9113 section 6.9.2."""

DEFAULT_MAX_FRAME: Final = 16_384
"""Largest payload that every peer takes. Spec: RFC 9113 section 4.2."""

LARGEST_MAX_FRAME: Final = 2**24 - 1

_WORD: Final = struct.Struct(">IBII")
_GOAWAY: Final = struct.Struct(">IBIII")

PING_ACK_HEADER: Final = FRAME.pack(8 << 8 | PING, ACK, 0)
SETTINGS_ACK: Final = FRAME.pack(SETTINGS, ACK, 0)

pack_frame = FRAME.pack
unpack_frame = FRAME.unpack_from


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return pack_frame(len(payload) << 8 | kind, flags, stream_id) + payload


def window_update(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE; stream 0 is the connection."""
    return _WORD.pack(4 << 8 | WINDOW_UPDATE, 0, stream_id, increment)


def rst_stream(stream_id: int, code: int) -> bytes:
    """Return a RST_STREAM."""
    return _WORD.pack(4 << 8 | RST_STREAM, 0, stream_id, code)


def goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    """Return a GOAWAY."""
    return _GOAWAY.pack((8 + len(debug)) << 8 | GOAWAY, 0, 0, last_stream_id, code) + debug


def ping(payload: bytes) -> bytes:
    """Return a PING with 8 bytes of payload."""
    return frame(PING, 0, 0, payload)


def header_frames(stream_id: int, block: bytes, flags: int, max_frame: int) -> bytes:
    """Return a header block as HEADERS and as many CONTINUATION frames as it takes.

    Args:
        stream_id: The stream.
        block: The encoded fields.
        flags: END_STREAM or 0.
        max_frame: Largest payload that the peer takes.
    """
    if len(block) <= max_frame:
        return pack_frame(len(block) << 8 | HEADERS, flags | END_HEADERS, stream_id) + block
    parts = [frame(HEADERS, flags, stream_id, block[:max_frame])]
    for start in range(max_frame, len(block), max_frame):
        piece = block[start : start + max_frame]
        is_last = start + max_frame >= len(block)
        parts.append(frame(CONTINUATION, END_HEADERS if is_last else 0, stream_id, piece))
    return b"".join(parts)
