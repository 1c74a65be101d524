"""What goes wrong on an HTTP/2 connection, and how far it reaches.

Spec: RFC 9113 section 5.4 (error handling) and section 7 (error codes).
"""

from __future__ import annotations

import enum


class ErrorCode(enum.IntEnum):
    """Why a connection or a stream ended. Spec: RFC 9113 section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


def code_name(code: int) -> str:
    """Return the name of an error code; unknown ones, which RFC 9113 allows, as a number."""
    return ErrorCode(code).name if 0 <= code <= ErrorCode.HTTP_1_1_REQUIRED else hex(code)


class ConnectionFaultError(Exception):
    """The peer broke a rule after which the connection cannot go on: it gets GOAWAY with this code.

    Args:
        code: What GOAWAY says.
        reason: For GOAWAY's debug data and the log; names the frame and the rule.
    """

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code = code
        self.reason = reason


class StreamFaultError(Exception):
    """The peer broke a rule of one stream: it gets RST_STREAM with this code, and all else goes on.

    Args:
        stream_id: The stream.
        code: What RST_STREAM says.
        reason: For the log.
    """

    def __init__(self, stream_id: int, code: ErrorCode, reason: str) -> None:
        super().__init__(f"stream {stream_id}: {code.name}: {reason}")
        self.stream_id = stream_id
        self.code = code
        self.reason = reason
