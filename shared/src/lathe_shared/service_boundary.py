"""Where RPCs enter a service: the one place that turns errors into statuses, and counts, times and logs each RPC.

A servicer says which functions serve its methods; all of them take and give messages as bytes. It raises
``LatheError``; anything else is a bug and becomes INTERNAL with an error id, under which the log has the traceback.
What a handler gets cancelled for is in ``RpcContext.ended_by``.

    class PingServicer(Servicer):
        service_name = "lathe.example.Ping"

        def rpcs(self) -> Mapping[str, Rpc]:
            return {"Ping": unary(self._ping)}

        def _ping(self, request: bytes, context: RpcContext) -> bytes:
            return request
"""

from __future__ import annotations

import abc
import asyncio
import enum
import inspect
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import structlog
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.metadata import Deadline
from h2.exceptions import ProtocolError

from lathe_shared.errors import InternalError, InvalidArgumentError, LatheError, UnavailableError, UnimplementedError
from lathe_shared.grpc_transport import DEFAULT_MAX_MESSAGE_BYTES, Engine, GrpcServer, make_grpc_server, reset_if_open
from lathe_shared.http2.at_once_calls import PendingAnswer
from lathe_shared.message_decoding import decode
from lathe_shared.rpc_context import EndedBy, RpcContext, current_rpc
from lathe_shared.rpc_observer import RpcObserver
from lathe_shared.status_details import MAX_MESSAGE_CHARACTERS, error_from

if TYPE_CHECKING:
    from collections.abc import Iterable

    import grpclib.server

    from lathe_shared.http2.server import RequestHead

__all__ = [
    "EndedBy",
    "PendingAnswer",
    "Rpc",
    "RpcContext",
    "RpcKind",
    "Servicer",
    "bidirectional",
    "client_streaming",
    "current_rpc",
    "decode",
    "make_server",
    "server_streaming",
    "unary",
]

UnaryFunction: TypeAlias = Callable[[bytes, RpcContext], bytes | Awaitable[bytes]]
ServerStreamingFunction: TypeAlias = Callable[[bytes, RpcContext], AsyncIterator[bytes]]
ClientStreamingFunction: TypeAlias = Callable[[AsyncIterator[bytes], RpcContext], Awaitable[bytes]]
AtOnceFunction: TypeAlias = Callable[[bytes, RpcContext], bytes | PendingAnswer | None]
BidirectionalFunction: TypeAlias = Callable[[AsyncIterator[bytes], RpcContext], AsyncIterator[bytes]]

_log = structlog.get_logger("lathe.rpc")


