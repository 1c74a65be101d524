"""Unary calls that are answered where they arrive: no task, no stream object, one write for all that came together.

A method is served inline if it is a plain function from bytes to bytes that never blocks. The usual request is a header
block that this connection has seen before and one DATA frame, read together; ``InlineMethod`` answers it straight from
what was read. A request in any other shape gets an ``InlineStream``, which answers when it is whole.

``at_once_calls`` is the same for methods that have a handler, too, for what cannot be answered so.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, cast

from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from typing_extensions import override

from lathe_shared.http2.frames import DATA, END_HEADERS, END_STREAM, HEADERS, header_frames
from lathe_shared.http2.grpc_stream import CUT_OFF
from lathe_shared.http2.message_framing import PREFIX_BYTES, MessageError, pack_prefix, unpack_prefix
from lathe_shared.http2.server_call import OK_TRAILERS, UNKNOWN_ERROR, ServerStream
from lathe_shared.http2.stream import Stream

if TYPE_CHECKING:
    import grpclib.server

    from lathe_shared.http2.connection import Connection
    from lathe_shared.http2.protocol import Http2Protocol
    from lathe_shared.http2.request_head import RequestHead
    from lathe_shared.http2.server_call import Serving
    from lathe_shared.http2.stream import Bytes

InlineFunction = Callable[[bytes, "RequestHead"], bytes | Awaitable[bytes]]
"""Answers a serialized request with a serialized response, or raises. It must not block.

For a request that it cannot answer at once it may return something to await; the call then goes on in a task.
"""

ErrorFunction = Callable[[str, Exception], GRPCError]
"""Turns what an inline function has raised into a status; given the path and the exception."""

MAX_MESSAGE_BYTES: Final = (1 << 32) - 1
"""What the four bytes of a message's length can say."""

FLUSH_ANSWER_BYTES: Final = 1 << 14
"""Answers from this size on are written at once and not at the end of the turn. One read may bring a thousand requests;
this is how the transport can say that it has enough, and the rest waits where it is counted."""

_log = logging.getLogger(__name__)


def default_error(path: str, error: Exception) -> GRPCError:
    """Pass a GRPCError on, and hide everything else from the client but not from the log: grpclib's way."""
    if isinstance(error, GRPCError):
        return error
    _log.error("Application error in %s", path, exc_info=error)
    return GRPCError(Status.UNKNOWN, UNKNOWN_ERROR)


class InlineCalls:
    """The inline methods of a server.

    Args:
        functions: The methods by path.
        on_error: Turns what they raise into statuses.
        serving: What all calls share.
    """

    def __init__(self, functions: dict[str, InlineFunction], on_error: ErrorFunction, serving: Serving) -> None:
        self.functions = functions
        self.on_error = on_error
        self.serving = serving
        block = serving.response_block
        self.begin_frames = struct.Struct(f">IBI{len(block)}sIBIBI")
        self.end_frame = struct.Struct(f">IBI{len(OK_TRAILERS)}s")

    def answer(
        self, head: RequestHead, function: InlineFunction, message: bytes
    ) -> bytes | Awaitable[bytes] | GRPCError:
        """Call a function."""
        try:
            return function(message, head)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the client gets an answer
            return self.error(head.path, error)

    def error(self, path: str, error: Exception) -> GRPCError:
        """Return what to answer for an exception, even if the function for that fails too."""
        try:
            return self.on_error(path, error)
        except Exception:  # noqa: BLE001 -- as above
            _log.exception("Application error in %s", path)
            return GRPCError(Status.UNKNOWN, UNKNOWN_ERROR)

    def answer_later(self, stream: ServerStream, response: Awaitable[bytes]) -> None:
        """Answer in a task what could not be answered at once."""
        codec = _AsTheyAre(self.serving.content_subtype)
        path = stream.head.path

        async def handle(call: grpclib.server.Stream[bytes, bytes]) -> None:
            call._codec = codec  # noqa: SLF001 -- bytes in and out, whatever the codec of other methods
            try:
                message = await response
            except Exception as error:  # noqa: BLE001 -- whatever it is, the client gets an answer
                raise self.error(path, error) from None
            await call.send_message(message)

        self.serving.start(stream, Handler(handle, Cardinality.UNARY_UNARY, bytes, bytes))


