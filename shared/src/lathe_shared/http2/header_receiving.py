"""Header blocks that come in: whole again from their frames, decoded, and what they mean to their stream.

Spec: RFC 9113 sections 4.3, 5.1.1, 6.2, 6.10 and 8.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lathe_shared.http2.control_frames import ControlFrames
from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode, StreamFaultError
from lathe_shared.http2.frames import END_HEADERS, END_STREAM, HAS_PRIORITY, PADDED
from lathe_shared.http2.header_rules import MalformedMessageError, check_request, check_response, check_trailers
from lathe_shared.http2.hpack import literal_block

if TYPE_CHECKING:
    from lathe_shared.http2.connection_state import ConnectionOwner
    from lathe_shared.http2.header_rules import CheckedHeaders
    from lathe_shared.http2.hpack import HeaderBlock
    from lathe_shared.http2.limits import Limits
    from lathe_shared.http2.stream import Stream

_MAX_SKIPPED: Final = 64
"""Ranges of stream numbers that the peer left out which are remembered, for the right code if it uses one later."""

_HEADERS_TOO_LARGE: Final = literal_block([(b":status", b"431")])


class HeaderReceiving(ControlFrames):
    """The part of a connection that receives header blocks.

    Attributes:
        header_block_begun: Whether a header block has begun whose end has not come.
    """

    __slots__ = ("_block", "_block_flags", "_block_frames", "_block_stream_id", "_skipped")

    def __init__(self, owner: ConnectionOwner, limits: Limits, *, is_client: bool) -> None:
        super().__init__(owner, limits, is_client=is_client)
        self._block_stream_id = 0
        self._block_flags = 0
        self._block_frames = 0
        self._block: list[bytes] = []
        self._skipped: list[range] | None = None

    @property
    def header_block_begun(self) -> bool:
        """Whether a header block has begun whose end has not come."""
        return self._block_stream_id != 0

    def receive_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Take HEADERS. Spec: RFC 9113 section 6.2."""
        if not stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        begin = 0
        end = len(payload)
        if flags & (PADDED | HAS_PRIORITY):
            begin = (1 if flags & PADDED else 0) + (5 if flags & HAS_PRIORITY else 0)
            if begin > end:
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "HEADERS shorter than its fixed fields")
            if flags & PADDED:
                end -= payload[0]
            if begin > end:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
        block = payload[begin:end]
        if flags & END_HEADERS:
            self._header_block(stream_id, block, ends=flags & END_STREAM != 0)
            return
        self._block_stream_id = stream_id
        self._block_flags = flags
        self._block_frames = 0
        self._block = [block]

    def receive_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Take a CONTINUATION. Spec: RFC 9113 section 6.10."""
        if not self._block_stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block.append(payload)
        self._block_frames += 1
        if (
            self._block_frames > self.limits.max_continuation_frames
            or sum(map(len, self._block)) > self.limits.max_header_block_bytes
        ):
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "header block too large")
        if flags & END_HEADERS:
            block = b"".join(self._block)
            self._block = []
            self._block_stream_id = 0
            self._header_block(stream_id, block, ends=self._block_flags & END_STREAM != 0)

    def _header_block(self, stream_id: int, encoded: bytes, *, ends: bool) -> None:
        block = self._decoder.decode(encoded)
        stream = self.streams.get(stream_id)
        try:
            if stream is None:
                if self.is_client:
                    self._check_not_idle(stream_id, "HEADERS")
                    if not self._was_reset(stream_id):
                        raise StreamFaultError(stream_id, ErrorCode.STREAM_CLOSED, "HEADERS on a closed stream")
                else:
                    self._request(stream_id, block, ends=ends)
            elif stream.is_remote_closed:
                raise StreamFaultError(stream_id, ErrorCode.STREAM_CLOSED, "HEADERS after the end of the stream")
            elif stream.has_headers:
                self._trailers(stream, block, ends=ends)
            else:
                self._response(stream, block, ends=ends)
        except MalformedMessageError as error:
            raise StreamFaultError(stream_id, ErrorCode.PROTOCOL_ERROR, str(error)) from None

    def _request(self, stream_id: int, block: HeaderBlock, *, ends: bool) -> None:
        last = self.last_peer_stream_id
        if not stream_id & 1:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a client's stream with an even number")
        if stream_id <= last:
            if self._was_reset(stream_id):
                return
            if any(stream_id in skipped for skipped in self._skipped or ()):
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a stream older than the newest one")
            raise ConnectionFaultError(ErrorCode.STREAM_CLOSED, "HEADERS on a closed stream")
        if stream_id > last + 2 and stream_id != 1:
            self._note_skipped(range(last + 1, stream_id))
        self.last_peer_stream_id = stream_id
        self.work += 1
        if not self.accepting:
            # GOAWAY has said so; this is for a peer that has not read it yet.
            raise StreamFaultError(stream_id, ErrorCode.REFUSED_STREAM, "no more streams after GOAWAY")
        if len(self.streams) >= self.limits.max_concurrent_streams:
            raise StreamFaultError(stream_id, ErrorCode.REFUSED_STREAM, "too many streams")
        if block.size_bytes > self.limits.max_header_list_bytes:
            self.send_block(stream_id, _HEADERS_TOO_LARGE, END_STREAM)
            if not ends:
                raise StreamFaultError(stream_id, ErrorCode.NO_ERROR, "header list too large")
            return
        self._open_stream(stream_id, block, ends=ends)

    def _open_stream(self, stream_id: int, block: HeaderBlock, *, ends: bool) -> None:
        headers = check_request(block)
        self._check_length(stream_id, headers, ends=ends)
        stream = self.owner.accept(stream_id, block, headers)
        self.streams[stream_id] = stream
        stream.has_headers = True
        stream.content_left = headers.content_length
        self.owner.on_opened(stream)
        if ends and not stream.is_remote_closed:
            self._remote_end(stream)

    def _note_skipped(self, skipped: range) -> None:
        """Remember stream numbers that the peer left out, and so closed. Spec: RFC 9113 section 5.1.1."""
        if self._skipped is None:
            self._skipped = []
        self._skipped.append(skipped)
        del self._skipped[:-_MAX_SKIPPED]

    def _response(self, stream: Stream, block: HeaderBlock, *, ends: bool) -> None:
        headers = check_response(block)
        if headers.is_informational:
            if ends:
                raise MalformedMessageError("an informational response that ends the stream")
            self._spend_control()
            return
        self._check_length(stream.id, headers, ends=ends)
        stream.has_headers = True
        stream.content_left = headers.content_length
        stream.on_headers(headers)
        if ends and not stream.is_remote_closed:
            self._remote_end(stream)

    def _trailers(self, stream: Stream, block: HeaderBlock, *, ends: bool) -> None:
        if not ends:
            raise MalformedMessageError("a second header block that does not end the stream")
        headers = check_trailers(block)
        if stream.content_left > 0:
            raise MalformedMessageError("less DATA than content-length says")
        stream.on_trailers(headers)
        if not stream.is_remote_closed:
            self._remote_end(stream)

    def _check_length(self, stream_id: int, headers: CheckedHeaders, *, ends: bool) -> None:
        if ends and headers.content_length > 0:
            raise StreamFaultError(stream_id, ErrorCode.PROTOCOL_ERROR, "no DATA where content-length says some")

    def _remote_end(self, stream: Stream) -> None:
        stream.is_remote_closed = True
        if stream.is_local_closed:
            self.closed_streams += 1
            self._remove(stream)
        stream.on_end()
