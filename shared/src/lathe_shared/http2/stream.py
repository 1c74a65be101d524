"""One stream: its state, its windows, what waits to be sent on it.

Spec: RFC 9113 section 5.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe_shared.http2.connection import Connection
    from lathe_shared.http2.header_rules import CheckedHeaders

Bytes = bytes | bytearray | memoryview


class Stream:
    """A stream of a connection. The methods that begin with ``on_`` are called by the connection.

    A stream object is made when the stream is opened; what was never opened ("idle") and what is closed has none in
    ``Connection.streams``. So two flags are all its state: "half-closed (local)" is ``is_local_closed``, "half-closed
    (remote)" is ``is_remote_closed``, both are "closed".

    Attributes:
        http2: The connection.
        id: The stream's number; 0 before a client has opened it.
        is_local_closed: Whether nothing more can be sent on it.
        is_remote_closed: Whether nothing more can be received on it.
        has_headers: Whether the peer's first header block has come.
        send_window: How many bytes of DATA the peer takes now; may be negative.
        receive_window: How many bytes of DATA the peer may send now.
        held_bytes: Bytes of DATA received, and not yet given back to the windows: ``Connection.release`` does that.
        uncredited_bytes: Bytes given back, of which the peer was not yet told.
        content_left: What is still to come by the peer's content-length; -1 without one.
        pending: DATA that waits for a window or for the transport; None if none does.
        pending_bytes: The length of that.
        pending_trailers: The block that follows what is pending.
        pending_end: Whether what is pending ends the stream.
    """

    __slots__ = (
        "content_left",
        "has_headers",
        "held_bytes",
        "http2",
        "id",
        "is_local_closed",
        "is_remote_closed",
        "pending",
        "pending_bytes",
        "pending_end",
        "pending_trailers",
        "receive_window",
        "send_window",
        "uncredited_bytes",
    )

    def __init__(self, http2: Connection, stream_id: int = 0) -> None:
        self.http2 = http2
        self.id = stream_id
        self.is_local_closed = False
        self.is_remote_closed = False
        self.has_headers = False
        self.send_window = http2.peer.initial_window_bytes
        self.receive_window = http2.limits.stream_window_bytes
        self.held_bytes = 0
        self.uncredited_bytes = 0
        self.content_left = -1
        self.pending: deque[Bytes] | None = None
        self.pending_bytes = 0
        self.pending_trailers: bytes | None = None
        self.pending_end = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more goes either way."""
        return self.is_local_closed and self.is_remote_closed

    def has_pending(self) -> bool:
        """Return whether something waits to be sent."""
        return self.pending is not None

    def progress_mark(self) -> int | None:
        """Return a number that stays the same while the peer holds this stream up; None while it does not."""
        return self.pending_bytes if self.has_pending() else None

    def on_headers(self, headers: CheckedHeaders) -> None:
        """Take the headers of a response; those of a request come with ``ConnectionOwner.accept``."""

    def on_data(self, data: Bytes) -> None:
        """Take DATA, which then counts as held until ``Connection.release``.

        A memoryview covers a large part of what was read at once, and so keeps little else alive.
        """

    def on_trailers(self, headers: CheckedHeaders) -> None:
        """Take trailers; ``on_end`` follows."""

    def on_end(self) -> None:
        """Learn that the peer has ended its side."""

    def on_reset(self, code: int, reason: str, *, by_peer: bool) -> None:
        """Learn that the stream is gone: by the peer's RST_STREAM, for a fault of its, or with the connection.

        Never called for a reset that was asked for on this side.

        Args:
            code: The error code.
            reason: What happened, for people.
            by_peer: Whether the peer sent RST_STREAM.
        """

    def on_drained(self) -> None:
        """Learn that nothing is pending any more."""
