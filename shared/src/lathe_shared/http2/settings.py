"""SETTINGS: what each side tells the other about itself.

Spec: RFC 9113 section 6.5.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode
from lathe_shared.http2.frames import (
    DEFAULT_MAX_FRAME,
    DEFAULT_WINDOW,
    LARGEST_MAX_FRAME,
    MAX_WINDOW,
    SETTINGS,
    frame,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lathe_shared.http2.limits import Limits

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

DEFAULT_HEADER_TABLE_BYTES: Final = 4096
UNLIMITED: Final = 2**32 - 1

_ENTRY: Final = struct.Struct(">HI")


class PeerSettings:
    """What the peer has told about itself; before it has, what RFC 9113 says that it begins with."""

    __slots__ = (
        "header_table_bytes",
        "initial_window_bytes",
        "max_concurrent_streams",
        "max_frame_bytes",
        "max_header_list_bytes",
    )

    def __init__(self) -> None:
        self.header_table_bytes = DEFAULT_HEADER_TABLE_BYTES
        self.max_concurrent_streams = UNLIMITED
        self.initial_window_bytes = DEFAULT_WINDOW
        self.max_frame_bytes = DEFAULT_MAX_FRAME
        self.max_header_list_bytes = UNLIMITED

    def apply(self, identifier: int, value: int, *, from_server: bool) -> None:
        """Take over one setting; unknown ones are ignored.

        Raises:
            ConnectionFaultError: The value is not allowed.
        """
        if identifier == INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE above 2^31-1")
            self.initial_window_bytes = value
        elif identifier == MAX_FRAME_SIZE:
            if not DEFAULT_MAX_FRAME <= value <= LARGEST_MAX_FRAME:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "SETTINGS_MAX_FRAME_SIZE outside 2^14..2^24-1")
            self.max_frame_bytes = value
        elif identifier == HEADER_TABLE_SIZE:
            self.header_table_bytes = value
        elif identifier == MAX_CONCURRENT_STREAMS:
            self.max_concurrent_streams = value
        elif identifier == MAX_HEADER_LIST_SIZE:
            self.max_header_list_bytes = value
        elif identifier == ENABLE_PUSH and (value > 1 or (value and from_server)):
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "SETTINGS_ENABLE_PUSH must be 0, or 1 from a client")


def parse_settings(payload: bytes, max_settings: int) -> list[tuple[int, int]]:
    """Return the entries of a SETTINGS frame, in their order.

    Raises:
        ConnectionFaultError: The payload is not a sequence of entries, or they are too many.
    """
    if len(payload) % _ENTRY.size:
        raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a length that is no multiple of 6")
    if len(payload) > max_settings * _ENTRY.size:
        raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, f"more than {max_settings} settings in one frame")
    return list(_ENTRY.iter_unpack(payload))


def settings_frame(entries: Mapping[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_ENTRY.pack(*entry) for entry in entries.items()))


def own_settings(limits: Limits, *, is_client: bool) -> dict[int, int]:
    """Return what we tell our peer, which follows from our limits."""
    entries = {
        INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
        MAX_FRAME_SIZE: limits.max_frame_bytes,
        MAX_HEADER_LIST_SIZE: limits.max_header_list_bytes,
    }
    if is_client:
        entries[ENABLE_PUSH] = 0
    else:
        entries[MAX_CONCURRENT_STREAMS] = limits.max_concurrent_streams
    return entries
