"""DATA that comes in: counted against the windows, and passed on to its stream as it arrives.

Spec: RFC 9113 sections 5.2, 6.1, 6.9 and 8.1.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode, StreamFaultError
from lathe_shared.http2.frames import END_STREAM, PADDED
from lathe_shared.http2.header_receiving import HeaderReceiving

if TYPE_CHECKING:
    from lathe_shared.http2.connection_state import ConnectionOwner
    from lathe_shared.http2.limits import Limits
    from lathe_shared.http2.stream import Bytes, Stream

_VIEW_BYTES: Final = 4096
"""From which size a part of what was read is passed on as a view; smaller ones are copied, which costs less."""


class DataReceiving(HeaderReceiving):
    """The part of a connection that receives DATA, and skips what is of no use in the same way."""

    __slots__ = ("_in_payload", "_padding_left", "_payload_ends", "_payload_left", "_payload_stream")

    def __init__(self, owner: ConnectionOwner, limits: Limits, *, is_client: bool) -> None:
        super().__init__(owner, limits, is_client=is_client)
        self._in_payload = False
        self._payload_left = 0
        self._padding_left = 0
        self._payload_ends = False
        self._payload_stream: Stream | None = None

    def _begin_data(self, length: int, flags: int, stream_id: int, data: bytes, payload: int) -> int:
        """Begin a DATA frame.

        Returns:
            How many bytes of the payload are dealt with: 1 for the pad length, otherwise 0.
        """
        if not stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "DATA on stream 0")
        overhead = padding = 0
        if flags & PADDED:
            if not length:
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "padded DATA without a pad length")
            padding = data[payload]
            if padding >= length:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
            overhead = padding + 1
        if length > self.receive_window:
            raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the connection's window")
        self.receive_window -= length
        self.uncredited_bytes += overhead
        size = length - overhead
        ends = flags & END_STREAM != 0
        if not size and not ends:
            self._spend_control()
        stream: Stream | None = None
        try:
            stream = self._stream_for_data(stream_id, length, size, ends=ends)
        except StreamFaultError as fault:
            self._stream_fault(fault)
        if stream is not None:
            stream.receive_window -= length
            stream.uncredited_bytes += overhead
        self._begin_payload(stream, size, padding, ends=ends)
        return 1 if overhead else 0

    def _stream_for_data(self, stream_id: int, length: int, size: int, *, ends: bool) -> Stream | None:
        """Return the stream that may receive DATA; None if it is to be ignored."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id, "DATA")
            if self._was_reset(stream_id):
                return None
            raise StreamFaultError(stream_id, ErrorCode.STREAM_CLOSED, "DATA on a closed stream")
        if stream.is_remote_closed:
            raise StreamFaultError(stream_id, ErrorCode.STREAM_CLOSED, "DATA after the end of the stream")
        if not stream.has_headers:
            raise StreamFaultError(stream_id, ErrorCode.PROTOCOL_ERROR, "DATA before headers")
        if length > stream.receive_window:
            raise StreamFaultError(stream_id, ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the stream's window")
        if stream.content_left >= 0:
            stream.content_left -= size
            if stream.content_left < 0 or (ends and stream.content_left):
                raise StreamFaultError(stream_id, ErrorCode.PROTOCOL_ERROR, "DATA that differs from content-length")
        return stream

    def _begin_payload(self, stream: Stream | None, size: int, padding: int, *, ends: bool) -> None:
        self._in_payload = True
        self._payload_stream = stream
        self._payload_left = size
        self._padding_left = padding
        self._payload_ends = ends

    def _receive_payload(self, data: bytes, position: int) -> int:
        """Pass on what is here of a payload, and skip its padding.

        Returns:
            The position after it.
        """
        here = len(data) - position
        left = self._payload_left
        if left:
            take = min(left, here)
            if take:
                self._pass_on(data, position, take)
                position += take
                here -= take
                left -= take
                self._payload_left = left
        padding = self._padding_left
        if padding and not left:
            skip = min(padding, here)
            position += skip
            padding -= skip
            self._padding_left = padding
        if not left and not padding:
            self._in_payload = False
            stream = self._payload_stream
            self._payload_stream = None
            if stream is not None and self._payload_ends and not stream.is_remote_closed:
                self._remote_end(stream)
        return position

    def _pass_on(self, data: bytes, position: int, size: int) -> None:
        stream = self._payload_stream
        if stream is None or stream.is_remote_closed:
            # Unknown to the stream, or the stream was reset in the meantime.
            self.uncredited_bytes += size
            return
        stream.held_bytes += size
        part: Bytes
        if size >= _VIEW_BYTES and size << 1 >= len(data):
            part = memoryview(data)[position : position + size]
        else:
            part = data[position : position + size]
        stream.on_data(part)
