"""One call on the server, from its headers to its trailers: grpclib's handlers, served on our streams.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md, Responses); http-grpc-status-mapping.md.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, cast

import grpclib.server
from grpclib.const import Status
from grpclib.encoding.base import GRPC_CONTENT_TYPE
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline, encode_bin_value, encode_grpc_message
from h2.exceptions import StreamClosedError
from multidict import MultiDict
from typing_extensions import override

from lathe_shared.http2.ended_by import EndedBy
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.grpc_stream import GrpcStream
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.message_framing import ACCEPTED_ENCODINGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpclib.const import Handler
    from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase
    from grpclib.events import _DispatchServerEvents

    from lathe_shared.http2.hpack import Field
    from lathe_shared.http2.protocol import Http2Protocol
    from lathe_shared.http2.request_head import Refusal, RequestHead

OK_TRAILERS: Final = literal_block([(b"grpc-status", b"0")])
UNKNOWN_ERROR: Final = "Internal Server Error"
"""What a client is told of an exception that no handler has turned into a status: grpclib's words."""

_log = logging.getLogger(__name__)


class Serving:
    """What all calls of one server share.

    Args:
        mapping: The handlers by path.
        codec: Between messages and bytes.
        status_details_codec: For details of errors; without one they are left out.
        dispatch: Where grpclib keeps who listens to events.

    Attributes:
        response_block: The header block of nearly all responses.
        running: The calls that run, each with its task, or with the future that its answer waits for.
    """

    def __init__(
        self,
        mapping: Mapping[str, Handler],
        codec: CodecBase,
        status_details_codec: StatusDetailsCodecBase | None,
        dispatch: _DispatchServerEvents,
    ) -> None:
        self.mapping = mapping
        self.codec = codec
        self.status_details_codec = status_details_codec
        self.dispatch = dispatch
        self.content_subtype: str = codec.__content_subtype__ or "proto"
        self.response_fields: tuple[Field, ...] = (
            (b":status", b"200"),
            (b"content-type", f"{GRPC_CONTENT_TYPE}+{self.content_subtype}".encode()),
        )
        self.response_block = literal_block(self.response_fields)
        self.running: dict[ServerStream, asyncio.Future[Any]] = {}

    @property
    def has_listeners(self) -> bool:
        """Whether anybody listens to grpclib's events."""
        return any(self.dispatch._listeners.values())  # noqa: SLF001 -- there is no public way to ask

    def start(self, stream: ServerStream, handler: Handler) -> None:
        """Serve a call in a task of its own."""
        task = stream.protocol.loop.create_task(serve(self, stream, handler))
        self.running[stream] = task
        task.add_done_callback(stream.on_done)

    def error_fields(self, status: Status, message: str | None, details: object) -> list[Field]:
        """Return the trailers of a call that failed."""
        fields = [(b"grpc-status", str(status.value).encode())]
        if message is not None:
            fields.append((b"grpc-message", encode_grpc_message(message).encode()))
        if details is not None and self.status_details_codec is not None:
            encoded = encode_bin_value(self.status_details_codec.encode(status, message, details))
            fields.append((b"grpc-status-details-bin", encoded))
        if status is Status.UNIMPLEMENTED:
            fields.append((b"grpc-accept-encoding", ACCEPTED_ENCODINGS.encode()))
        return fields

    def trailers_only(self, error: GRPCError) -> bytes:
        """Return the one header block of a response that is nothing but an error."""
        return literal_block([*self.response_fields, *self.error_fields(error.status, error.message, error.details)])