class InlineMethod:
    """Answers whole requests of one header block on one connection: ``HeaderBlock.whole_request``.

    Args:
        calls: The inline methods.
        protocol: The connection.
        head: What the header block says.
        function: The method.
        max_bytes: Bound on a request beside that of the connection.
    """

    __slots__ = (
        "_calls",
        "_function",
        "_head",
        "_http2",
        "_max_bytes",
        "_pack_begin",
        "_pack_end",
        "_protocol",
        "_response_block",
    )

    def __init__(
        self,
        calls: InlineCalls,
        protocol: Http2Protocol,
        head: RequestHead,
        function: Callable[[bytes, RequestHead], Any],
        max_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        http2 = protocol.http2
        self._calls = calls
        self._protocol = protocol
        self._http2 = http2
        self._head = head
        self._function = function
        self._max_bytes = min(http2.limits.max_message_bytes, max_bytes)
        self._response_block = calls.serving.response_block
        self._pack_begin = calls.begin_frames.pack
        self._pack_end = calls.end_frame.pack

    def __call__(self, stream_id: int, data: bytes, begin: int, end: int) -> bool:
        """Answer, if this is one uncompressed message and nothing keeps the answer from going out."""
        size = end - begin - PREFIX_BYTES
        http2 = self._http2
        if (
            size < 0
            or unpack_prefix(data, begin) != (0, size)
            or size > self._max_bytes
            or http2.block_prefix
            or http2.pending_bytes > http2.limits.max_unsent_bytes
        ):
            return False
        try:
            response = self._function(data[begin + PREFIX_BYTES : end], self._head)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the client gets an answer
            block = self._calls.serving.trailers_only(self._calls.error(self._head.path, error))
            http2.closed_streams += 1
            http2.out.append(header_frames(stream_id, block, END_STREAM, http2.peer.max_frame_bytes))
            return True
        if not isinstance(response, bytes):
            self._answer_later(stream_id, data[begin:end], response)
            return True
        size = len(response) + PREFIX_BYTES
        if (
            size > http2.send_window
            or size > http2.peer.initial_window_bytes
            or size > http2.send_frame_bytes
            or not http2.writable
        ):
            waiting = Stream(http2, stream_id)
            http2.adopt(waiting)
            send_response(http2, waiting, self._response_block, response)
            if size >= FLUSH_ANSWER_BYTES:
                self._protocol.flush()
            return True
        http2.send_window -= size
        http2.work += 1
        http2.closed_streams += 1
        block = self._response_block
        head = self._pack_begin(
            len(block) << 8 | HEADERS, END_HEADERS, stream_id, block, size << 8 | DATA, 0, stream_id, 0, size - 5
        )
        tail = self._pack_end(len(OK_TRAILERS) << 8 | HEADERS, END_HEADERS | END_STREAM, stream_id, OK_TRAILERS)
        http2.out += (head, response, tail)
        if size >= FLUSH_ANSWER_BYTES:
            self._protocol.flush()
        return True

    def _answer_later(self, stream_id: int, framed: bytes, response: object) -> None:  # noqa: ARG002 -- for subclasses
        """Take what the function has returned in place of an answer.

        Args:
            stream_id: The call's stream.
            framed: The request as it came, with its prefix.
            response: What the function returned.
        """
        stream = InlineStream(self._protocol, stream_id, self._head, self._calls, self._function)
        self._http2.adopt(stream)
        self._calls.answer_later(stream, cast("Awaitable[bytes]", response))


def send_response(http2: Connection, stream: Stream, block: bytes, response: Bytes) -> None:
    """Send a whole response, or have it wait for the peer's windows."""
    http2.send_headers(stream, block, end=False)
    size = len(response)
    http2.send_data(stream, (pack_prefix(0, size), response), size + PREFIX_BYTES, end=False)
    http2.send_headers(stream, OK_TRAILERS, end=True)


class InlineStream(ServerStream):
    """A request to an inline method that did not come in the usual shape."""

    __slots__ = ("_calls", "_function")

    def __init__(
        self, protocol: Http2Protocol, stream_id: int, head: RequestHead, calls: InlineCalls, function: InlineFunction
    ) -> None:
        super().__init__(protocol, stream_id, head, calls.serving)
        self._calls = calls
        self._function = function

    @override
    def on_data(self, data: Bytes) -> None:
        if self.is_discarding:
            self.http2.release(self, len(data))
            return
        self.messages.add(data)
        self.borrow()
        # Looked at each time, so that a message that is too large is refused before it is collected.
        if self.messages.is_too_large:
            self._answer()

    @override
    def on_end(self) -> None:
        if not self.is_discarding:
            self._answer()

    @override
    def progress_mark(self) -> int | None:
        # No handler waits for it, so this is what bounds how long a request may take to come.
        if self.is_remote_closed or self.is_discarding:
            return super().progress_mark()
        return self.messages.size_bytes

    def _answer(self) -> None:
        messages = self.messages
        self.repay()
        try:
            message = messages.next()
        except MessageError as error:
            self.finish(self.serving.trailers_only(GRPCError(self._status_of(error), str(error))))
            return
        if message is None or messages.is_inside_message:
            text = CUT_OFF if messages.is_inside_message else "not exactly one request"
            self.finish(self.serving.trailers_only(GRPCError(Status.INVALID_ARGUMENT, text)))
            return
        response = self._calls.answer(self.head, self._function, message)
        if isinstance(response, GRPCError):
            self.finish(self.serving.trailers_only(response))
        elif not isinstance(response, bytes):
            self._calls.answer_later(self, response)
        elif self.id in self.http2.streams:
            send_response(self.http2, self, self.serving.response_block, response)


class _AsTheyAre(CodecBase):
    """Messages are bytes."""

    __content_subtype__: str = "proto"

    def __init__(self, content_subtype: str) -> None:
        self.__content_subtype__ = content_subtype

    @override
    def encode(self, message: Any, message_type: Any) -> bytes:
        return cast("bytes", message)

    @override
    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


def as_handler(calls: InlineCalls, function: InlineFunction) -> Handler:
    """Return a handler in grpclib's form for an inline method, for when it cannot be answered where it arrives.

    That is while events are listened to, and while so much waits for the client already that the next answer would have
    to wait behind it: such a call waits before it is answered, and not with its answer.
    """
    codec = _AsTheyAre(calls.serving.content_subtype)

    async def handle(call: grpclib.server.Stream[bytes, bytes]) -> None:
        stream = cast("ServerStream", call._stream)  # noqa: SLF001 -- what our server makes calls of
        call._codec = codec  # noqa: SLF001 -- bytes in and out, whatever the codec of other methods
        message = await call.recv_message()
        if message is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "not exactly one request")
        await stream.protocol.wait_sendable()
        response = calls.answer(stream.head, function, message)
        if isinstance(response, GRPCError):
            raise response
        if not isinstance(response, bytes):
            try:
                response = await response
            except Exception as error:  # noqa: BLE001 -- whatever it is, the client gets an answer
                raise calls.error(stream.head.path, error) from None
        await call.send_message(response)

    return Handler(handle, Cardinality.UNARY_UNARY, bytes, bytes)
