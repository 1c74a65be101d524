"""What goes out: header blocks, DATA within the peer's windows, credit for ours, and the small frames.

Everything is appended to ``out`` at once, apart from DATA that a window or the transport has no room for. That
waits with its stream, and is sent in turns when there is room, so that no stream starves another.

Spec: RFC 9113 sections 5.2 (flow control), 6.9 (WINDOW_UPDATE) and 8.1.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from lathe_shared.http2.connection_state import ConnectionState
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.frames import (
    CLIENT_PREFACE,
    DATA,
    DEFAULT_WINDOW,
    END_STREAM,
    MAX_STREAM_ID,
    header_frames,
    pack_frame,
    ping,
    rst_stream,
    window_update,
)
from lathe_shared.http2.hpack import DEFAULT_TABLE_BYTES, SHRINK_TABLE_TO_ZERO
from lathe_shared.http2.settings import own_settings, settings_frame

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_shared.http2.stream import Bytes, Stream

TURN_BYTES: Final = 1 << 16
"""DATA of one stream in its turn, when several wait for the same window."""

MAX_SENT_FRAME_BYTES: Final = 1 << 18
"""Largest DATA frame sent, even if the peer takes larger ones: other streams wait while one frame goes out."""


class SendingSide(ConnectionState):
    """The part of a connection that sends."""

    __slots__ = ()

    def start(self) -> None:
        """Send the preface: the first thing to be sent."""
        if self.is_client:
            self.out.append(CLIENT_PREFACE)
        self.out.append(settings_frame(own_settings(self.limits, is_client=self.is_client)))
        extra = self.limits.connection_window_bytes - DEFAULT_WINDOW
        if extra:
            self.out.append(window_update(0, extra))

    # Streams

    def can_open(self) -> bool:
        """Whether a client may open a stream now: the peer allows one more, and numbers are left."""
        return (
            not self.is_closed
            and self.peer_goaway is None
            and self.next_stream_id <= MAX_STREAM_ID
            and len(self.streams) < self.peer.max_concurrent_streams
        )

    def open(self, stream: Stream, block: bytes, *, end: bool) -> None:
        """Open a stream with a request's header block; only if ``can_open``."""
        stream.id = self.next_stream_id
        self.next_stream_id += 2
        # Made earlier perhaps, under other settings.
        stream.send_window = self.peer.initial_window_bytes
        self.streams[stream.id] = stream
        self.work += 1
        self.send_headers(stream, block, end=end)

    def send_headers(self, stream: Stream, block: bytes, *, end: bool) -> None:
        """Send a header block: after what is pending, so trailers may follow DATA at once.

        Args:
            stream: An open stream.
            block: Encoded fields.
            end: Whether it ends the stream.
        """
        if stream.pending is not None:
            stream.pending_trailers = block
            stream.pending_end = True
            return
        self.send_block(stream.id, block, END_STREAM if end else 0)
        if end:
            self._local_end(stream)

    def send_block(self, stream_id: int, block: bytes, flags: int) -> None:
        """Send a header block on a stream, whatever is known of it."""
        if self.block_prefix:
            block = self.block_prefix + block
            self.block_prefix = b""
        self.out.append(header_frames(stream_id, block, flags, self.peer.max_frame_bytes))

    def limit_table(self, size_bytes: int) -> None:
        """Keep our header blocks within the dynamic table that the peer has."""
        if self.encoder is not None:
            self.encoder.limit_table(size_bytes)
        elif size_bytes < DEFAULT_TABLE_BYTES:
            self.block_prefix = SHRINK_TABLE_TO_ZERO

    def send_data(self, stream: Stream, pieces: Sequence[Bytes], size_bytes: int, *, end: bool) -> bool:
        """Send DATA, or have it wait.

        Args:
            stream: An open stream.
            pieces: The bytes; they must stay as they are until they are written.
            size_bytes: Their length together.
            end: Whether they end the stream.

        Returns:
            Whether all is in ``out``; otherwise ``Stream.on_drained`` will say so.
        """
        if (
            size_bytes <= stream.send_window
            and size_bytes <= self.send_window
            and size_bytes <= self.send_frame_bytes
            and self.writable
            and stream.pending is None
        ):
            self.out.append(pack_frame(size_bytes << 8 | DATA, END_STREAM if end else 0, stream.id))
            self.out += pieces
            stream.send_window -= size_bytes
            self.send_window -= size_bytes
            self.work += 1
            if end:
                self._local_end(stream)
            return True
        pending = stream.pending
        if pending is None:
            pending = stream.pending = deque()
        pending.extend([piece for piece in pieces if len(piece)])
        stream.pending_bytes += size_bytes
        self.pending_bytes += size_bytes
        stream.pending_end = end
        if self.writable and not self._blocked:
            self._send_pending(stream, stream.pending_bytes)
        if not stream.has_pending():
            return True
        self._await_window(stream)
        return False

    def reset(self, stream: Stream, code: int = ErrorCode.CANCEL) -> None:
        """Reset a stream that is not closed; what comes for it from now on is ignored."""
        if stream.id not in self.streams:
            return
        self._remember_reset(stream.id)
        self.out.append(rst_stream(stream.id, code))
        self._remove(stream)

    def _local_end(self, stream: Stream) -> None:
        stream.is_local_closed = True
        if stream.is_remote_closed:
            self.closed_streams += 1
            self._remove(stream)

    # Flow control towards the peer

    def set_writable(self, writable: bool) -> None:
        """Say whether the transport takes more; DATA that waited for it goes out."""
        self.writable = writable
        if writable:
            self._send_blocked()

    def _await_window(self, stream: Stream) -> None:
        """Have a stream wait for the connection's window or the transport, unless its own window is what is short."""
        if stream.send_window <= 0 and stream.pending_bytes:
            return
        if self._blocked is None:
            self._blocked = {}
        self._blocked[stream] = None

    def _unblock(self, stream: Stream) -> None:
        """Send what a stream's own window, now larger, has room for."""
        if not stream.has_pending():
            return
        if self.writable and not self._blocked:
            self._send_pending(stream, stream.pending_bytes)
        if not stream.has_pending():
            stream.on_drained()
        else:
            self._await_window(stream)

    def _send_blocked(self) -> None:
        """Send what waits, as far as there is room: each stream in turn, beginning with the one that waits longest."""
        blocked = self._blocked
        if not blocked:
            return
        idle_turns = 0
        while blocked and idle_turns < len(blocked) and self.writable:
            stream = next(iter(blocked))
            del blocked[stream]
            sent = self._send_pending(stream, TURN_BYTES)
            idle_turns = 0 if sent else idle_turns + 1
            if not stream.has_pending():
                stream.on_drained()
            else:
                self._await_window(stream)

    def _send_pending(self, stream: Stream, limit_bytes: int) -> bool:
        """Send some of what waits on one stream.

        Returns:
            Whether anything was sent.
        """
        pending = stream.pending
        if pending is None:
            return False
        has_sent = False
        budget = min(limit_bytes, stream.send_window, self.send_window)
        while True:
            size = min(stream.pending_bytes, budget, self.send_frame_bytes)
            if size <= 0 and stream.pending_bytes:
                return has_sent
            size = max(size, 0)
            is_last = size == stream.pending_bytes
            ends = is_last and stream.pending_end and stream.pending_trailers is None
            if size or ends:
                self.out.append(pack_frame(size << 8 | DATA, END_STREAM if ends else 0, stream.id))
                self._move(pending, size)
                stream.send_window -= size
                self.send_window -= size
                stream.pending_bytes -= size
                self.pending_bytes -= size
                budget -= size
                self.work += 1
                has_sent = True
            if is_last:
                self._finish_pending(stream)
                return True

    def _move(self, pending: deque[Bytes], size: int) -> None:
        """Move bytes from a stream's queue to ``out``."""
        while size:
            piece = pending.popleft()
            length = len(piece)
            if length > size:
                view = memoryview(piece)
                pending.appendleft(view[size:])
                piece = view[:size]
                length = size
            self.out.append(piece)
            size -= length

    def _finish_pending(self, stream: Stream) -> None:
        trailers = stream.pending_trailers
        ends = stream.pending_end
        stream.pending = None
        stream.pending_trailers = None
        stream.pending_end = False
        if trailers is not None:
            self.send_block(stream.id, trailers, END_STREAM)
        if ends:
            self._local_end(stream)

    # Flow control towards us

    def adopt(self, stream: Stream) -> None:
        """Take up a stream whose request was answered as a whole, and whose answer may have to wait."""
        stream.has_headers = stream.is_remote_closed = True
        self.streams[stream.id] = stream

    def release(self, stream: Stream, size_bytes: int) -> None:
        """Give received bytes of a stream back to the windows: they were read, or will never be.

        The peer is told in batches of a quarter of a window. Spec: RFC 9113 section 6.9.
        """
        stream.held_bytes -= size_bytes
        self.uncredited_bytes += size_bytes
        if self.uncredited_bytes << 2 >= self.limits.connection_window_bytes:
            self.credit()
        if stream.is_remote_closed:
            return
        stream.uncredited_bytes += size_bytes
        if stream.uncredited_bytes << 2 >= self.limits.stream_window_bytes:
            self.out.append(window_update(stream.id, stream.uncredited_bytes))
            stream.receive_window += stream.uncredited_bytes
            stream.uncredited_bytes = 0

    def credit(self) -> None:
        """Tell the peer of what was given back to the connection's window."""
        if self.uncredited_bytes and not self.is_closed:
            self.out.append(window_update(0, self.uncredited_bytes))
            self.receive_window += self.uncredited_bytes
            self.uncredited_bytes = 0

    # The connection

    def ping(self, payload: bytes = b"\0" * 8) -> None:
        """Ask whether the peer lives; ``ConnectionOwner.on_ping_ack`` tells the answer."""
        self.out.append(ping(payload))

    def drain(self, reason: str = "") -> None:
        """Tell the peer to begin no more streams; those that are open go on. Spec: RFC 9113 section 6.8."""
        if self.is_closed or (not self.accepting and not self.is_client):
            return
        self.accepting = False
        self._send_goaway(ErrorCode.NO_ERROR, reason)
