"""A connection's sense of time: what a peer takes too long for, and whether it is there at all.

Nothing here reads a clock or waits: whoever runs the connection calls ``check`` now and then, and soon enough when it
asks for that. So nothing on the way of a call ever looks at the time.

Spec: RFC 9113 sections 6.5.3 (SETTINGS_TIMEOUT), 6.7 (PING) and 10.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lathe_shared.http2.errors import ErrorCode

if TYPE_CHECKING:
    from lathe_shared.http2.connection import Connection
    from lathe_shared.http2.stream import Stream

CHECK_SECONDS: Final = 5.0
"""Longest time between two checks: what allowances gain in it is little against their bursts."""

FAREWELL_SECONDS: Final = 1.0
"""How long a peer that was told to go may take before the connection is closed from this side."""


class Watch:
    """Watches one connection.

    Args:
        http2: The connection.
        now: Seconds on any clock that only goes forward.

    Attributes:
        is_peer_gone: Whether the peer was found silent or stuck, so that nothing sent to it would arrive.
    """

    __slots__ = (
        "_bytes_seen",
        "_checked_at",
        "_drained_at",
        "_heard_at",
        "_http2",
        "_idle_since",
        "_inside_mark",
        "_inside_since",
        "_pinged_at",
        "_stalled",
        "_started_at",
        "_unsent_mark",
        "_unsent_since",
        "_work_seen",
        "is_peer_gone",
    )

    def __init__(self, http2: Connection, now: float) -> None:
        self._http2 = http2
        self._started_at = self._checked_at = self._heard_at = now
        self._bytes_seen = 0
        self._pinged_at: float | None = None
        self._idle_since = now
        self._work_seen = 0
        self._drained_at: float | None = None
        self._inside_since: float | None = None
        self._inside_mark = 0
        self._unsent_since: float | None = None
        self._unsent_mark = 0
        self._stalled: dict[Stream, tuple[int, float]] | None = None
        self.is_peer_gone = False

    def check(self, now: float, unsent_bytes: int) -> float:
        """Do what the time asks for.

        Args:
            now: The time.
            unsent_bytes: What the transport holds for the peer; it counts as progress when that becomes less.

        Returns:
            After how many seconds to check again, unless the connection is now closed.
        """
        http2 = self._http2
        if self._http2.is_closed:
            return CHECK_SECONDS
        http2.refill(now - self._checked_at)
        self._checked_at = now
        wait = CHECK_SECONDS
        for check in (self._check_handshake, self._check_incoming, self._check_streams, self._check_idle):
            wait = min(wait, check(now))
            if http2.is_closed:
                return wait
        wait = min(wait, self._check_outgoing(now, unsent_bytes))
        if not http2.is_closed:
            wait = min(wait, self._check_alive(now))
        return max(wait, 0.01)

    def _check_handshake(self, now: float) -> float:
        if self._http2.settings_acknowledged and self._http2.settings_seen:
            return CHECK_SECONDS
        left = self._started_at + self._http2.limits.handshake_seconds - now
        if left <= 0:
            self._http2.fail(ErrorCode.SETTINGS_TIMEOUT, "no SETTINGS, or no acknowledgement of ours")
        return left

    def _check_incoming(self, now: float) -> float:
        """Bound how long a frame or a header block may stay incomplete."""
        http2 = self._http2
        if not http2.header_block_begun and not http2.is_inside_frame:
            self._inside_since = None
            return CHECK_SECONDS
        # A frame may take long as long as bytes come; a header block, of a few frames, may not.
        mark = -1 if http2.header_block_begun else http2.bytes_received
        if self._inside_since is None or mark != self._inside_mark:
            self._inside_since = now
            self._inside_mark = mark
        left = self._inside_since + http2.limits.progress_seconds - now
        if left <= 0:
            http2.fail(ErrorCode.ENHANCE_YOUR_CALM, "a frame or a header block stays incomplete")
        return left

    def _check_streams(self, now: float) -> float:
        """Reset streams that the peer holds up: DATA that it does not let go, a message that it does not end."""
        http2 = self._http2
        limit = http2.limits.progress_seconds
        wait = CHECK_SECONDS
        stalled: dict[Stream, tuple[int, float]] = {}
        before = self._stalled or {}
        for stream in list(http2.streams.values()):
            mark = stream.progress_mark()
            if mark is None:
                continue
            earlier = before.get(stream)
            since = earlier[1] if earlier is not None and earlier[0] == mark else now
            left = since + limit - now
            if left <= 0:
                http2.reset(stream, ErrorCode.CANCEL)
                stream.on_reset(ErrorCode.CANCEL, f"no progress for {limit} seconds", by_peer=False)
            else:
                stalled[stream] = (mark, since)
                wait = min(wait, left)
        self._stalled = stalled or None
        return wait

    def _check_idle(self, now: float) -> float:
        """Part in peace with a peer that has no stream for long, or was told to begin no more."""
        http2 = self._http2
        if http2.streams:
            self._idle_since = now
            return CHECK_SECONDS
        if http2.work != self._work_seen:
            # Streams came and went since the last check.
            self._work_seen = http2.work
            self._idle_since = now
        wait = CHECK_SECONDS
        idle_seconds = http2.limits.idle_seconds
        if idle_seconds and self._drained_at is None and http2.accepting:
            wait = self._idle_since + idle_seconds - now
            if wait <= 0:
                http2.drain("idle")
        if not http2.accepting and not http2.is_client:
            if self._drained_at is None:
                self._drained_at = now
            wait = self._drained_at + FAREWELL_SECONDS - now
            if wait <= 0:
                http2.lost("drained")
        return wait

    def _check_outgoing(self, now: float, unsent_bytes: int) -> float:
        """Give up a peer that takes nothing of what waits for it."""
        if not unsent_bytes:
            self._unsent_since = None
            return CHECK_SECONDS
        if self._unsent_since is None or unsent_bytes < self._unsent_mark:
            self._unsent_since = now
        self._unsent_mark = unsent_bytes
        left = self._unsent_since + self._http2.limits.progress_seconds - now
        if left <= 0:
            self.is_peer_gone = True
            self._http2.lost("the peer takes nothing of what is sent to it")
        return left

    def _check_alive(self, now: float) -> float:
        """Ask a peer that was silent for long whether it is there, and give it up if it does not answer."""
        http2 = self._http2
        limits = http2.limits
        if http2.bytes_received != self._bytes_seen:
            self._bytes_seen = http2.bytes_received
            self._heard_at = now
            self._pinged_at = None
        if not limits.keepalive_seconds:
            return CHECK_SECONDS
        if self._pinged_at is not None:
            left = self._pinged_at + limits.keepalive_timeout_seconds - now
            if left <= 0:
                self.is_peer_gone = True
                http2.lost("the peer is silent")
            return left
        left = self._heard_at + limits.keepalive_seconds - now
        if left <= 0:
            self._pinged_at = now
            http2.ping()
            return limits.keepalive_timeout_seconds
        return left
