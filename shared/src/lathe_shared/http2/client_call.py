"""One call on the client: grpclib's calls, made on our streams.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpclib.client
from grpclib.exceptions import ProtocolError, StreamTerminatedError
from typing_extensions import override

from lathe_shared.http2.errors import code_name
from lathe_shared.http2.grpc_stream import GrpcStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from lathe_shared.http2.channel import ClientProtocol
    from lathe_shared.http2.header_rules import CheckedHeaders

Headers = list[tuple[str, str]]


class ClientStream(GrpcStream):
    """The stream of a call.

    Attributes:
        headers: The response's headers, once they have come.
        trailers: Its trailers, once they have come.
    """

    __slots__ = ("_has_ended", "_headers_waiter", "headers", "trailers")

    protocol: ClientProtocol

    def __init__(self, protocol: ClientProtocol) -> None:
        super().__init__(protocol)
        self.headers: Headers | None = None
        self.trailers: Headers | None = None
        self._has_ended = False
        self._headers_waiter: asyncio.Future[None] | None = None

    # What the connection calls

    @override
    def on_headers(self, headers: CheckedHeaders) -> None:
        self.headers = headers.fields
        for name, value in headers.fields:
            if name == "grpc-encoding":
                self.messages.encoding = value
        self._wake_headers()

    @override
    def on_trailers(self, headers: CheckedHeaders) -> None:
        self.trailers = headers.fields

    @override
    def on_end(self) -> None:
        self._has_ended = True
        super().on_end()
        self._wake_headers()

    @override
    def on_reset(self, code: int, reason: str, *, by_peer: bool) -> None:
        if self._has_ended:
            # The whole answer is here; the server only wants no more of what we send.
            self.on_drained()
            return
        super().on_reset(code, f"{reason} ({code_name(code)})" if by_peer else reason, by_peer=by_peer)
        self._wake_headers()

    def _wake_headers(self) -> None:
        if self._headers_waiter is not None and not self._headers_waiter.done():
            self._headers_waiter.set_result(None)

    @override
    def end_with(self, reason: str) -> None:
        super().end_with(reason)
        self._wake_headers()

    # What a call does

    async def send_request(
        self,
        headers: Headers,
        end_stream: bool = False,
        *,
        _processor: object = None,
    ) -> Callable[[], None]:
        """Open the stream, waiting until the server allows one more.

        Returns:
            What to call when the call is over, however it was.

        Raises:
            StreamTerminatedError: The connection is lost, or the server is leaving.
        """
        protocol = self.protocol
        http2 = self.http2
        while not http2.can_open():
            if not protocol.is_usable:
                raise StreamTerminatedError(protocol.close_reason)
            await protocol.wait_for_slot()
        encoder = http2.encoder
        if encoder is None:
            raise TypeError("not a client's connection")
        block = encoder.encode(tuple([(name.encode(), value.encode("latin-1")) for name, value in headers]))
        http2.open(self, block, end=end_stream)
        protocol.output_ready()
        return self.release

    def release(self) -> None:
        """Drop what was not read."""
        self.discard()

    async def recv_headers(self) -> Headers:
        """Wait for the response's headers."""
        while self.headers is None:
            if self.reset_reason is not None:
                raise StreamTerminatedError(self.reset_reason)
            await self._wait_headers()
        return self.headers

    async def recv_trailers(self) -> Headers:
        """Wait for the trailers, dropping messages that were not read."""
        while self.trailers is None and not self._has_ended:
            if self.reset_reason is not None:
                raise StreamTerminatedError(self.reset_reason)
            self.discard()
            await self._wait_headers()
        return self.trailers or []

    async def _wait_headers(self) -> None:
        self._headers_waiter = self.protocol.loop.create_future()
        try:
            await self._headers_waiter
        finally:
            self._headers_waiter = None


class ClientCall(grpclib.client.Stream[Any, Any]):
    """grpclib's view of a call, with messages that go the short way."""

    _stream: ClientStream  # type: ignore[assignment]  # ours has what grpclib uses of its own

    @property
    def _has_listeners(self) -> bool:
        return any(self._dispatch._listeners.values())  # noqa: SLF001 -- there is no public way to ask

    @override
    async def send_message(self, message: Any, *, end: bool = False) -> None:
        if not self._send_request_done:
            await self.send_request()
        if not self._cardinality.client_streaming:
            if self._send_message_done:
                raise ProtocolError("Message was already sent")
            ends = True
        else:
            ends = end
        if self._end_done:
            raise ProtocolError("Stream is ended")
        with self._wrapper:
            if self._has_listeners:
                (message,) = await self._dispatch.send_message(message)
            data = self._codec.encode(message, self._send_type)
            await self._stream.send_message(data, end=ends)
            self._send_message_done = True
            if end:
                self._end_done = True

    @override
    async def recv_message(self) -> Any:
        if not self._recv_initial_metadata_done:
            await self.recv_initial_metadata()
        with self._wrapper:
            data = await self._stream.receive_message()
            if data is None:
                return None
            message = self._codec.decode(data, self._recv_type)
            if self._has_listeners:
                (message,) = await self._dispatch.recv_message(message)
            return message
