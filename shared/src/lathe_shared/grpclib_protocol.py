"""grpclib's HTTP/2 protocol with what it lacks: bounds, reasons, and GOAWAY that lets running RPCs finish.

A received message is bounded before its bytes are collected; a stream knows why it ended; frames of unknown types are
ignored. Used by ``grpclib_transport`` only, and nothing else knows grpclib's inside.

Spec: RFC 9113.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, cast

import grpclib.client
import grpclib.protocol
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame
from typing_extensions import override

from lathe_shared.errors import ResourceExhaustedError
from lathe_shared.rpc_context import EndedBy

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from grpclib.config import Configuration
    from h2.config import H2Configuration
    from h2.events import Event, StreamReset

DEFAULT_MAX_MESSAGE_BYTES = 16 << 20
"""Bound on one received message. Batches are at most 4 MB by what the CAS advertises; the rest is room for
FindMissingBlobs with 200,000 digests and for action results with inlined outputs."""

MAX_FRAME_BYTES = 1 << 18
"""Largest DATA frame that peers may send: fewer frames per blob than the 16 KiB that HTTP/2 begins with."""

MAX_CONCURRENT_STREAMS = 2000
"""RPCs of one client at once. A client with many jobs holds an Execute stream for each of them."""

UNACKNOWLEDGED_MILLISECONDS = 30_000
"""How long sent bytes may stay unacknowledged by the peer's kernel before the connection counts as lost."""


class BoundedBuffer(grpclib.protocol.Buffer):
    """What has arrived of a stream's DATA and was not read yet."""

    @override
    def add(self, data: bytes, ack_size: int) -> None:
        # grpclib takes an empty DATA frame for the end of the stream; to HTTP/2 it is only empty.
        if ack_size:
            super().add(data, ack_size)


class BoundedStream(grpclib.protocol.Stream):
    """A stream that bounds what is received at once and knows why it ended."""

    ended_by: EndedBy | None = None
    method = ""
    remote_ended = False
    connection: StreamConnection

    @override
    def init_stream(self, stream_id: int, connection: grpclib.protocol.Connection) -> None:
        super().init_stream(stream_id, connection)
        self.buffer = BoundedBuffer(lambda size: connection.ack(stream_id, size))

    @override
    def __ended__(self) -> None:
        self.remote_ended = True
        super().__ended__()

    @override
    async def recv_data(self, size: int) -> bytes:
        if size > self.connection.max_message_bytes:
            raise ResourceExhaustedError(
                f"a message of {size} bytes is larger than the {self.connection.max_message_bytes} bytes accepted here"
            )
        return await super().recv_data(size)


class StreamConnection(grpclib.protocol.Connection):
    """A connection that makes streams of ours."""

    max_message_bytes = DEFAULT_MAX_MESSAGE_BYTES

    @override
    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> grpclib.protocol.Stream:
        return BoundedStream(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)

    def send_goaway(self) -> None:
        """Tell the peer to begin no more streams here, while those that run go on.

        h2 considers a connection closed once GOAWAY is sent, so the frame goes past it; all writes are whole frames.
        """
        last = self._connection.highest_inbound_stream_id
        self.flush()
        self._transport.write(GoAwayFrame(stream_id=0, last_stream_id=last).serialize())


class GracefulH2Connection(H2Connection):
    """h2, but a GOAWAY without an error leaves the streams that run alone, as RFC 9113 section 6.8 wants it."""

    @override
    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Any], list[Event]]:
        if frame.error_code != ErrorCodes.NO_ERROR:
            return cast("tuple[list[Any], list[Event]]", super()._receive_goaway_frame(frame))
        event = ConnectionTerminated()
        event.error_code = ErrorCodes.NO_ERROR
        event.last_stream_id = frame.last_stream_id
        return [], [event]