class ServerStream(GrpcStream):
    """The stream of a call.

    Attributes:
        head: What the request's headers say.
        method: Its path.
        ended_by: Why the call ended before its handler was done.
        has_started: Whether the handler has begun to run.
    """

    __slots__ = ("ended_by", "has_started", "head", "method", "serving")

    cut_off_status = Status.INVALID_ARGUMENT

    def __init__(self, protocol: Http2Protocol, stream_id: int, head: RequestHead, serving: Serving) -> None:
        super().__init__(protocol, stream_id)
        self.head = head
        self.method = head.path
        self.messages.encoding = head.encoding
        self.serving = serving
        self.ended_by: EndedBy | None = None
        self.has_started = False

    @override
    def on_reset(self, code: int, reason: str, *, by_peer: bool) -> None:
        super().on_reset(code, reason, by_peer=by_peer)
        self.cancel(EndedBy.CLIENT_CANCEL if by_peer else EndedBy.CONNECTION_LOST)

    @override
    def progress_mark(self) -> int | None:
        # Between messages a client may take its time, as far as the handler lets it. A call without any is no call.
        if self._reader is not None and self.messages.is_untouched and not self.is_remote_closed:
            return 0
        return super().progress_mark()

    def cancel(self, ended_by: EndedBy) -> None:
        """Cancel the handler, if it runs."""
        task = self.serving.running.get(self)
        if task is not None:
            if self.ended_by is None:
                self.ended_by = ended_by
            task.cancel()

    def on_done(self, task: asyncio.Task[None]) -> None:
        """Forget the task and whatever was not read, and let no client send on to nobody."""
        del self.serving.running[self]
        self.discard()
        if self.closable and not self.pending_end:
            if self.is_local_closed:
                self.reset_nowait(ErrorCode.NO_ERROR)
            else:
                # A call that was cancelled before its first step may safely be made again.
                self.reset_nowait(ErrorCode.CANCEL if self.has_started else ErrorCode.REFUSED_STREAM)
        if not task.cancelled() and task.exception() is not None:
            _log.error("serving a call failed", exc_info=task.exception())

    def refuse(self, refusal: Refusal) -> None:
        """Answer what cannot be served."""
        fields = [(b":status", str(refusal.http_status).encode())]
        if refusal.http_status == 200:
            fields = list(self.serving.response_fields)
        if refusal.grpc_status is not None:
            fields += self.serving.error_fields(refusal.grpc_status, refusal.message, None)
        self.finish(literal_block(fields))

    def finish(self, block: bytes) -> None:
        """Send the last header block, and tell a client that still sends to stop.

        Spec: RFC 9113 section 8.1, a response that is complete before the request.
        """
        self.discard()
        self.send_block(block, end=True)
        if not self.is_remote_closed and not self.has_pending():
            self.http2.reset(self, ErrorCode.NO_ERROR)


class ServerCall(grpclib.server.Stream[Any, Any]):
    """grpclib's view of a call, with the ways of nearly all calls made short."""

    _stream: GrpcStream  # type: ignore[assignment]  # ours has what grpclib uses of its own

    def __init__(self, serving: Serving, stream: ServerStream, handler: Handler, deadline: Deadline | None) -> None:
        super().__init__(
            cast("Any", stream),
            stream.method,
            handler.cardinality,
            handler.request_type,
            handler.reply_type,
            codec=serving.codec,
            status_details_codec=serving.status_details_codec,
            dispatch=serving.dispatch,
            deadline=deadline,
            user_agent=stream.head.user_agent,
        )
        self._serving = serving
        self._has_listeners = serving.has_listeners

    @override
    async def recv_message(self) -> Any:
        data = await self._stream.receive_message()
        if data is None:
            return None
        message = self._codec.decode(data, self._recv_type)
        if self._has_listeners:
            (message,) = await self._dispatch.recv_message(message)
        return message

    @override
    async def send_message(self, message: Any) -> None:
        if not self._send_initial_metadata_done:
            if self._has_listeners:
                await self.send_initial_metadata()
            else:
                self._stream.send_block(self._serving.response_block, end=False)
                self._send_initial_metadata_done = True
        if self._send_message_done and not self._cardinality.server_streaming:
            raise ProtocolError("Message was already sent")
        if self._has_listeners:
            (message,) = await self._dispatch.send_message(message)
        await self._stream.send_message(self._codec.encode(message, self._send_type))
        self._send_message_done = True

    @property
    def is_finished(self) -> bool:
        """Whether the trailers were sent, or the call was cancelled by its own handler."""
        return self._send_trailing_metadata_done or self._cancel_done

    async def finish(self) -> None:
        """Send the trailers of a handler that has returned, unless it has done so itself."""
        if self.is_finished:
            return
        if not self._send_message_done and not self._cardinality.server_streaming:
            _log.error("Unary response with OK status requires a single message to be sent: %r", self._method_name)
            await self.fail(GRPCError(Status.UNKNOWN, UNKNOWN_ERROR))
        elif self._has_listeners or not self._send_initial_metadata_done:
            await self.send_trailing_metadata()
        else:
            self._stream.send_block(OK_TRAILERS, end=True)
            self._send_trailing_metadata_done = True

    async def fail(self, error: GRPCError) -> None:
        """Send the trailers of a handler that has failed, unless it has sent some itself."""
        if self.is_finished or not self._stream.closable:
            return
        if self._stream.has_pending():
            # A part of a message waits for a client that does not take it: the error cannot come behind it.
            self._stream.reset_nowait(ErrorCode.CANCEL)
        elif self._has_listeners:
            await self.send_trailing_metadata(
                status=error.status, status_message=error.message, status_details=error.details
            )
        else:
            serving = self._serving
            if self._send_initial_metadata_done:
                block = literal_block(serving.error_fields(error.status, error.message, error.details))
            else:
                block = serving.trailers_only(error)
            self._send_trailing_metadata_done = True
            cast("ServerStream", self._stream).finish(block)


