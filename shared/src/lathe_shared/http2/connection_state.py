"""What a connection knows, and how it ends.

Spec: RFC 9113 sections 3.4, 5.4 and 6.8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_shared.http2.errors import ErrorCode, code_name
from lathe_shared.http2.floods import Allowance
from lathe_shared.http2.frames import DEFAULT_WINDOW, goaway
from lathe_shared.http2.hpack import HeaderDecoder, HeaderEncoder
from lathe_shared.http2.settings import PeerSettings

if TYPE_CHECKING:
    from lathe_shared.http2.header_rules import CheckedHeaders
    from lathe_shared.http2.hpack import HeaderBlock
    from lathe_shared.http2.limits import Limits
    from lathe_shared.http2.stream import Bytes, Stream

MAX_RECENT_RESETS = 1000
"""Streams that we have reset and still remember: what the peer had sent before it knew is ignored without a word."""

MAX_DEBUG_BYTES = 256
"""Bound on the text in GOAWAY, ours and what is kept of the peer's."""


class ConnectionOwner:
    """What a connection tells whoever runs it, beside what its streams are told."""

    __slots__ = ()

    def accept(self, stream_id: int, block: HeaderBlock, headers: CheckedHeaders) -> Stream:
        """Return the object for a stream that a client has opened.

        Args:
            stream_id: Its number.
            block: The request's header block; equal blocks are the same object while the connection can tell.
            headers: Its fields.
        """
        raise NotImplementedError

    def on_opened(self, stream: Stream) -> None:
        """Learn that an accepted stream is in place and may be answered; its DATA and end come after that."""

    def on_stream_closed(self, stream: Stream) -> None:
        """Learn that a stream is closed, by whichever side."""

    def on_settings(self) -> None:
        """Learn that the peer has changed its settings."""

    def on_goaway(self, last_stream_id: int, code: int, debug: bytes) -> None:
        """Learn that the peer begins no more streams here and takes none above ``last_stream_id``."""

    def on_ping_ack(self) -> None:
        """Learn that the peer has answered a PING."""


