"""Calls to a peer service: deadlines, retries, and errors in the domain's terms.

All clients here share one channel per peer, whose connection is made and remade as needed. What goes wrong comes back
as ``LatheError``: a status as the error that stands for it, a lost or refused connection as ``UnavailableError`` naming
the peer. Calls carry on the RequestMetadata of the RPC on whose behalf they are made.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.exceptions import ProtocolError as GrpclibProtocolError
from h2.exceptions import ProtocolError

from lathe_shared.clock import Clock, SystemClock
from lathe_shared.endpoint import Endpoint
from lathe_shared.errors import DeadlineExceededError, InternalError, UnavailableError
from lathe_shared.grpc_transport import DEFAULT_MAX_MESSAGE_BYTES, Engine, GrpcChannel, make_channel
from lathe_shared.request_metadata import REQUEST_METADATA_KEY
from lathe_shared.rpc_context import current_rpc
from lathe_shared.status_details import error_from

if TYPE_CHECKING:
    import ssl

    import grpclib.client

T = TypeVar("T")

UNARY_SECONDS = 60.0
"""Default deadline of a unary call: far above what any takes, so that a peer that hangs is noticed."""


def open_channel(
    endpoint: Endpoint,
    *,
    ssl: ssl.SSLContext | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    engine: Engine | None = None,
) -> GrpcChannel:
    """Make the channel to a peer. It connects when first used; close it when done.

    Args:
        endpoint: Where the peer listens.
        ssl: What TLS needs; None for a plain connection.
        max_message_bytes: Bound on one received message.
        engine: What speaks HTTP/2; the default one if absent.
    """
    return make_channel(endpoint.host, endpoint.port, ssl=ssl, max_message_bytes=max_message_bytes, engine=engine)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after which pauses, a call is tried again while the peer is UNAVAILABLE.

    Pauses double up to a limit; each is drawn at random between half of that and all of it, so that many clients
    of a peer that restarts don't come back at the same moment.

    Attributes:
        attempts: How often the call is tried, in all.
        first_seconds: Pause after the first failure.
        limit_seconds: Longest pause.
    """

    attempts: int = 6
    first_seconds: float = 0.1
    limit_seconds: float = 3.0

    def pause_seconds(self, failures: int, draw: float) -> float:
        """Return the pause after a number of failures in a row.

        Args:
            failures: At least one.
            draw: A random number from 0 to 1.
        """
        full = min(self.first_seconds * 2.0 ** min(failures - 1, 30), self.limit_seconds)
        return full * (0.5 + draw / 2)


NO_RETRY = RetryPolicy(attempts=1)
"""For calls that must not run twice, and for callers with a loop of their own."""