class RpcKind(enum.Enum):
    """Which side of an RPC is a stream."""

    UNARY = Cardinality.UNARY_UNARY
    SERVER_STREAMING = Cardinality.UNARY_STREAM
    CLIENT_STREAMING = Cardinality.STREAM_UNARY
    BIDIRECTIONAL = Cardinality.STREAM_STREAM


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method: its function, and how it is called.

    Attributes:
        kind: Which side is a stream.
        func: The function, of the type that ``kind`` asks for.
        is_plain_function: Whether ``func`` is unary and no coroutine function, so that a transport may call it where
            the request arrives.
        at_once: A plain function that may answer a call in place of ``func``, by its first message alone.
        long_lived: Whether it may run until the client has enough (a watch, a worker's connection): a service that
            stops does not wait for it.
    """

    kind: RpcKind
    func: Callable[..., Any]
    is_plain_function: bool = False
    at_once: AtOnceFunction | None = None
    long_lived: bool = False


def unary(func: UnaryFunction) -> Rpc:
    """Declare a method with one request and one response.

    A plain function is called inline: it must not block. A coroutine function may wait.
    """
    inner = func.func if isinstance(func, partial) else func
    is_coroutine = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004 -- its function is wanted, not whether it is callable
    return Rpc(RpcKind.UNARY, func, is_plain_function=not is_coroutine)


def server_streaming(
    func: ServerStreamingFunction, *, at_once: AtOnceFunction | None = None, long_lived: bool = False
) -> Rpc:
    """Declare a method with one request and a stream of responses; the function is an async generator.

    Args:
        func: Serves the method.
        at_once: Answers a call whose stream is one response, if it can without blocking; else it returns None, and
            ``func`` gets the call. It is there for speed only: an engine may never ask it.
        long_lived: See ``Rpc``.
    """
    return Rpc(RpcKind.SERVER_STREAMING, func, at_once=at_once, long_lived=long_lived)


def client_streaming(func: ClientStreamingFunction, *, at_once: AtOnceFunction | None = None) -> Rpc:
    """Declare a method with a stream of requests and one response.

    The function may return before the stream has ended; the client then has its answer, and is told to stop sending.

    Args:
        func: Serves the method.
        at_once: As in ``server_streaming``, for a call that its first request is enough for; it may also return a
            PendingAnswer.
    """
    return Rpc(RpcKind.CLIENT_STREAMING, func, at_once=at_once)


def bidirectional(func: BidirectionalFunction, *, long_lived: bool = False) -> Rpc:
    """Declare a method with streams both ways; the function is an async generator."""
    return Rpc(RpcKind.BIDIRECTIONAL, func, long_lived=long_lived)


class Servicer(abc.ABC):
    """Serves one gRPC service."""

    service_name: ClassVar[str]
    """Full name of the service, such as ``google.bytestream.ByteStream``."""

    @abc.abstractmethod
    def rpcs(self) -> Mapping[str, Rpc]:
        """Return the methods that are served, by their names."""


def handlers(servicers: Iterable[Servicer], observer: RpcObserver) -> dict[str, Handler]:
    """Return grpclib's handlers for all methods, observed."""
    return {
        path: Handler(partial(_serve, path, rpc, observer), rpc.kind.value, bytes, bytes)
        for path, rpc in methods(servicers).items()
    }


def methods(servicers: Iterable[Servicer]) -> dict[str, Rpc]:
    """Return all methods by their paths, such as ``/google.bytestream.ByteStream/Read``."""
    return {f"/{servicer.service_name}/{name}": rpc for servicer in servicers for name, rpc in servicer.rpcs().items()}


def make_server(
    servicers: Iterable[Servicer],
    observer: RpcObserver | None = None,
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    engine: Engine | None = None,
) -> GrpcServer:
    """Make a server for servicers; ``lifecycle`` starts and drains it.

    Args:
        servicers: The services of one port.
        observer: Counts the RPCs; without one they are only logged.
        max_message_bytes: Bound on one received message; a larger one is answered RESOURCE_EXHAUSTED.
        engine: What speaks HTTP/2; the default one if absent.
    """
    servicers = list(servicers)
    observer = observer or RpcObserver(None)
    inline = {
        path: _inline_function(path, rpc.func, observer)
        for path, rpc in methods(servicers).items()
        if rpc.is_plain_function
    }
    at_once = {
        path: _inline_function(path, rpc.at_once, observer)
        for path, rpc in methods(servicers).items()
        if rpc.at_once is not None
    }
    return make_grpc_server(
        handlers(servicers, observer), inline, at_once, max_message_bytes=max_message_bytes, engine=engine
    )


def _inline_function(
    path: str, func: Callable[[bytes, RpcContext], Any], observer: RpcObserver
) -> Callable[[bytes, RequestHead], Any]:
    """Return the form of a plain function in which the engine calls it where a request arrives."""

    def call(request: bytes, head: RequestHead) -> bytes | Awaitable[bytes] | PendingAnswer | None:
        # Equal requests share a head, and so a context, unless there is a deadline in it.
        context = head.memo
        if context is None:
            context = RpcContext(path, head.peer, cast("Mapping[str, str | bytes]", head.metadata))
            if head.timeout_seconds is None:
                head.memo = context
            else:
                context.deadline = Deadline.from_timeout(head.timeout_seconds)
        token = current_rpc.set(context)
        started = time.perf_counter()
        try:
            response = func(request, context)
            if isinstance(response, bytes):
                observer.finished(path, Status.OK, None, time.perf_counter() - started, context)
                return response
        except Exception as error:  # noqa: BLE001 -- nothing must get past the boundary unanswered
            raise _failed(error, path, observer, started, context) from None
        finally:
            current_rpc.reset(token)
        if response is None:
            return None  # the handler observes the call
        if isinstance(response, PendingAnswer):
            return PendingAnswer(
                response.future, partial(_answer_when_done, response.answer, path, observer, started, context)
            )
        return _finish_later(response, path, observer, started, context)

    return call


def _answer_when_done(
    answer: Callable[[asyncio.Future[Any], EndedBy | None], bytes],
    path: str,
    observer: RpcObserver,
    started: float,
    context: RpcContext,
    future: asyncio.Future[Any],
    ended_by: EndedBy | None,
) -> bytes:
    """Answer what an ``at_once`` function had to wait for."""
    token = current_rpc.set(context)
    try:
        response = answer(future, ended_by)
        observer.finished(path, Status.OK, None, time.perf_counter() - started, context)
    except asyncio.CancelledError:
        status, message = _status_of_cancelled(ended_by)
        observer.finished(path, status, message, time.perf_counter() - started, context)
        raise
    except Exception as error:  # noqa: BLE001 -- nothing must get past the boundary unanswered
        raise _failed(error, path, observer, started, context) from None
    finally:
        current_rpc.reset(token)
    return response


async def _finish_later(
    response: Awaitable[bytes], path: str, observer: RpcObserver, started: float, context: RpcContext
) -> bytes:
    """Await what a plain function could not answer at once."""
    current_rpc.set(context)
    try:
        result = await response
    except asyncio.CancelledError:
        observer.finished(path, Status.CANCELLED, "cancelled", time.perf_counter() - started, context)
        raise
    except Exception as error:  # noqa: BLE001 -- nothing must get past the boundary unanswered
        raise _failed(error, path, observer, started, context) from None
    observer.finished(path, Status.OK, None, time.perf_counter() - started, context)
    return result


def _failed(error: Exception, path: str, observer: RpcObserver, started: float, context: RpcContext) -> GRPCError:
    known = _known(error, path)
    observer.finished(path, known.status, known.message, time.perf_counter() - started, context)
    return _grpc_error(known)


async def _serve(path: str, rpc: Rpc, observer: RpcObserver, stream: grpclib.server.Stream[bytes, bytes]) -> None:
    """Serve one RPC; the only place where exceptions become statuses."""
    context = _context(path, stream)
    current_rpc.set(context)
    started = time.perf_counter()
    status = Status.OK
    message: str | None = None
    try:
        await _CALLS[rpc.kind](rpc, stream, context)
    except asyncio.CancelledError:
        status, message = _status_of_cancelled(context.ended_by)
        if context.ended_by is EndedBy.SHUTDOWN:
            raise _grpc_error(UnavailableError("the service is stopping; try again")) from None
        raise
    except (ProtocolError, StreamTerminatedError):
        # The client went away while something was sent to it.
        status, message = Status.CANCELLED, "the client went away"
        raise asyncio.CancelledError from None
    except Exception as error:  # noqa: BLE001 -- nothing must get past the boundary unanswered
        known = _known(error, path)
        status, message = known.status, known.message
        raise _grpc_error(known) from None
    finally:
        observer.finished(path, status, message, time.perf_counter() - started, context)


def _context(path: str, stream: grpclib.server.Stream[bytes, bytes]) -> RpcContext:
    h2_stream = stream._stream  # noqa: SLF001 -- where our transport keeps why a stream ended; grpclib does not tell
    head = getattr(h2_stream, "head", None)
    return RpcContext(
        method=path,
        # Our engine knows the peer's name already.
        peer=_peer_name(stream) if head is None else head.peer,
        metadata=stream.metadata or {},
        deadline=stream.deadline,
        find_ended_by=lambda: getattr(h2_stream, "ended_by", None),
    )


def _peer_name(stream: grpclib.server.Stream[bytes, bytes]) -> str:
    address: object = stream.peer.addr()
    return ":".join(map(str, address[:2])) if isinstance(address, tuple) else str(address or "unix")


def _status_of_cancelled(ended_by: EndedBy | None) -> tuple[Status, str]:
    if ended_by is EndedBy.DEADLINE:
        return Status.DEADLINE_EXCEEDED, "the client's deadline passed"
    if ended_by is EndedBy.SHUTDOWN:
        return Status.UNAVAILABLE, "the service is stopping"
    return Status.CANCELLED, ended_by.value if ended_by else "cancelled"


def _known(error: Exception, path: str) -> LatheError:
    if isinstance(error, LatheError):
        return error
    if isinstance(error, GRPCError):
        return error_from(error.status, error.message, error.details or ())
    error_id = secrets.token_hex(6)
    _log.error("internal_error", method=path, error_id=error_id, exc_info=error)
    return InternalError(f"internal error {error_id}; the service's log has the details under this id")


def _grpc_error(error: LatheError) -> GRPCError:
    message = error.message
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = message[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return GRPCError(error.status, message, error.details or None)


async def _receive(stream: grpclib.server.Stream[bytes, bytes]) -> bytes | None:
    try:
        return await stream.recv_message()
    except NotImplementedError:
        raise UnimplementedError("compressed messages are not accepted: no encoding was offered") from None
    except AssertionError:
        raise InvalidArgumentError("message", "the stream ended in the middle of a message") from None


async def _receive_only(stream: grpclib.server.Stream[bytes, bytes]) -> bytes:
    message = await _receive(stream)
    if message is None:
        raise InvalidArgumentError("message", "the stream ended without a request")
    return message


async def _receive_all(stream: grpclib.server.Stream[bytes, bytes]) -> AsyncGenerator[bytes, None]:
    while (message := await _receive(stream)) is not None:
        yield message


async def _call_unary(rpc: Rpc, stream: grpclib.server.Stream[bytes, bytes], context: RpcContext) -> None:
    response = rpc.func(await _receive_only(stream), context)
    if not rpc.is_plain_function or inspect.isawaitable(response):
        response = await response
    await stream.send_message(cast("bytes", response))


async def _call_server_streaming(rpc: Rpc, stream: grpclib.server.Stream[bytes, bytes], context: RpcContext) -> None:
    async with aclosing(rpc.func(await _receive_only(stream), context)) as responses:
        async for response in responses:
            await stream.send_message(response)


async def _call_client_streaming(rpc: Rpc, stream: grpclib.server.Stream[bytes, bytes], context: RpcContext) -> None:
    async with aclosing(_receive_all(stream)) as requests:
        response = await rpc.func(requests, context)
    await stream.send_message(response)
    await stream.send_trailing_metadata(status=Status.OK)
    reset_if_open(stream)


async def _call_bidirectional(rpc: Rpc, stream: grpclib.server.Stream[bytes, bytes], context: RpcContext) -> None:
    async with aclosing(_receive_all(stream)) as requests, aclosing(rpc.func(requests, context)) as responses:
        async for response in responses:
            await stream.send_message(response)
    await stream.send_trailing_metadata(status=Status.OK)
    reset_if_open(stream)


_CALLS: dict[RpcKind, Callable[[Rpc, grpclib.server.Stream[bytes, bytes], RpcContext], Awaitable[None]]] = {
    RpcKind.UNARY: _call_unary,
    RpcKind.SERVER_STREAMING: _call_server_streaming,
    RpcKind.CLIENT_STREAMING: _call_client_streaming,
    RpcKind.BIDIRECTIONAL: _call_bidirectional,
}