async def serve(serving: Serving, stream: ServerStream, handler: Handler) -> None:
    """Run a handler and send what comes of it."""
    stream.has_started = True
    head = stream.head
    deadline: Deadline | None = None
    timer: asyncio.TimerHandle | None = None
    if head.timeout_seconds is not None:
        deadline = Deadline.from_timeout(head.timeout_seconds)
        timer = stream.protocol.loop.call_later(head.timeout_seconds, stream.cancel, EndedBy.DEADLINE)
    call = ServerCall(serving, stream, handler, deadline)
    try:
        error = await _outcome(serving, stream, call, handler)
        if error is None:
            await call.finish()
        else:
            await call.fail(error)
    except (StreamTerminatedError, StreamClosedError):
        return  # the client went away
    except Exception:  # noqa: BLE001 -- what a listener to events may raise here
        _log.exception("Application error")
        await call.fail(GRPCError(Status.UNKNOWN, UNKNOWN_ERROR))
    finally:
        if timer is not None:
            timer.cancel()


async def _outcome(serving: Serving, stream: ServerStream, call: ServerCall, handler: Handler) -> GRPCError | None:
    """Run a handler and return how it failed; None if it did not.

    Raises:
        StreamTerminatedError, StreamClosedError: The client went away.
    """
    error: GRPCError | None = None
    try:
        await _handle(serving, call, handler, stream.head)
    except GRPCError as raised:
        error = raised
    except asyncio.CancelledError:
        if stream.ended_by not in (EndedBy.DEADLINE, EndedBy.SHUTDOWN):
            raise
    except Exception as raised:
        if isinstance(raised, (StreamTerminatedError, StreamClosedError)) and not stream.closable:
            raise
        if stream.ended_by is None:
            _log.exception("Application error")
            error = GRPCError(Status.UNKNOWN, UNKNOWN_ERROR)
    # A handler may make something else of its cancellation; what the client is told stays what it was.
    if stream.ended_by is EndedBy.DEADLINE or (stream.ended_by is not None and error is None):
        return status_of_ending(stream.ended_by)
    return error


async def _handle(serving: Serving, call: ServerCall, handler: Handler, head: RequestHead) -> None:
    if not serving.has_listeners:
        call.metadata = cast("Any", head.metadata)
        await handler.func(call)
        return
    metadata, method = await serving.dispatch.recv_request(
        cast("Any", MultiDict(head.metadata)),
        handler.func,
        method_name=head.path,
        deadline=call.deadline,
        content_type=head.content_type,
        user_agent=head.user_agent,
        peer=call.peer,
    )
    call.metadata = metadata
    await method(call)


def status_of_ending(ended_by: EndedBy | None) -> GRPCError:
    """Return what a client is told whose call was ended before it was answered."""
    if ended_by is EndedBy.DEADLINE:
        return GRPCError(Status.DEADLINE_EXCEEDED)
    return GRPCError(Status.UNAVAILABLE, "the server is stopping")
