"""grpclib's Channel on the HTTP/2 engine: one connection for all calls, made when needed and again after it was lost.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md), and doc/connection-backoff.md for reconnecting.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import grpclib.client
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import Deadline
from multidict import MultiDict
from typing_extensions import override

from lathe_shared.http2.allocation import keep_freed_memory
from lathe_shared.http2.client_call import ClientCall, ClientStream
from lathe_shared.http2.errors import ErrorCode, code_name
from lathe_shared.http2.limits import CLIENT_LIMITS, Limits
from lathe_shared.http2.protocol import Http2Protocol

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    import grpclib.protocol
    from grpclib.config import Configuration
    from grpclib.const import Cardinality
    from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase

    from lathe_shared.http2.stream import Stream

NOT_BEGUN: Final = "the server leaves, and has not begun this call"
"""What a call is told that GOAWAY has excluded: it may be made again, whatever it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait between attempts to connect.

    Attributes:
        first_seconds: Wait after the first failure.
        factor: By how much each further one makes it longer.
        limit_seconds: Longest wait.
        jitter: Which part of a wait is left to chance, so that many clients don't come back at the same moment.
    """

    first_seconds: float = 0.05
    factor: float = 1.6
    limit_seconds: float = 5.0
    jitter: float = 0.4

    def wait_seconds(self, failures: int, draw: float) -> float:
        """Return the wait after a number of failures in a row.

        Args:
            failures: At least one.
            draw: A random number from 0 to 1.
        """
        full = min(self.first_seconds * self.factor ** min(failures - 1, 60), self.limit_seconds)
        return full * (1 - self.jitter * draw)


class ClientProtocol(Http2Protocol):
    """One connection to a server.

    Args:
        limits: Its bounds.
    """

    __slots__ = ("_slot_waiters", "close_reason", "is_leaving")

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits, is_client=True)
        self.is_leaving = False
        self.close_reason = "Connection lost"
        self._slot_waiters: deque[asyncio.Future[None]] = deque()

    @property
    def is_usable(self) -> bool:
        """Whether calls may be made on it, perhaps after some wait."""
        return not self.is_leaving and not self.is_closing() and not self.http2.is_closed

    @override
    def on_stream_closed(self, stream: Stream) -> None:
        self._wake_slots()
        self._close_if_done()

    @override
    def on_settings(self) -> None:
        self._wake_slots()

    @override
    def on_goaway(self, last_stream_id: int, code: int, debug: bytes) -> None:
        self.is_leaving = True
        text = debug.decode("utf-8", "replace")
        self.close_reason = NOT_BEGUN if code == ErrorCode.NO_ERROR else f"the server left: {code_name(code)} {text}"
        for stream_id, stream in list(self.http2.streams.items()):
            if stream_id > last_stream_id:
                self.http2.reset(stream, ErrorCode.CANCEL)
                stream.on_reset(ErrorCode.REFUSED_STREAM, self.close_reason, by_peer=False)
        self._wake_slots()
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self.is_leaving and not self.http2.streams and not self.is_lost:
            # Not from within ``receive``: there may be more to read.
            self.loop.call_soon(self.close)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wake_slots()

    @override
    def close(self, reason: str = "Connection closed") -> None:
        super().close(reason)
        self._wake_slots()

    async def wait_for_slot(self) -> None:
        """Wait until one more stream may be opened; the caller looks again."""
        waiter = self.loop.create_future()
        self._slot_waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake_slots()  # the turn is somebody else's
            raise

    def _wake_slots(self) -> None:
        room = self.http2.peer.max_concurrent_streams - len(self.http2.streams) if self.is_usable else None
        while self._slot_waiters and (room is None or room > 0):
            waiter = self._slot_waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room = None if room is None else room - 1


class Http2Channel(grpclib.client.Channel):
    """A gRPC connection that is made when first needed, and again after it was lost.

    A call that finds no connection waits for one attempt to make it, and fails if that fails. Attempts after a failure
    keep a distance that grows, however many calls ask; a call that comes between waits for the next one.

    Args:
        host: Host of the server; ignored if ``path`` is given.
        port: Port of the server.
        path: Unix socket of the server.
        ssl: What TLS needs; None for a plain connection.
        codec: Between messages and bytes; grpclib's default without one.
        status_details_codec: For details of errors.
        config: grpclib's configuration, of which only ``ssl_target_name_override`` is used.
        limits: The bounds of each connection.
        max_message_bytes: Bound on one received message; the limits' if absent.
        backoff: The distance between attempts to connect.
        sleep: Waits for a number of seconds.
        draw: Gives random numbers from 0 to 1.
    """

    _protocol: ClientProtocol | None  # type: ignore[assignment]  # ours in place of grpclib's

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        path: str | None = None,
        ssl: ssl.SSLContext | None = None,
        codec: CodecBase | None = None,
        status_details_codec: StatusDetailsCodecBase | None = None,
        config: Configuration | None = None,
        limits: Limits = CLIENT_LIMITS,
        max_message_bytes: int | None = None,
        backoff: Backoff | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(
            host,
            port,
            path=path,
            ssl=ssl,
            codec=codec,
            status_details_codec=status_details_codec,
            config=config,
        )
        keep_freed_memory()
        self.target = path or f"{self._host}:{self._port}"
        self.limits = limits
        self._max_message_bytes = limits.max_message_bytes if max_message_bytes is None else max_message_bytes
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._draw = draw
        self._failures = 0
        self._next_attempt_at = 0.0
        self._attempt: asyncio.Task[None] | None = None

    @override
    def _protocol_factory(self) -> grpclib.protocol.H2Protocol:
        limits = replace(self.limits, max_message_bytes=self._max_message_bytes)
        return cast("grpclib.protocol.H2Protocol", ClientProtocol(limits))

    @property
    @override
    def _connected(self) -> bool:
        protocol = self._protocol
        return protocol is not None and protocol.is_usable

    async def connect(self) -> ClientProtocol:
        """Return the connection, made if need be.

        Raises:
            OSError: The server cannot be reached.
            StreamTerminatedError: The channel was closed meanwhile.
        """
        while (protocol := self._protocol) is None or not protocol.is_usable:
            if self._attempt is None:
                self._attempt = self._loop.create_task(self._connect_once())
                self._attempt.add_done_callback(self._attempt_done)
            await self._outcome(self._attempt)
        return protocol

    async def _outcome(self, attempt: asyncio.Task[None]) -> None:
        """Wait for an attempt; a caller that gives up leaves it to the others."""
        try:
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if attempt.cancelled() and caller is not None and not caller.cancelling():
                raise StreamTerminatedError("the channel was closed") from None
            raise

    def _attempt_done(self, attempt: asyncio.Task[None]) -> None:
        self._attempt = None
        if not attempt.cancelled():
            attempt.exception()  # the callers have it, if any is left

    async def _connect_once(self) -> None:
        wait = self._next_attempt_at - self._loop.time() if self._failures else 0.0
        if wait > 0:
            await self._sleep(wait)
        try:
            self._protocol = cast("ClientProtocol", await self._create_connection())
        except Exception:
            self._failures += 1
            self._next_attempt_at = self._loop.time() + self._backoff.wait_seconds(self._failures, self._draw())
            raise
        self._failures = 0

    @override
    async def __connect__(self) -> grpclib.protocol.H2Protocol:
        return cast("grpclib.protocol.H2Protocol", _Connected(await self.connect()))

    @override
    def request(
        self,
        name: str,
        cardinality: Cardinality,
        request_type: Any,
        reply_type: Any,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Any = None,
    ) -> grpclib.client.Stream[Any, Any]:
        if timeout is not None:
            limit = Deadline.from_timeout(timeout)
            deadline = limit if deadline is None else min(limit, deadline)
        return ClientCall(
            self,
            name,
            cast("Any", MultiDict(metadata or ())),
            cardinality,
            request_type,
            reply_type,
            codec=self._codec,
            status_details_codec=self._status_details_codec,
            dispatch=self.__dispatch__,
            deadline=deadline,
        )

    @override
    def close(self) -> None:
        """Close the connection; the next call makes a new one."""
        if self._attempt is not None:
            self._attempt.cancel()
        if self._protocol is not None:
            self._protocol.close("Connection closed")
            self._protocol = None
        self._failures = 0


class _Connected:
    """A connection in the form in which grpclib's call asks it for a stream: ``processor.connection.create_stream``."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: ClientProtocol) -> None:
        self._protocol = protocol

    @property
    def processor(self) -> _Connected:
        return self

    @property
    def connection(self) -> _Connected:
        return self

    def create_stream(self, *, wrapper: object = None) -> ClientStream:  # noqa: ARG002 -- grpclib's
        return ClientStream(self._protocol)
