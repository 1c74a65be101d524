"""grpclib's Server on the HTTP/2 engine: handlers, events, metadata and deadlines as ever, and inline methods beside.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import grpclib.server
from typing_extensions import override

from lathe_shared.http2.allocation import keep_freed_memory
from lathe_shared.http2.at_once_calls import AtOnceFunction, AtOnceMethod, AtOnceStream, PendingAnswer
from lathe_shared.http2.ended_by import EndedBy
from lathe_shared.http2.inline_calls import (
    ErrorFunction,
    InlineCalls,
    InlineFunction,
    InlineMethod,
    InlineStream,
    as_handler,
    default_error,
)
from lathe_shared.http2.limits import SERVER_LIMITS, Limits
from lathe_shared.http2.protocol import Http2Protocol
from lathe_shared.http2.request_head import UNKNOWN_METHOD, RequestHead
from lathe_shared.http2.server_call import ServerStream, Serving

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import grpclib.protocol
    from grpclib._typing import IServable
    from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase

    from lathe_shared.http2.header_rules import CheckedHeaders
    from lathe_shared.http2.hpack import HeaderBlock
    from lathe_shared.http2.stream import Stream

__all__ = ["AtOnceFunction", "Http2Server", "InlineFunction", "PendingAnswer", "RequestHead"]


class Http2Server(grpclib.server.Server):
    """A gRPC server.

    Args:
        handlers: The services, in grpclib's form.
        inline: Methods that are plain functions from bytes to bytes, by path. They are called where a request arrives
            and so must not block; they see the request's headers, and pass by codec and task. While somebody listens
            to grpclib's events, they are served as any other method.
        at_once: For methods of ``handlers``, by path: plain functions that may answer a call by its first message, or
            else leave it to the handler. They are called as inline methods are, and are not asked when those would not
            be answered inline.
        on_error: Turns what these functions have raised into a status.
        codec: Between messages and bytes, for ``handlers``; grpclib's default without one.
        status_details_codec: For details of errors.
        limits: The bounds of each connection.
        max_connections: Bound on connections; further ones are closed as they come.
        max_message_bytes: Bound on one received message; the limits' if absent.
    """

    def __init__(
        self,
        handlers: Collection[IServable],
        *,
        inline: Mapping[str, InlineFunction] | None = None,
        at_once: Mapping[str, AtOnceFunction] | None = None,
        on_error: ErrorFunction = default_error,
        codec: CodecBase | None = None,
        status_details_codec: StatusDetailsCodecBase | None = None,
        limits: Limits = SERVER_LIMITS,
        max_connections: int = 50_000,
        max_message_bytes: int | None = None,
    ) -> None:
        super().__init__(handlers, codec=codec, status_details_codec=status_details_codec)
        if max_message_bytes is not None:
            limits = replace(limits, max_message_bytes=max_message_bytes)
        keep_freed_memory()
        self.limits = limits
        self.serving = Serving(self._mapping, self._codec, self._status_details_codec, self.__dispatch__)
        self.inline_calls = InlineCalls(dict(inline or {}), on_error, self.serving)
        for path, function in self.inline_calls.functions.items():
            self._mapping[path] = as_handler(self.inline_calls, function)
        self.at_once = dict(at_once or {})
        self.max_connections = max_connections
        self.protocols: set[ServerProtocol] = set()
        self.is_draining = False
        self._connection_ended = asyncio.Event()

    @override
    def _protocol_factory(self) -> grpclib.protocol.H2Protocol:
        # Not grpclib's class; nothing but asyncio uses what is returned here.
        return cast("grpclib.protocol.H2Protocol", ServerProtocol(self))

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
        self.is_draining = True
        if self._server is not None:
            self._server.close()
        for protocol in self.protocols:
            protocol.http2.drain()
            protocol.flush()

    async def wait_idle(self, ignored_methods: Collection[str] = ()) -> None:
        """Wait until no RPC runs, apart from those of ``ignored_methods``, which may never end by themselves.

        Cancellation: leaves the RPCs running.
        """
        running = self.serving.running
        while tasks := [task for stream, task in running.items() if stream.method not in ignored_methods]:
            await asyncio.wait(tasks)

    def end_rpcs(self) -> None:
        """Cancel every RPC that runs; its client is answered UNAVAILABLE."""
        for stream in list(self.serving.running):
            stream.cancel(EndedBy.SHUTDOWN)

    def running_methods(self) -> list[str]:
        """Return the method of each RPC that runs."""
        return [stream.method for stream in self.serving.running]

    async def shut_down(self) -> None:
        """Close the port and all connections. Closing twice, or what never started, is fine."""
        if self._server is None:
            return
        self._close_connections()
        self.close()
        await self.wait_closed()

    @override
    def close(self) -> None:
        """Accept no more connections, and end all RPCs."""
        super().close()
        self.is_draining = True
        self.end_rpcs()

    @override
    async def wait_closed(self) -> None:
        """Wait until ``close`` was called and all that it ended has ended, connections with their last words too."""
        if self._server is None or self._server_closed_fut is None:
            raise RuntimeError("Server is not started")
        await asyncio.shield(self._server_closed_fut)
        await self.wait_idle()
        self._close_connections()
        # A transport closes later than it is told to: it sends what it holds, and takes leave of a TLS client.
        while self.protocols:
            self._connection_ended.clear()
            await self._connection_ended.wait()
        await super().wait_closed()

    def connection_ended(self, protocol: ServerProtocol) -> None:
        """Note that a connection's transport is closed."""
        self.protocols.discard(protocol)
        self._connection_ended.set()

    def _close_connections(self) -> None:
        for protocol in list(self.protocols):
            protocol.close("Server closed")


