"""What comes in, from bytes to frames; and the short way of requests that come as a whole.

DATA is passed on as it arrives, frame or not; all other frames wait until they are whole, which their bounded lengths
keep small.

Spec: RFC 9113 sections 3.4, 4 and 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lathe_shared.http2 import frames
from lathe_shared.http2.control_frames import PRIORITY_BYTES
from lathe_shared.http2.data_receiving import DataReceiving
from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode, StreamFaultError
from lathe_shared.http2.frames import (
    CLIENT_PREFACE,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER_BYTES,
    HEADERS,
    PADDED,
    SETTINGS,
    STREAM_ID_MASK,
    unpack_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lathe_shared.http2.connection_state import ConnectionOwner
    from lathe_shared.http2.hpack import HeaderBlock
    from lathe_shared.http2.limits import Limits

_MAX_GOAWAY_BYTES: Final = 16_384
_FIXED_LENGTHS: Final = {
    frames.PRIORITY: PRIORITY_BYTES,
    frames.RST_STREAM: 4,
    frames.PING: 8,
    frames.WINDOW_UPDATE: 4,
}


class ReceivingSide(DataReceiving):
    """The part of a connection that takes bytes apart into frames."""

    __slots__ = (
        "_begun",
        "_needed_bytes",
        "_preface_left",
        "_unparsed",
    )

    def __init__(self, owner: ConnectionOwner, limits: Limits, *, is_client: bool) -> None:
        super().__init__(owner, limits, is_client=is_client)
        self._preface_left = b"" if is_client else CLIENT_PREFACE
        self._unparsed = bytearray()
        self._needed_bytes = 0
        self._begun: dict[int, HeaderBlock] = {}

    @property
    def is_inside_frame(self) -> bool:
        """Whether a frame has begun whose end has not come."""
        return bool(self._unparsed) or self._in_payload

    # Bytes to frames

    def _receive(self, data: bytes) -> None:  # noqa: C901 -- the loop that everything runs through; calls cost
        if self._unparsed:
            self._unparsed += data
            if len(self._unparsed) < self._needed_bytes:
                return
            data = bytes(self._unparsed)
            self._unparsed.clear()
        position = self._receive_preface(data) if self._preface_left else 0
        end = len(data)
        remembered = self._decoder.remembered
        begun = self._begun
        needed = FRAME_HEADER_BYTES
        while not self.is_closed:
            if self._in_payload:
                position = self._receive_payload(data, position)
            if end - position < FRAME_HEADER_BYTES:
                break
            head, flags, stream_id = unpack_frame(data, position)
            payload = position + FRAME_HEADER_BYTES
            after = payload + (head >> 8)
            kind = head & 0xFF
            if kind == HEADERS:
                # The way of nearly all calls: a header block that is known, then one frame of DATA. No stream is
                # made for them if both come in one read. See ``HeaderBlock.whole_request``.
                if flags == END_HEADERS and after <= end:
                    known = remembered.get(data[payload:after])
                    if known is not None and known.whole_request is not None and self._may_begin(stream_id):
                        begun[stream_id] = known
                        self.last_peer_stream_id = stream_id
                        position = after
                        continue
            elif (
                kind == DATA
                and flags == END_STREAM
                and after <= end
                and stream_id in begun
                and self._answer_whole_request(begun.pop(stream_id), stream_id, data, payload, after)
            ):
                position = after
                continue
            if begun:
                self._open_begun(None if kind == HEADERS else stream_id & STREAM_ID_MASK)
            self._check_frame_header(kind, head >> 8, stream_id & STREAM_ID_MASK)
            if kind == DATA:
                if flags & PADDED and payload >= end and payload < after:
                    needed = FRAME_HEADER_BYTES + 1
                    break
                position = payload + self._begin_data(head >> 8, flags, stream_id & STREAM_ID_MASK, data, payload)
            elif kind > CONTINUATION:
                # Spec: RFC 9113 section 5.5, what is unknown is ignored.
                self._spend_control()
                self._begin_payload(None, 0, head >> 8, ends=False)
                position = payload
            elif after > end:
                needed = after - position
                break
            else:
                self._handle(kind, flags, stream_id & STREAM_ID_MASK, data[payload:after])
                position = after
        if begun:
            self._open_begun(None)
        if position < end and not self.is_closed:
            self._unparsed += data[position:] if position else data
            self._needed_bytes = needed

    def _receive_preface(self, data: bytes) -> int:
        """Take the client's preface. Spec: RFC 9113 section 3.4.

        Returns:
            How many bytes it took.
        """
        expected = self._preface_left
        given = data[: len(expected)]
        if not expected.startswith(given):
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "not the HTTP/2 connection preface")
        self._preface_left = expected[len(given) :]
        return len(given)

    def _check_frame_header(self, kind: int, length: int, stream_id: int) -> None:
        """Refuse a frame by its header, before its payload is waited for."""
        if length > self.limits.max_frame_bytes:
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, f"frame of {length} bytes")
        if not self.settings_seen and kind != SETTINGS:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a frame before SETTINGS")
        if self._block_stream_id and (kind != CONTINUATION or stream_id != self._block_stream_id):
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
        fixed = _FIXED_LENGTHS.get(kind)
        if fixed is not None:
            if length != fixed:
                if (
                    kind == frames.PRIORITY
                    and stream_id in self.streams
                    and length < self.limits.max_header_block_bytes
                ):
                    return  # a fault of the stream, once the frame is here
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, f"frame of type {kind} with {length} bytes")
        elif kind in (HEADERS, CONTINUATION):
            if length > self.limits.max_header_block_bytes:
                raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "header block too large")
        elif kind == SETTINGS:
            if length > self.limits.max_settings * 6:
                raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "too many settings in one frame")
        elif kind == frames.GOAWAY and length > _MAX_GOAWAY_BYTES:
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "debug data of GOAWAY too large")

    def _handle(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        try:
            _HANDLERS[kind](self, flags, stream_id, payload)
        except StreamFaultError as fault:
            self._stream_fault(fault)

    # Whole requests

    def _may_begin(self, stream_id: int) -> bool:
        """Whether there is nothing at all to object to in a new stream."""
        return (
            stream_id == self.last_peer_stream_id + 2
            and stream_id <= STREAM_ID_MASK
            and self.accepting
            and not self._block_stream_id
            and len(self.streams) + len(self._begun) < self.limits.max_concurrent_streams
        )

    def _answer_whole_request(self, block: HeaderBlock, stream_id: int, data: bytes, begin: int, end: int) -> bool:
        """Have a request answered that is whole; otherwise make a stream of it."""
        size = end - begin
        self.work += 1
        if (
            size <= self.receive_window
            and size <= self.limits.max_frame_bytes
            and block.checked.content_length in (-1, size)
        ):
            answer = block.whole_request
            if answer is not None and answer(stream_id, data, begin, end):
                self.receive_window -= size
                self.uncredited_bytes += size
                return True
        self._open_stream(stream_id, block, ends=False)
        return False

    def _open_begun(self, stream_id: int | None) -> None:
        """Make a stream of a request that turns out not to come as a whole in one read; of all for None."""
        for number in list(self._begun) if stream_id is None else (stream_id,):
            block = self._begun.pop(number, None)
            if block is not None and not self.is_closed:
                self.work += 1
                self._open_stream(number, block, ends=False)


_HANDLERS: Final[tuple[Callable[[ReceivingSide, int, int, bytes], None], ...]] = (
    ReceivingSide.receive_push_promise,  # DATA never comes here
    ReceivingSide.receive_headers,
    ReceivingSide.receive_priority,
    ReceivingSide.receive_rst_stream,
    ReceivingSide.receive_settings,
    ReceivingSide.receive_push_promise,
    ReceivingSide.receive_ping,
    ReceivingSide.receive_goaway,
    ReceivingSide.receive_window_update,
    ReceivingSide.receive_continuation,
)