class ConnectionState:
    """The state that sending and receiving share.

    Attributes:
        owner: Who is told.
        limits: The bounds.
        is_client: Which side this is.
        out: What is to be written, in order; whoever writes it clears it.
        streams: Open streams by number.
        peer: What the peer has told about itself.
        writable: Whether the transport takes more; DATA waits while it does not.
        block_prefix: What the next header block must begin with.
        encoder: A client's encoder; a server sends blocks that need none.
        accepting: Whether new streams of the peer are accepted; not after GOAWAY.
        last_peer_stream_id: The peer's newest stream.
        next_stream_id: A client's next stream.
        send_window: How many bytes of DATA the peer takes now on all streams.
        receive_window: How many bytes of DATA the peer may send now on all streams.
        uncredited_bytes: Bytes given back to that window, of which the peer was not yet told.
        pending_bytes: DATA that waits on all streams.
        work: Count of streams and of DATA frames sent, which rightly bring frames along: see ``floods``.
        closed_streams: Count of streams that came to their proper end.
        bytes_received: Count of all bytes.
        settings_seen: Whether the peer's first SETTINGS have come.
        settings_acknowledged: Whether the peer has acknowledged ours.
        is_closed: Whether the connection is over: nothing more is to be read, and ``out`` is the last.
        close_code: Why, by the code that was sent or received in GOAWAY.
        close_reason: Why, for people.
        peer_goaway: The code of the peer's GOAWAY; None without one.
    """

    __slots__ = (
        "_blocked",
        "_control",
        "_decoder",
        "_goaway_stream_id",
        "_recent_resets",
        "_resets",
        "accepting",
        "block_prefix",
        "bytes_received",
        "close_code",
        "close_reason",
        "closed_streams",
        "encoder",
        "is_client",
        "is_closed",
        "last_peer_stream_id",
        "limits",
        "next_stream_id",
        "out",
        "owner",
        "peer",
        "peer_goaway",
        "pending_bytes",
        "receive_window",
        "send_frame_bytes",
        "send_window",
        "settings_acknowledged",
        "settings_seen",
        "streams",
        "uncredited_bytes",
        "work",
        "writable",
    )

    def __init__(self, owner: ConnectionOwner, limits: Limits, *, is_client: bool) -> None:
        self.owner = owner
        self.limits = limits
        self.is_client = is_client
        self.out: list[Bytes] = []
        self.streams: dict[int, Stream] = {}
        self.peer = PeerSettings()
        self.writable = True
        self.block_prefix = b""
        self.encoder = HeaderEncoder() if is_client else None
        self.accepting = not is_client
        self.last_peer_stream_id = 0
        self.next_stream_id = 1
        self.send_window = DEFAULT_WINDOW
        self.receive_window = limits.connection_window_bytes
        self.uncredited_bytes = 0
        self.pending_bytes = 0
        self.send_frame_bytes = self.peer.max_frame_bytes
        self.work = 0
        self.closed_streams = 0
        self.bytes_received = 0
        self.settings_seen = False
        self.settings_acknowledged = False
        self.is_closed = False
        self.close_code: int = ErrorCode.NO_ERROR
        self.close_reason = ""
        self.peer_goaway: int | None = None
        self._goaway_stream_id = -1
        self._blocked: dict[Stream, None] | None = None
        self._recent_resets: dict[int, None] | None = None
        # A little above the advertised bound, so that what is between gets an answer and not the connection's end.
        self._decoder = HeaderDecoder(2 * limits.max_header_list_bytes)
        self._control = Allowance("frames without use", limits.control_frames_burst, limits.control_frames_per_second)
        self._resets = Allowance("stream resets", limits.resets_burst, limits.resets_per_second)

    def refill(self, seconds: float) -> None:
        """Let allowances come back, as much as they do in some seconds."""
        self._control.refill(seconds)
        self._resets.refill(seconds)

    def fail(self, code: ErrorCode, reason: str) -> None:
        """End the connection at once, telling the peer why; streams that are open are reset.

        Args:
            code: What GOAWAY says.
            reason: Its debug data.
        """
        if self.is_closed:
            return
        self._send_goaway(code, reason)
        self._end(code, f"{code_name(code)}: {reason}")

    def _send_goaway(self, code: ErrorCode, reason: str) -> None:
        if self._goaway_stream_id < 0:
            # It must never grow. Spec: RFC 9113 section 6.8.
            self._goaway_stream_id = self.last_peer_stream_id
        self.out.append(goaway(self._goaway_stream_id, code, reason.encode()[:MAX_DEBUG_BYTES]))

    def lost(self, reason: str) -> None:
        """Learn that the transport is gone: streams that are open are reset, and nothing more is sent."""
        if not self.is_closed:
            self._end(self.peer_goaway or ErrorCode.NO_ERROR, reason)
        self.out.clear()

    def _end(self, code: int, reason: str) -> None:
        self.is_closed = True
        self.accepting = False
        self.close_code = code
        self.close_reason = reason
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            self._cut(stream)
            stream.on_reset(code, reason, by_peer=False)
            self.owner.on_stream_closed(stream)

    def _spend_control(self, cost: int = 1) -> None:
        """Count a frame that is of no use."""
        self._control.spend(self.work * self.limits.control_frames_per_frame, cost=cost)

    def _cut(self, stream: Stream) -> None:
        """Let nothing more go either way on a stream that is no longer among the open ones."""
        stream.is_local_closed = stream.is_remote_closed = True
        self.pending_bytes -= stream.pending_bytes
        stream.pending = None
        stream.pending_bytes = 0
        stream.pending_trailers = None
        if self._blocked is not None:
            self._blocked.pop(stream, None)

    def _remove(self, stream: Stream) -> None:
        """Forget a stream that is closed."""
        if self.streams.pop(stream.id, None) is not None:
            self._cut(stream)
            self.owner.on_stream_closed(stream)

    def _remember_reset(self, stream_id: int) -> None:
        recent = self._recent_resets
        if recent is None:
            recent = self._recent_resets = {}
        recent[stream_id] = None
        if len(recent) > MAX_RECENT_RESETS:
            del recent[next(iter(recent))]

    def _was_reset(self, stream_id: int) -> bool:
        return self._recent_resets is not None and stream_id in self._recent_resets