class RpcClient:
    """Calls the methods of one peer.

    Args:
        channel: The connection to the peer.
        peer: What errors call it, such as ``the CAS``.
        retry: How calls that may safely run twice are tried again.
        clock: What pauses between tries are measured by.

    Attributes:
        retry: As given.
    """

    def __init__(
        self,
        channel: GrpcChannel,
        peer: str = "the peer",
        *,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._channel = channel
        self._peer = f"{peer} at {channel.target}"
        self.retry = retry or RetryPolicy()
        self._clock = clock or SystemClock()
        self._random = random.Random()

    @property
    def peer(self) -> str:
        """What errors call the peer: its role and address."""
        return self._peer

    async def unary(
        self, method: str, request: bytes, *, timeout_seconds: float = UNARY_SECONDS, retry: RetryPolicy | None = None
    ) -> bytes:
        """Call a unary method that may safely run twice.

        Args:
            method: Its path.
            request: The serialized request.
            timeout_seconds: Deadline of each try.
            retry: Overrides the client's; ``NO_RETRY`` for a method that must run once.

        Raises:
            LatheError: The peer answered with an error, or is away after all tries.
        """

        async def call() -> bytes:
            with self.errors():
                async with self.open(method, Cardinality.UNARY_UNARY, timeout_seconds) as stream:
                    await stream.send_message(request, end=True)
                    response = await stream.recv_message()
            if response is None:
                raise InternalError(f"{self._peer} answered {method} with nothing")
            return response

        return await self.retried(call, retry)

    async def server_stream(
        self, method: str, request: bytes, *, timeout_seconds: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Call a server-streaming method, once, and give its messages.

        Leaving the iteration early cancels the call; close the generator (``contextlib.aclosing``) to make sure.

        Raises:
            LatheError: The peer answered with an error, or the connection was lost.
        """
        with self.errors():
            async with self.open(method, Cardinality.UNARY_STREAM, timeout_seconds) as stream:
                await stream.send_message(request, end=True)
                while (message := await stream.recv_message()) is not None:
                    yield message

    @asynccontextmanager
    async def bidirectional(self, method: str) -> AsyncIterator[BidirectionalCall]:
        """Open a bidirectional call; leaving the context before the peer has ended it cancels it.

        Raises:
            UnavailableError: The peer cannot be reached.
        """
        stream = self.open(method, Cardinality.STREAM_STREAM, None)
        call = BidirectionalCall(self, stream)
        await stream.__aenter__()
        try:
            with self.errors():
                await stream.send_request()
            yield call
        finally:
            # With an exception grpclib resets a stream that is still open; without, it would wait for its end.
            reason = None if call.is_over else asyncio.CancelledError()
            with self.errors():
                await stream.__aexit__(type(reason) if reason else None, reason, None)

    def open(
        self, method: str, cardinality: Cardinality, timeout_seconds: float | None
    ) -> grpclib.client.Stream[bytes, bytes]:
        """Make grpclib's stream for a call, with the metadata that belongs to it."""
        rpc = current_rpc.get()
        wire = rpc.request_metadata_wire if rpc is not None else b""
        return self._channel.request(
            method,
            cardinality,
            bytes,
            bytes,
            timeout=timeout_seconds,
            metadata={REQUEST_METADATA_KEY: wire} if wire else None,
        )

    async def retried(self, call: Callable[[], Awaitable[T]], retry: RetryPolicy | None = None) -> T:
        """Await a call, again and again while the peer is UNAVAILABLE, as often as the policy says."""
        policy = retry or self.retry
        failures = 0
        while True:
            try:
                return await call()
            except UnavailableError:
                failures += 1
                if failures >= policy.attempts:
                    raise
            await self.pause(failures, policy)

    async def pause(self, failures: int, retry: RetryPolicy | None = None) -> None:
        """Wait as long as the policy says after a number of failures in a row."""
        await self._clock.sleep((retry or self.retry).pause_seconds(failures, self._random.random()))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what grpclib, h2 and sockets raise into ``LatheError``."""
        try:
            yield
        except GRPCError as error:
            raise error_from(error.status, error.message, error.details or ()) from None
        except StreamTerminatedError as error:
            raise UnavailableError(f"the connection to {self._peer} was lost: {error}") from None
        except TimeoutError:
            raise DeadlineExceededError(f"{self._peer} did not answer in time") from None
        except (ProtocolError, GrpclibProtocolError, AssertionError, AttributeError) as error:
            # What grpclib stumbles over when a connection closes under a call.
            raise UnavailableError(f"the connection to {self._peer} broke: {error!r}") from error
        except OSError as error:
            raise UnavailableError(f"{self._peer} cannot be reached: {error.strerror or error}") from None


class BidirectionalCall:
    """An open call with streams both ways.

    Attributes:
        is_over: Whether the peer has ended its stream.
    """

    def __init__(self, client: RpcClient, stream: grpclib.client.Stream[bytes, bytes]) -> None:
        self._client = client
        self._stream = stream
        self.is_over = False

    async def send(self, message: bytes) -> None:
        """Send a message, waiting for flow control.

        Raises:
            UnavailableError: The connection was lost.
        """
        with self._client.errors():
            await self._stream.send_message(message)

    async def receive(self) -> bytes | None:
        """Wait for the next message; None when the peer has ended its stream without an error.

        Raises:
            LatheError: The peer ended the call with an error, or the connection was lost.
        """
        with self._client.errors():
            message = await self._stream.recv_message()
            if message is None:
                await self._end_quietly()
                await self._stream.recv_trailing_metadata()
                self.is_over = True
            return message

    async def end(self) -> None:
        """Tell the peer that nothing more will be sent; it may still answer."""
        with self._client.errors():
            await self._stream.end()

    async def _end_quietly(self) -> None:
        try:
            await self._stream.end()
        except (GrpclibProtocolError, ProtocolError, StreamTerminatedError):
            # Ended before, or the peer wants no more. grpclib reads the trailers of streams only that it ended itself.
            self._stream._end_done = True  # noqa: SLF001 -- no public way to say so
