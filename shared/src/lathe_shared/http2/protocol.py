"""A connection on an asyncio transport: reads into it, writes what it has, wakes it when time has passed.

Output is written once per turn of the event loop, whoever it came from, or at once when there is much of it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

from typing_extensions import override

from lathe_shared.http2.connection import Connection
from lathe_shared.http2.connection_state import ConnectionOwner
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.watch import FAREWELL_SECONDS, Watch

if TYPE_CHECKING:
    from lathe_shared.http2.limits import Limits

UNACKNOWLEDGED_MILLISECONDS: Final = 30_000
"""How long sent bytes may stay unacknowledged by the peer's kernel before the connection counts as lost."""

FLUSH_BYTES: Final = 1 << 16
"""Output of one message from which it is written at once and not at the end of the turn."""

WRITE_HIGH_BYTES: Final = 1 << 20
WRITE_LOW_BYTES: Final = 1 << 18
"""What the transport holds before it asks to pause, and when it asks to go on: so much that the kernel never waits for
us, and little enough to hold for each of many connections."""

JOIN_BYTES: Final = 2048
"""Average size of pieces up to which copying them together costs less than handing each to the kernel."""

_log = logging.getLogger(__name__)


class Peer:
    """Who is at the other end, in the form that grpclib's users know.

    Args:
        transport: The transport.
    """

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def addr(self) -> object:
        """Return the address as the socket has it: a tuple for TCP."""
        return self._transport.get_extra_info("peername")

    def cert(self) -> dict[str, Any] | None:
        """Return the peer's certificate as ``ssl`` does; None without TLS."""
        ssl_object = self._transport.get_extra_info("ssl_object")
        return None if ssl_object is None else cast("dict[str, Any] | None", ssl_object.getpeercert())


class Http2Protocol(asyncio.Protocol, ConnectionOwner):
    """One connection.

    Args:
        limits: Its bounds.
        is_client: Which side it is.

    Attributes:
        http2: The connection without I/O.
        transport: Where it is written to; None before ``connection_made``.
        limits: As given.
        borrowed_bytes: Bytes of incomplete messages that the windows no longer count.
        is_lost: Whether the transport is closed or is closing.
    """

    __slots__ = (
        "_flush_handle",
        "_is_reading",
        "_sendable_waiters",
        "_timer",
        "_watch",
        "_writable_waiters",
        "borrowed_bytes",
        "http2",
        "is_client",
        "is_lost",
        "limits",
        "loop",
        "transport",
    )

    def __init__(self, limits: Limits, *, is_client: bool) -> None:
        self.limits = limits
        self.is_client = is_client
        self.loop = asyncio.get_running_loop()
        self.http2 = Connection(self, limits, is_client=is_client)
        self.transport: asyncio.Transport | None = None
        self.borrowed_bytes = 0
        self.is_lost = False
        self._watch = Watch(self.http2, self.loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._flush_handle: asyncio.Handle | None = None
        self._is_reading = True
        self._writable_waiters: list[asyncio.Future[None]] | None = None
        self._sendable_waiters: deque[asyncio.Future[None]] | None = None

    # What asyncio calls

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(WRITE_HIGH_BYTES, WRITE_LOW_BYTES)
        _tune_socket(transport)
        self.flush()
        self._tick()

    @override
    def data_received(self, data: bytes) -> None:
        http2 = self.http2
        try:
            http2.receive(data)
        except Exception:  # noqa: BLE001 -- a bug of ours ends this connection and nothing else
            _log.exception("HTTP/2 connection failed")
            http2.fail(ErrorCode.INTERNAL_ERROR, "internal error")
        if http2.out:
            self.flush()
        if http2.is_closed:
            self.close()

    @override
    def eof_received(self) -> None:
        return None

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.http2.lost("Connection lost")
        if self._timer is not None:
            self._timer.cancel()
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        self._wake_writers()

    @override
    def pause_writing(self) -> None:
        self.http2.set_writable(False)

    @override
    def resume_writing(self) -> None:
        self.http2.set_writable(True)
        if not self._is_reading and self.transport is not None and not self.is_lost:
            self._is_reading = True
            self.transport.resume_reading()
        self.output_ready()
        self._wake_writers()

    # Output

    def output_ready(self) -> None:
        """Have what is in ``http2.out`` written at the end of this turn of the loop."""
        if self._flush_handle is None and self.http2.out:
            self._flush_handle = self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what is in ``http2.out``."""
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        out = self.http2.out
        transport = self.transport
        if self._sendable_waiters:
            self._wake_sendable()
        if not out or transport is None:
            return
        if self.is_lost:
            out.clear()
            return
        if len(out) == 1:
            transport.write(out[0])
        elif sum(map(len, out)) <= len(out) * JOIN_BYTES:
            transport.write(b"".join(out))
        else:
            transport.writelines(out)
        out.clear()
        if not self.http2.writable and self._is_reading and not self.is_client:
            self._bound_unsent(transport)

    def _bound_unsent(self, transport: asyncio.Transport) -> None:
        """Read no more from a client that does not take its answers, until it does."""
        if transport.get_write_buffer_size() > self.limits.max_unsent_bytes:
            self._is_reading = False
            transport.pause_reading()

    async def wait_writable(self) -> None:
        """Wait until the transport takes more, or is gone."""
        while not self.http2.writable and not self.is_lost:
            waiter = self.loop.create_future()
            if self._writable_waiters is None:
                self._writable_waiters = []
            self._writable_waiters.append(waiter)
            await waiter

    async def wait_sendable(self) -> None:
        """Wait until little enough waits to be sent that one more message may join it."""
        while self.http2.pending_bytes > self.limits.max_unsent_bytes and not self.is_lost:
            waiter = self.loop.create_future()
            if self._sendable_waiters is None:
                self._sendable_waiters = deque()
            self._sendable_waiters.append(waiter)
            await waiter

    def _wake_sendable(self) -> None:
        while self._sendable_waiters and (self.is_lost or self.http2.pending_bytes <= self.limits.max_unsent_bytes):
            waiter = self._sendable_waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not self.is_lost:
                    return  # each that goes on may add to what waits, and the next one looks again

    def _wake_writers(self) -> None:
        waiters = self._writable_waiters
        self._writable_waiters = None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    # Time, and the end

    def _tick(self) -> None:
        transport = self.transport
        if transport is None or self.is_lost:
            return
        self.flush()
        wait = self._watch.check(self.loop.time(), transport.get_write_buffer_size())
        self.flush()
        if self.http2.is_closed:
            if self._watch.is_peer_gone:
                transport.abort()
            self.close()
        else:
            self._timer = self.loop.call_later(wait, self._tick)

    def close(self, reason: str = "Connection closed") -> None:
        """Close the connection; what was written is sent, if the peer takes it soon.

        Args:
            reason: What calls that are open are told.
        """
        transport = self.transport
        if self.is_lost or transport is None:
            return
        self.http2.drain()
        self.flush()
        if not self.http2.is_closed:
            self.http2.lost(reason)
        self.is_lost = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake_writers()
        transport.close()
        self._timer = self.loop.call_later(FAREWELL_SECONDS, transport.abort)

    def is_closing(self) -> bool:
        """Return whether the transport is closed or is closing."""
        return self.is_lost or self.transport is None or self.transport.is_closing()

    def get_peer(self) -> Peer:
        """Return who is at the other end."""
        if self.transport is None:
            raise RuntimeError("not connected")
        return Peer(self.transport)


def _tune_socket(transport: asyncio.BaseTransport) -> None:
    """Have small frames sent at once, and a peer that is gone noticed while something is sent to it."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MILLISECONDS)
