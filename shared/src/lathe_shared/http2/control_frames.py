"""The frames that carry no message: what each means, and what is wrong with it.

Spec: RFC 9113 sections 6.3 to 6.9, and 5.4 for faults.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode, StreamFaultError
from lathe_shared.http2.frames import ACK, MAX_WINDOW, PING_ACK_HEADER, SETTINGS_ACK, STREAM_ID_MASK, rst_stream
from lathe_shared.http2.sending import MAX_SENT_FRAME_BYTES, SendingSide
from lathe_shared.http2.settings import (
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    parse_settings,
)

if TYPE_CHECKING:
    pass

PRIORITY_BYTES: Final = 5

_WORD: Final = struct.Struct(">I")
_TWO_WORDS: Final = struct.Struct(">II")

_SETTINGS_COST: Final = 10
"""What a SETTINGS frame takes off the allowance: it may touch every stream, and is rare among those who mean well."""


_FAULT_COST: Final = 20
"""What a fault of a stream takes off the allowance for resets: those who mean well make none."""

_MAY_HAPPEN: Final = frozenset({ErrorCode.NO_ERROR, ErrorCode.STREAM_CLOSED, ErrorCode.REFUSED_STREAM})
"""Faults that come about without anybody's fault, when both sides do something at the same time."""


class ControlFrames(SendingSide):
    """The part of a connection that receives control frames, and deals with faults of streams."""

    __slots__ = ()

    def _stream_fault(self, fault: StreamFaultError) -> None:
        """Reset a stream for a fault of the peer."""
        self._resets.spend(self.closed_streams, cost=1 if fault.code in _MAY_HAPPEN else _FAULT_COST)
        stream = self.streams.get(fault.stream_id)
        self._remember_reset(fault.stream_id)
        self.out.append(rst_stream(fault.stream_id, fault.code))
        if stream is not None:
            self._remove(stream)
            stream.on_reset(fault.code, fault.reason, by_peer=False)

    def _check_not_idle(self, stream_id: int, what: str) -> None:
        """Refuse what comes on a stream that was never opened."""
        newest = self.next_stream_id - 2 if self.is_client else self.last_peer_stream_id
        if stream_id > newest or not stream_id & 1:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"{what} on an idle stream")

    def receive_priority(self, _flags: int, stream_id: int, payload: bytes) -> None:
        """Ignore it, as RFC 9113 section 5.3 says, if it is well-formed."""
        if not stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        self._spend_control()
        if len(payload) != PRIORITY_BYTES:
            raise StreamFaultError(stream_id, ErrorCode.FRAME_SIZE_ERROR, f"PRIORITY of {len(payload)} bytes")

    def receive_rst_stream(self, _flags: int, stream_id: int, payload: bytes) -> None:
        """Take a RST_STREAM. Spec: RFC 9113 section 6.4."""
        if not stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on stream 0")
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id, "RST_STREAM")
            self._spend_control()
            return
        self._resets.spend(self.closed_streams)
        self._remove(stream)
        stream.on_reset(_WORD.unpack(payload)[0], "reset by the peer", by_peer=True)

    def receive_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Take SETTINGS, or the acknowledgement of ours. Spec: RFC 9113 section 6.5."""
        if stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & ACK:
            if payload:
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS acknowledgement with a payload")
            if self.settings_acknowledged:
                self._spend_control()
            self.settings_acknowledged = True
            if not self.settings_seen:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "an acknowledgement before SETTINGS")
            return
        if self.settings_seen:
            self._spend_control(_SETTINGS_COST)
        entries = parse_settings(payload, self.limits.max_settings)
        old_window = self.peer.initial_window_bytes
        for identifier, value in entries:
            self.peer.apply(identifier, value, from_server=self.is_client)
        self.settings_seen = True
        self.out.append(SETTINGS_ACK)
        changed = {identifier for identifier, _ in entries}
        if MAX_FRAME_SIZE in changed:
            self.send_frame_bytes = min(self.peer.max_frame_bytes, MAX_SENT_FRAME_BYTES)
        if INITIAL_WINDOW_SIZE in changed:
            self._shift_windows(self.peer.initial_window_bytes - old_window)
        if HEADER_TABLE_SIZE in changed:
            self.limit_table(self.peer.header_table_bytes)
        self.owner.on_settings()

    def _shift_windows(self, delta: int) -> None:
        """Change the windows of all streams. Spec: RFC 9113 section 6.9.2."""
        if not delta:
            return
        for stream in list(self.streams.values()):
            stream.send_window += delta
            if stream.send_window > MAX_WINDOW:
                raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS make a window overflow")
            if delta > 0:
                self._unblock(stream)

    def receive_push_promise(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        """Refuse a PUSH_PROMISE: a client may not send it, and to servers we say that they may not."""
        raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE, which we never allow")

    def receive_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        """Take a PING, or the answer to ours. Spec: RFC 9113 section 6.7."""
        if stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if flags & ACK:
            self._spend_control()
            self.owner.on_ping_ack()
            return
        self._spend_control()
        self.out.append(PING_ACK_HEADER + payload)

    def receive_goaway(self, _flags: int, stream_id: int, payload: bytes) -> None:
        """Take a GOAWAY. Spec: RFC 9113 section 6.8."""
        if stream_id:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < _TWO_WORDS.size:
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY shorter than its fixed fields")
        self._spend_control()
        last_stream_id, code = _TWO_WORDS.unpack_from(payload)
        self.peer_goaway = code
        self.owner.on_goaway(last_stream_id & STREAM_ID_MASK, code, payload[_TWO_WORDS.size :])

    def receive_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        """Take a WINDOW_UPDATE. Spec: RFC 9113 section 6.9."""
        self._spend_control()
        increment = _WORD.unpack(payload)[0] & STREAM_ID_MASK
        if not stream_id:
            if not increment:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self.send_window += increment
            if self.send_window > MAX_WINDOW:
                raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "WINDOW_UPDATE makes the window overflow")
            self._send_blocked()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id, "WINDOW_UPDATE")
            return
        if not increment:
            raise StreamFaultError(stream_id, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        stream.send_window += increment
        if stream.send_window > MAX_WINDOW:
            raise StreamFaultError(stream_id, ErrorCode.FLOW_CONTROL_ERROR, "WINDOW_UPDATE makes the window overflow")
        self._unblock(stream)
