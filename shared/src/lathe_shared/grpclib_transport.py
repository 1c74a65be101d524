"""grpclib's own Server and Channel as Lathe uses them: bytes in and out, bounded, drained gracefully.

What they stand on is in ``grpclib_protocol``.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import asyncio
import binascii
from typing import TYPE_CHECKING, Any, cast

import grpclib.client
import grpclib.protocol
import grpclib.server
from grpclib.config import Configuration
from grpclib.encoding.base import CodecBase
from grpclib.metadata import decode_bin_value
from h2.errors import ErrorCodes
from typing_extensions import override

from lathe_shared.grpclib_protocol import DEFAULT_MAX_MESSAGE_BYTES, BoundedStream, GrpcProtocol
from lathe_shared.rpc_context import EndedBy
from lathe_shared.status_details import LatheStatusDetailsCodec

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Collection

    from grpclib._typing import IServable
    from grpclib.const import Handler
    from grpclib.encoding.base import StatusDetailsCodecBase
    from grpclib.events import _DispatchServerEvents

CONNECTION_WINDOW_BYTES = 16 << 20
STREAM_WINDOW_BYTES = 8 << 20
"""Flow-control windows: what may be under way unread. Enough for 10 Gbit/s over 10 ms, and a bound on memory."""

SERVER_CONFIGURATION = Configuration(
    http2_connection_window_size=CONNECTION_WINDOW_BYTES,
    http2_stream_window_size=STREAM_WINDOW_BYTES,
    # A peer whose machine died never closes its connection: after a minute of silence it is asked.
    _keepalive_time=60.0,
    _keepalive_timeout=20.0,
    _keepalive_permit_without_calls=True,
    _http2_max_pings_without_data=0,
    _http2_min_sent_ping_interval_without_data=30.0,
)
CLIENT_CONFIGURATION = Configuration(
    http2_connection_window_size=CONNECTION_WINDOW_BYTES,
    http2_stream_window_size=STREAM_WINDOW_BYTES,
    _keepalive_time=20.0,
    _keepalive_timeout=10.0,
    _keepalive_permit_without_calls=True,
    _http2_max_pings_without_data=0,
    _http2_min_sent_ping_interval_without_data=10.0,
)


class RawCodec(CodecBase):
    """Messages are bytes to grpclib; whoever needs a typed one parses it."""

    __content_subtype__ = "proto"

    @override
    def encode(self, message: Any, message_type: Any) -> bytes:
        return cast("bytes", message)

    @override
    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


class _Handler(grpclib.server.Handler):
    """Starts a task per RPC, and knows which are running."""

    draining = False

    def __init__(
        self,
        mapping: dict[str, Handler],
        codec: CodecBase,
        status_details_codec: StatusDetailsCodecBase | None,
        dispatch: _DispatchServerEvents,
    ) -> None:
        super().__init__(mapping, codec, status_details_codec, dispatch)
        self.running: dict[BoundedStream, asyncio.Task[None]] = {}

    @override
    def accept(
        self, stream: grpclib.protocol.Stream, headers: list[tuple[str, str]], release_stream: Callable[[], Any]
    ) -> None:
        if self.draining:
            # Begun before the client saw our GOAWAY; REFUSED_STREAM tells it that nothing was done.
            stream.reset_nowait(ErrorCodes.REFUSED_STREAM)
            release_stream()
            return
        super().accept(stream, [header for header in headers if _is_readable(header)], release_stream)
        ours = cast("BoundedStream", stream)
        ours.method = next((value for name, value in headers if name == ":path"), "")
        task = self._tasks[stream]
        self.running[ours] = task
        task.add_done_callback(lambda _: self.running.pop(ours, None))


def _is_readable(header: tuple[str, str]) -> bool:
    """Whether grpclib can decode a header; one that is no base64 would make it forget the whole RPC."""
    name, value = header
    if not name.endswith("-bin"):
        return True
    try:
        decode_bin_value(value.encode("ascii"))
    except (binascii.Error, UnicodeEncodeError):
        return False
    return True


class GrpclibServer(grpclib.server.Server):
    """A gRPC server that drains.

    Args:
        handlers: The services.
        max_message_bytes: Bound on one received message.
    """

    def __init__(self, handlers: Collection[IServable], *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> None:
        super().__init__(
            handlers,
            codec=RawCodec(),
            status_details_codec=LatheStatusDetailsCodec(),
            config=SERVER_CONFIGURATION,
        )
        self._max_message_bytes = max_message_bytes
        self._protocols: set[GrpcProtocol] = set()

    @override
    def _protocol_factory(self) -> grpclib.protocol.H2Protocol:
        self.__gc_step__()
        self._protocols = {protocol for protocol in self._protocols if not protocol.handler.closing}  # type: ignore[attr-defined]
        handler = _Handler(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        self._handlers.add(handler)
        protocol = GrpcProtocol(handler, self._config, self._h2_config, self._max_message_bytes)
        self._protocols.add(protocol)
        return protocol

    @property
    def port(self) -> int:
        """The TCP port that the server is bound to; 0 on a unix socket."""
        for sock in getattr(self._server, "sockets", ()):
            name = sock.getsockname()
            if isinstance(name, tuple):
                return int(name[1])
        return 0

    def begin_drain(self) -> None:
        """Accept no more connections and no more RPCs; those that run go on. Never waits."""
        if self._server is not None:
            self._server.close()
        for protocol in self._protocols:
            cast("_Handler", protocol.handler).draining = True
            if hasattr(protocol, "connection") and not protocol.connection.is_closing():
                protocol.connection.send_goaway()

    async def wait_idle(self, ignored_methods: Collection[str] = ()) -> None:
        """Wait until no RPC runs, apart from those of ``ignored_methods``, which may never end by themselves.

        Cancellation: leaves the RPCs running.
        """
        while tasks := [task for stream, task in self._running() if stream.method not in ignored_methods]:
            await asyncio.wait(tasks)

    def end_rpcs(self) -> None:
        """Cancel every RPC that runs; the boundary answers UNAVAILABLE in their place."""
        for stream, task in self._running():
            stream.ended_by = stream.ended_by or EndedBy.SHUTDOWN
            task.cancel()

    def _running(self) -> list[tuple[BoundedStream, asyncio.Task[None]]]:
        return [pair for protocol in self._protocols for pair in cast("_Handler", protocol.handler).running.items()]

    def running_methods(self) -> list[str]:
        """Return the method of each RPC that runs."""
        return [stream.method for stream, _ in self._running()]

    async def shut_down(self) -> None:
        """Close the port and all connections. Closing twice, or what never started, is fine."""
        if self._server is None:
            return
        for protocol in list(self._protocols):
            if hasattr(protocol, "processor"):
                protocol.processor.close("Server closed")
        self._protocols.clear()
        self.close()
        await self.wait_closed()


def reset_if_open(stream: grpclib.server.Stream[bytes, bytes]) -> None:
    """Tell a client that was answered early to stop sending.

    The answer and its trailers must have been sent. Spec: RFC 9113 section 8.1, a response complete before the request.
    """
    h2_stream = stream._stream  # noqa: SLF001 -- grpclib's own way to reset reports the call as cancelled
    if h2_stream.closable:
        h2_stream.reset_nowait(ErrorCodes.NO_ERROR)


class GrpclibChannel(grpclib.client.Channel):
    """A gRPC connection that is made when first needed, and again after it was lost.

    Args:
        host: Host of the server; ignored if ``path`` is given.
        port: Port of the server.
        path: Unix socket of the server.
        ssl: What TLS needs; None for a plain connection.
        max_message_bytes: Bound on one received message.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        path: str | None = None,
        ssl: ssl.SSLContext | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        super().__init__(
            host,
            port,
            path=path,
            ssl=ssl,
            codec=RawCodec(),
            status_details_codec=LatheStatusDetailsCodec(),
            config=CLIENT_CONFIGURATION,
        )
        self._max_message_bytes = max_message_bytes
        self.target = path or f"{host}:{port}"

    @override
    def _protocol_factory(self) -> grpclib.protocol.H2Protocol:
        return GrpcProtocol(grpclib.client.Handler(), self._config, self._h2_config, self._max_message_bytes)