class ServerProtocol(Http2Protocol):
    """One client's connection.

    Args:
        server: The server.
    """

    __slots__ = ("_peer_name", "server")

    def __init__(self, server: Http2Server) -> None:
        super().__init__(server.limits, is_client=False)
        self.server = server
        self._peer_name: str | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self.server.protocols) >= self.server.max_connections:
            cast("asyncio.Transport", transport).abort()
            return
        self.server.protocols.add(self)
        if self.server.is_draining:
            self.http2.drain()
        super().connection_made(transport)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.server.connection_ended(self)

    @override
    def accept(self, stream_id: int, block: HeaderBlock, headers: CheckedHeaders) -> Stream:
        head = block.memo
        server = self.server
        calls = server.inline_calls
        if not isinstance(head, RequestHead):
            head = block.memo = RequestHead(headers, self._peer(), server.serving.content_subtype)
        if head.refusal is None and not self._must_wait():
            if (function := calls.functions.get(head.path)) is not None:
                if block.whole_request is None:
                    block.whole_request = InlineMethod(calls, self, head, function)
                return InlineStream(self, stream_id, head, calls, function)
            if (at_once := server.at_once.get(head.path)) is not None:
                if block.whole_request is None:
                    block.whole_request = AtOnceMethod(calls, self, head, at_once)
                return AtOnceStream(self, stream_id, head, calls, at_once)
        return ServerStream(self, stream_id, head, server.serving)

    def _must_wait(self) -> bool:
        """Whether an inline method cannot be answered where it arrives."""
        return self.http2.pending_bytes > self.limits.max_unsent_bytes or self.server.serving.has_listeners

    @override
    def on_opened(self, stream: Stream) -> None:
        if isinstance(stream, (InlineStream, AtOnceStream)) or not isinstance(stream, ServerStream):
            return
        head = stream.head
        if head.refusal is not None:
            stream.refuse(head.refusal)
            return
        handler = self.server.serving.mapping.get(head.path)
        if handler is None:
            stream.refuse(UNKNOWN_METHOD)
        else:
            self.server.serving.start(stream, handler)

    def _peer(self) -> str:
        if self._peer_name is None:
            address = self.get_peer().addr()
            if isinstance(address, tuple):
                self._peer_name = ":".join(map(str, address[:2]))
            else:
                self._peer_name = str(address or "unix")
        return self._peer_name