class GracefulEventsProcessor(grpclib.protocol.EventsProcessor):
    """Turns HTTP/2 events into what happens to streams."""

    connection: StreamConnection

    @property
    def _is_client(self) -> bool:
        return isinstance(self.handler, grpclib.client.Handler)

    @override
    def process(self, event: Event) -> None:
        try:
            super().process(event)
        except NotImplementedError:
            # RFC 9113 section 5.5: what is unknown is ignored.
            return

    @override
    def process_stream_reset(self, event: StreamReset) -> None:
        stream = cast("BoundedStream | None", self.streams.get(event.stream_id))
        if stream is not None:
            if self._is_client and stream.remote_ended:
                # The whole answer is here; the server only says that it does not want the rest of what we send.
                return
            stream.ended_by = EndedBy.CLIENT_CANCEL if event.remote_reset else EndedBy.CONNECTION_LOST
        super().process_stream_reset(event)

    @override
    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        if event.error_code != ErrorCodes.NO_ERROR:
            super().process_connection_terminated(event)
            return
        if isinstance(self.handler, grpclib.client.Handler):
            # The channel opens another connection for its next call; this one goes when its last call is done.
            self.handler.connection_lost = True
            for stream_id, stream in self.streams.items():
                if stream_id > (event.last_stream_id or 0):
                    stream.__terminated__("the server leaves, and has not begun this call")
        if not self.streams:
            self.close()

    @override
    def register(self, stream: grpclib.protocol.Stream) -> Callable[[], None]:
        release = super().register(stream)

        def release_and_close() -> None:
            release()
            if not self.streams and isinstance(self.handler, grpclib.client.Handler) and self.handler.connection_lost:
                self.close()

        return release_and_close

    @override
    def close(self, reason: str = "Connection closed") -> None:
        for stream in cast("dict[int, BoundedStream]", self.streams).values():
            stream.ended_by = stream.ended_by or EndedBy.CONNECTION_LOST
        super().close(reason)


class GrpcProtocol(grpclib.protocol.H2Protocol):
    """grpclib's protocol with the parts above."""

    connection: StreamConnection
    processor: GracefulEventsProcessor

    def __init__(
        self,
        handler: grpclib.protocol.AbstractHandler,
        config: Configuration,
        h2_config: H2Configuration,
        max_message_bytes: int,
    ) -> None:
        super().__init__(handler, config, h2_config)
        self._max_message_bytes = max_message_bytes

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        _bound_unacknowledged(transport)
        h2 = GracefulH2Connection(config=self.h2_config)
        h2.initiate_connection()
        h2.increment_flow_control_window(
            self.config.http2_connection_window_size - h2.local_settings.initial_window_size
        )
        settings: dict[SettingCodes | int, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: self.config.http2_stream_window_size,
            SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
        }
        if not self.h2_config.client_side:
            settings[SettingCodes.MAX_CONCURRENT_STREAMS] = MAX_CONCURRENT_STREAMS
        h2.update_settings(settings)
        # h2 would go by the new size only one read after the client's acknowledgement, and clients don't wait.
        h2.max_inbound_frame_size = MAX_FRAME_BYTES
        self.connection = StreamConnection(h2, cast("asyncio.Transport", transport), config=self.config)
        self.connection.max_message_bytes = self._max_message_bytes
        self.connection.flush()
        self.connection.initialize()
        self.processor = GracefulEventsProcessor(self.handler, self.connection)

    @override
    def data_received(self, data: bytes) -> None:
        try:
            events = self.connection.feed(data)
        except ProtocolError:
            self.connection.flush()  # the GOAWAY that says why
            self.processor.close("Protocol error")
            return
        self.connection.flush()
        for event in events:
            self.processor.process(event)
        if not self.connection.is_closing():
            self.connection.flush()


def _bound_unacknowledged(transport: asyncio.BaseTransport) -> None:
    """Have the kernel give up a connection whose peer is gone, instead of waiting a quarter of an hour to send."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MILLISECONDS)
