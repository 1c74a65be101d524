"""A stream that carries gRPC messages and that coroutines can wait for, as grpclib's calls expect of one.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import StreamClosedError
from typing_extensions import override

from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.message_framing import (
    PREFIX_BYTES,
    InvalidMessageError,
    MessageError,
    MessageReader,
    MessageTooLargeError,
    pack_prefix,
)
from lathe_shared.http2.protocol import FLUSH_BYTES
from lathe_shared.http2.stream import Bytes, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lathe_shared.http2.protocol import Http2Protocol

CUT_OFF = "the stream ended in the middle of a message"


class GrpcStream(Stream):
    """A stream of messages; one coroutine may receive and one may send.

    Received bytes go back to the flow-control windows when their message is asked for, so a peer can send no more
    than a window ahead of a reader. What is sent waits for the peer's windows and for the transport.

    Args:
        protocol: The connection.
        stream_id: The stream's number; 0 if a client will open it.

    Attributes:
        protocol: As given.
        messages: What was received.
        reset_reason: Why the stream is gone; None while it is not, or after its proper end.
    """

    __slots__ = (
        "_borrowed_bytes",
        "_reader",
        "_sender",
        "_wanted_bytes",
        "is_discarding",
        "messages",
        "protocol",
        "reset_reason",
    )

    def __init__(self, protocol: Http2Protocol, stream_id: int = 0) -> None:
        super().__init__(protocol.http2, stream_id)
        self.protocol = protocol
        self.messages = MessageReader(protocol.limits.max_message_bytes)
        self.reset_reason: str | None = None
        self.is_discarding = False
        self._borrowed_bytes = 0
        self._wanted_bytes = 0
        self._reader: asyncio.Future[None] | None = None
        self._sender: asyncio.Future[None] | None = None

    # What the connection calls

    @override
    def on_data(self, data: Bytes) -> None:
        if self.is_discarding:
            self.http2.release(self, len(data))
            return
        messages = self.messages
        messages.add(data)
        if self._reader is not None:
            if messages.size_bytes >= self._wanted_bytes if self._wanted_bytes else messages.has_message:
                self._wake_reader()
            else:
                self.borrow()
                if messages.has_message:
                    self._wake_reader()

    @override
    def on_end(self) -> None:
        self._wake_reader()

    @override
    def on_reset(self, code: int, reason: str, *, by_peer: bool) -> None:
        self.end_with(reason)

    @override
    def on_drained(self) -> None:
        if self._sender is not None and not self._sender.done():
            self._sender.set_result(None)

    @override
    def progress_mark(self) -> int | None:
        may_send = self.receive_window > 0 and self.http2.receive_window > 0 and not self.is_remote_closed
        if self._reader is not None and may_send and self.messages.is_inside_message:
            return self.pending_bytes + self.messages.size_bytes
        return super().progress_mark()

    def borrow(self) -> None:
        """Give bytes back to the windows that stay here: all of them belong to the message that is waited for."""
        size = self.held_bytes
        self.http2.release(self, size)
        self._borrowed_bytes += size
        protocol = self.protocol
        protocol.borrowed_bytes += size
        limit = protocol.limits.max_incomplete_bytes
        if protocol.borrowed_bytes > limit:
            self.messages.refuse(f"more than {limit} bytes of incomplete messages on one connection")

    def repay(self) -> None:
        """Count no more what was borrowed: its message is whole, or dropped."""
        self.protocol.borrowed_bytes -= self._borrowed_bytes
        self._borrowed_bytes = 0

    def end_with(self, reason: str) -> None:
        """Let whoever waits for this stream know that it is gone."""
        self.reset_reason = reason
        self.discard()
        self._wake_reader()
        self.on_drained()

    def discard(self) -> None:
        """Drop what was received, and what will be: nobody reads it."""
        self.is_discarding = True
        self.messages.clear()
        self.repay()
        if self.held_bytes:
            self.http2.release(self, self.held_bytes)
            self.protocol.output_ready()

    # Receiving

    async def receive_message(self) -> bytes | None:
        """Wait for the next message; None after the last.

        Raises:
            GRPCError: It is too large, or malformed.
            StreamTerminatedError: The stream is gone.
        """
        messages = self.messages
        while True:
            try:
                message = messages.next()
            except MessageError as error:
                raise GRPCError(self._status_of(error), str(error)) from None
            if message is not None:
                self.repay()
                read = self.held_bytes - messages.size_bytes
                if read > 0:
                    self.http2.release(self, read)
                    self.protocol.output_ready()
                return message
            if self.held_bytes:
                self.borrow()
                self.protocol.output_ready()
                if messages.has_message:
                    continue  # it was refused
            if self.reset_reason is not None:
                raise StreamTerminatedError(self.reset_reason)
            if self.is_remote_closed:
                if messages.is_inside_message:
                    raise GRPCError(self.cut_off_status, CUT_OFF)
                return None
            await self._wait_readable()

    cut_off_status = Status.INTERNAL

    def _status_of(self, error: MessageError) -> Status:
        if isinstance(error, MessageTooLargeError):
            return Status.RESOURCE_EXHAUSTED
        return Status.INTERNAL if isinstance(error, InvalidMessageError) else Status.UNIMPLEMENTED

    async def recv_data(self, size: int) -> bytes:
        """Wait for bytes, without regard to messages; fewer only at the end of the stream."""
        while self.messages.size_bytes < size and not self.is_remote_closed:
            self.http2.release(self, self.held_bytes)
            self.protocol.output_ready()
            await self._wait_readable(size)
        if self.reset_reason is not None:
            raise StreamTerminatedError(self.reset_reason)
        data = self.messages.take(size)
        self.http2.release(self, max(self.held_bytes - self.messages.size_bytes, 0))
        self.protocol.output_ready()
        return data

    async def _wait_readable(self, wanted_bytes: int = 0) -> None:
        if self._reader is not None:
            raise RuntimeError("two coroutines receive on one stream")
        self._wanted_bytes = wanted_bytes
        self._reader = self.protocol.loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # Sending

    async def send_message(self, message: Bytes, *, end: bool = False) -> None:
        """Send a message, waiting until the peer and the transport have room for it.

        Args:
            message: The message; it must stay as it is until it is written.
            end: Whether it is the last thing to be sent.

        Raises:
            StreamTerminatedError: The stream is gone.
            StreamClosedError: It was ended before.
        """
        size = len(message)
        await self.send_pieces((pack_prefix(0, size), message), size + PREFIX_BYTES, end=end)

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        """Send bytes, waiting as ``send_message`` does."""
        await self.send_pieces((data,), len(data), end=end_stream)

    async def send_pieces(self, pieces: tuple[Bytes, ...], size_bytes: int, *, end: bool) -> None:
        """Send bytes that are in pieces, waiting as ``send_message`` does."""
        self._check_sendable()
        is_sent = self.http2.send_data(self, pieces, size_bytes, end=end)
        protocol = self.protocol
        if size_bytes >= FLUSH_BYTES:
            protocol.flush()
        else:
            protocol.output_ready()
        if not is_sent:
            self._sender = protocol.loop.create_future()
            try:
                await self._sender
            finally:
                self._sender = None
            if self.reset_reason is not None:
                raise StreamTerminatedError(self.reset_reason)
        if not self.http2.writable:
            await protocol.wait_writable()

    async def send_headers(self, headers: Iterable[tuple[str, str]], end_stream: bool = False) -> None:
        """Send a header block that uses no dynamic table."""
        self.send_block(literal_block([(n.encode(), v.encode("latin-1")) for n, v in headers]), end=end_stream)

    def send_block(self, block: bytes, *, end: bool) -> None:
        """Send an encoded header block.

        Raises:
            StreamTerminatedError: The stream is gone.
            StreamClosedError: It was ended before.
        """
        self._check_sendable()
        self.http2.send_headers(self, block, end=end)
        self.protocol.output_ready()

    async def end(self) -> None:
        """Say that nothing more will be sent."""
        await self.send_pieces((), 0, end=True)

    def _check_sendable(self) -> None:
        if self.is_local_closed or self.pending_end:
            if self.reset_reason is not None:
                raise StreamTerminatedError(self.reset_reason)
            raise StreamClosedError(self.id)

    async def reset(self, error_code: int = ErrorCode.CANCEL) -> None:
        """Reset the stream, unless it is closed."""
        self.reset_nowait(error_code)

    def reset_nowait(self, error_code: int = ErrorCode.NO_ERROR) -> None:
        """Reset the stream, unless it is closed."""
        if self.id in self.http2.streams:
            self.http2.reset(self, error_code)
            self.end_with("reset from this side")
            self.protocol.output_ready()

    @property
    def closable(self) -> bool:
        """Whether the stream is open either way, and on a connection that is."""
        return self.id in self.http2.streams and not self.protocol.is_closing()

    # Names that grpclib's calls use

    @property
    def connection(self) -> Http2Protocol:
        """The connection, for ``get_peer``."""
        return self.protocol

    @property
    def _transport(self) -> GrpcStream:
        return self

    def is_closing(self) -> bool:
        """Return False: what grpclib skips on a closing transport tells, here, how the call really ended."""
        return False
