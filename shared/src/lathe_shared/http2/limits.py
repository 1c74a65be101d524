"""Every bound of a connection: what a peer may make us keep, do, or wait for.

Spec: RFC 9113 section 10.5 (denial of service) names most of what is bounded here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lathe_shared.http2.frames import DEFAULT_MAX_FRAME, DEFAULT_WINDOW, LARGEST_MAX_FRAME, MAX_WINDOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one connection.

    The memory that one connection can take is about ``connection_window_bytes`` for what was received and not read,
    ``max_incomplete_bytes`` for messages under way, ``max_unsent_bytes`` for what the peer does not take, and
    ``max_concurrent_streams`` times ``max_header_list_bytes`` for headers.

    Attributes:
        max_concurrent_streams: Streams that the peer may have open; more are refused. What Bazel's many jobs need,
            each with an Execute stream, with room.
        max_frame_bytes: Largest frame that the peer may send: SETTINGS_MAX_FRAME_SIZE.
        stream_window_bytes: What a peer may send on one stream before it is read. 10 Gbit/s over 6 ms.
        connection_window_bytes: The same for all streams together.
        max_header_list_bytes: Size of a header list, counted as RFC 9113 section 6.5.2 does; a larger one is
            answered with HTTP 431, one more than twice as large ends the connection.
        max_header_block_bytes: The same before decompression; more ends the connection.
        max_continuation_frames: CONTINUATION frames of one header block.
        max_settings: Settings in one SETTINGS frame.
        control_frames_burst: Frames without use (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA, unknown ones)
            that may come at once.
        control_frames_per_second: How fast that allowance comes back.
        control_frames_per_frame: By how much each DATA frame sent and each stream opened raises it: a receiver of
            much data rightly sends many WINDOW_UPDATEs, and grpc-java a PING with them.
        resets_burst: Streams that the peer may reset at once, or a twentieth as many that are reset for its mistakes.
            A build that is interrupted resets all that it has open.
        resets_per_second: How fast that allowance comes back.
        max_message_bytes: Largest gRPC message, checked when its length is known and before memory is taken; also
            the largest that a compressed one may grow to.
        max_incomplete_bytes: Bytes of messages that have begun and not ended, of all streams: beyond what the windows
            hold, since a message may be larger than they are. A message that would go above it is refused.
        max_unsent_bytes: Output that may wait for a peer that does not take it. Above it nothing more is read from
            that peer until it does.
        handshake_seconds: How long a peer may take for its preface, its SETTINGS, and the acknowledgement of ours.
        progress_seconds: How long a header block, a frame or a message may stay incomplete, the first message of a call
            may take to begin, and output may wait, without a single byte of progress.
        idle_seconds: A connection without a stream for so long is closed in peace; 0 keeps it for ever.
        keepalive_seconds: After so long without a byte the peer is asked by PING whether it lives; 0 never asks.
        keepalive_timeout_seconds: How long it may take to answer.
    """

    max_concurrent_streams: int = 2000
    max_frame_bytes: int = 1 << 18
    stream_window_bytes: int = 8 << 20
    connection_window_bytes: int = 16 << 20
    max_header_list_bytes: int = 32 << 10
    max_header_block_bytes: int = 64 << 10
    max_continuation_frames: int = 16
    max_settings: int = 64
    control_frames_burst: int = 2000
    control_frames_per_second: int = 200
    control_frames_per_frame: int = 4
    resets_burst: int = 3000
    resets_per_second: int = 100
    max_message_bytes: int = 16 << 20
    max_incomplete_bytes: int = 512 << 20
    max_unsent_bytes: int = 8 << 20
    handshake_seconds: float = 10.0
    progress_seconds: float = 60.0
    idle_seconds: float = 0.0
    keepalive_seconds: float = 60.0
    keepalive_timeout_seconds: float = 20.0

    def __post_init__(self) -> None:
        if not DEFAULT_MAX_FRAME <= self.max_frame_bytes <= LARGEST_MAX_FRAME:
            raise ValueError(f"max_frame_bytes must be {DEFAULT_MAX_FRAME} to {LARGEST_MAX_FRAME}")
        for name in ("stream_window_bytes", "connection_window_bytes"):
            # A smaller window than the one that every connection begins with could only be enforced after the
            # peer has acknowledged it.
            if not DEFAULT_WINDOW <= getattr(self, name) <= MAX_WINDOW:
                raise ValueError(f"{name} must be {DEFAULT_WINDOW} to {MAX_WINDOW}")
        if self.max_concurrent_streams < 1:
            raise ValueError("max_concurrent_streams must be at least 1")


SERVER_LIMITS = Limits()
CLIENT_LIMITS = Limits(keepalive_seconds=20.0, keepalive_timeout_seconds=10.0)
"""A client notices sooner that its server is gone: its calls wait for it."""
