"""Calls that may be answered where they arrive, and else go to their handler.

Most reads and writes are small, and a stream with its task costs several times the work itself. So a method, of any
kind, may have a plain function beside its handler. It gets the first message and answers the call with one message,
at once or when something is done; or it declines, and the handler serves the call as if there were no such function.

The usual shape is answered as in ``inline_calls``. A call in any other shape gets an ``AtOnceStream``, which asks the
function when the first message is whole.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from grpclib.exceptions import GRPCError
from typing_extensions import override

from lathe_shared.http2.ended_by import EndedBy
from lathe_shared.http2.errors import ErrorCode
from lathe_shared.http2.inline_calls import InlineMethod, send_response
from lathe_shared.http2.server_call import ServerStream, status_of_ending

if TYPE_CHECKING:
    from lathe_shared.http2.inline_calls import InlineCalls
    from lathe_shared.http2.protocol import Http2Protocol
    from lathe_shared.http2.request_head import RequestHead
    from lathe_shared.http2.stream import Bytes

MAX_REQUEST_BYTES: Final = 1 << 18
"""Larger first messages are their handler's without a question: the stream is the least of what they cost."""


class PendingAnswer(NamedTuple):
    """The answer to a call, once a future is done. It needs no task, which is what costs most of a call.

    Attributes:
        future: What is waited for; cancelled if the call ends before.
        answer: Called when it is done, even by cancellation, with the future and with why the call has ended, if so;
            returns the serialized response or raises.
    """

    future: asyncio.Future[Any]
    answer: Callable[[asyncio.Future[Any], EndedBy | None], bytes]


AtOnceFunction = Callable[[bytes, "RequestHead"], bytes | PendingAnswer | None]
"""Answers a call by its first message alone, raises, or declines with None. It must not block."""


class AtOnceMethod(InlineMethod):
    """Answers whole requests of one header block on one connection, or has them answered by the handler."""

    __slots__ = ()

    def __init__(
        self, calls: InlineCalls, protocol: Http2Protocol, head: RequestHead, function: AtOnceFunction
    ) -> None:
        super().__init__(calls, protocol, head, function, MAX_REQUEST_BYTES)

    @override
    def _answer_later(self, stream_id: int, framed: bytes, response: object) -> None:
        stream = AtOnceStream(self._protocol, stream_id, self._head, self._calls, self._function)
        self._http2.adopt(stream)
        if isinstance(response, PendingAnswer):
            stream.answer_when_done(response)
        else:
            stream.messages.add(framed)
            stream.hand_over()


class AtOnceStream(ServerStream):
    """A call that the function has not answered yet, or will not answer.

    Until the first message is whole, it belongs to the function; then to the answer or to the handler.
    """

    __slots__ = ("_calls", "_function", "_is_asked", "_is_handed_over")

    def __init__(
        self, protocol: Http2Protocol, stream_id: int, head: RequestHead, calls: InlineCalls, function: AtOnceFunction
    ) -> None:
        super().__init__(protocol, stream_id, head, calls.serving)
        self._calls = calls
        self._function = function
        self._is_asked = False
        self._is_handed_over = False

    @override
    def on_data(self, data: Bytes) -> None:
        if self._is_handed_over or self._is_asked or self.is_discarding:
            super().on_data(data)
            return
        messages = self.messages
        messages.add(data)
        if not messages.has_message:
            self.borrow()
        if messages.is_too_large or messages.next_bytes > MAX_REQUEST_BYTES or messages.next_is_compressed:
            self.hand_over()
        elif messages.has_message:
            # Not here: the end of the stream is often right behind, in a frame of its own, and an answer before it
            # would have to be followed by a reset.
            self._is_asked = True
            self.protocol.loop.call_soon(self._ask)

    @override
    def on_end(self) -> None:
        if self._is_handed_over:
            super().on_end()
        elif not self._is_asked and not self.is_discarding:
            self.hand_over()

    @override
    def on_drained(self) -> None:
        if self._is_handed_over:
            super().on_drained()
        else:
            self._end_request()

    @override
    def progress_mark(self) -> int | None:
        # No handler waits for the first message, so this is what bounds how long it may take to come.
        if self._is_handed_over or self._is_asked or self.is_discarding or self.is_remote_closed:
            return super().progress_mark()
        return self.messages.size_bytes

    def hand_over(self) -> None:
        """Let the handler serve the call."""
        self._is_handed_over = True
        self.serving.start(self, self.serving.mapping[self.method])

    def _ask(self) -> None:
        """Ask the function, now that the first message is whole."""
        if self.is_discarding or not self.closable:
            return
        message = self.messages.next() or b""
        try:
            response = self._function(message, self.head)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the client gets an answer
            self._finish(self._calls.error(self.method, error))
            return
        if response is None:
            self.messages.put_back(message)
            self.hand_over()
        elif isinstance(response, bytes):
            self._finish(response)
        else:
            self.answer_when_done(response)

    def answer_when_done(self, pending: PendingAnswer) -> None:
        """Answer when a future is done."""
        self.discard()
        self.serving.running[self] = pending.future
        timer: asyncio.TimerHandle | None = None
        if self.head.timeout_seconds is not None:
            timer = self.protocol.loop.call_later(self.head.timeout_seconds, self.cancel, EndedBy.DEADLINE)
        pending.future.add_done_callback(partial(self._answer_done, pending.answer, timer))

    def _answer_done(
        self,
        answer: Callable[[asyncio.Future[Any], EndedBy | None], bytes],
        timer: asyncio.TimerHandle | None,
        future: asyncio.Future[Any],
    ) -> None:
        if timer is not None:
            timer.cancel()
        del self.serving.running[self]
        response: bytes | GRPCError
        try:
            response = answer(future, self.ended_by)
        except asyncio.CancelledError:
            response = status_of_ending(self.ended_by)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the client gets an answer
            response = self._calls.error(self.method, error)
        if self.closable:
            self._finish(response)

    def _finish(self, response: bytes | GRPCError) -> None:
        """Send the answer, and tell a client that still sends to stop."""
        if isinstance(response, GRPCError):
            self.finish(self.serving.trailers_only(response))
        else:
            self.discard()
            send_response(self.http2, self, self.serving.response_block, response)
            if not self.has_pending():
                self._end_request()
        self.protocol.output_ready()

    def _end_request(self) -> None:
        """Have a client stop that sends on though all is said. Spec: RFC 9113 section 8.1."""
        if self.is_local_closed and not self.is_remote_closed:
            self.http2.reset(self, ErrorCode.NO_ERROR)
            self.protocol.output_ready()
