"""Servers and channels, on one of two engines: our own HTTP/2 (``http2``), or the one that comes with grpclib.

Nobody else names an engine's classes: what both have is what grpclib's have, and ``GrpcServer``'s way to drain. The
second engine is there to measure the first one by, and to fall back on.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, TypeAlias

from lathe_shared.grpclib_protocol import DEFAULT_MAX_MESSAGE_BYTES
from lathe_shared.grpclib_transport import GrpclibChannel, GrpclibServer, RawCodec, reset_if_open
from lathe_shared.http2.channel import Http2Channel
from lathe_shared.http2.server import Http2Server
from lathe_shared.status_details import LatheStatusDetailsCodec

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from grpclib.const import Handler

    from lathe_shared.http2.server import AtOnceFunction, InlineFunction

__all__ = [
    "DEFAULT_ENGINE",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "Engine",
    "GrpcChannel",
    "GrpcServer",
    "make_channel",
    "make_grpc_server",
    "reset_if_open",
]

GrpcServer: TypeAlias = Http2Server | GrpclibServer
GrpcChannel: TypeAlias = Http2Channel | GrpclibChannel


class Engine(enum.Enum):
    """What speaks HTTP/2."""

    LATHE = "lathe"
    GRPCLIB = "grpclib"


DEFAULT_ENGINE = Engine.LATHE


class _Handlers:
    """Handlers that were made already, as grpclib's IServable."""

    def __init__(self, mapping: dict[str, Handler]) -> None:
        self._mapping = mapping

    def __mapping__(self) -> Mapping[str, Handler]:
        return self._mapping


def make_grpc_server(
    handlers: dict[str, Handler],
    inline: Mapping[str, InlineFunction],
    at_once: Mapping[str, AtOnceFunction],
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    engine: Engine | None = None,
) -> GrpcServer:
    """Make a server.

    Args:
        handlers: All methods in grpclib's form, by path.
        inline: Those of them that are plain functions, once more; an engine that can calls them where a request
            arrives.
        at_once: Functions that may answer calls of others of them in the handler's place; an engine that can asks them.
        max_message_bytes: Bound on one received message.
        engine: What speaks HTTP/2; ``DEFAULT_ENGINE`` if absent.
    """
    if (engine or DEFAULT_ENGINE) is Engine.GRPCLIB:
        return GrpclibServer([_Handlers(handlers)], max_message_bytes=max_message_bytes)
    return Http2Server(
        [_Handlers({path: handler for path, handler in handlers.items() if path not in inline})],
        inline=inline,
        at_once=at_once,
        codec=RawCodec(),
        status_details_codec=LatheStatusDetailsCodec(),
        max_message_bytes=max_message_bytes,
    )


def make_channel(
    host: str,
    port: int,
    *,
    ssl: ssl.SSLContext | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    engine: Engine | None = None,
) -> GrpcChannel:
    """Make a channel: a connection that is made when first needed, and again after it was lost.

    Args:
        host: Host of the server.
        port: Port of the server.
        ssl: What TLS needs; None for a plain connection.
        max_message_bytes: Bound on one received message.
        engine: What speaks HTTP/2; ``DEFAULT_ENGINE`` if absent.
    """
    if (engine or DEFAULT_ENGINE) is Engine.GRPCLIB:
        return GrpclibChannel(host, port, ssl=ssl, max_message_bytes=max_message_bytes)
    return Http2Channel(
        host,
        port,
        ssl=ssl,
        codec=RawCodec(),
        status_details_codec=LatheStatusDetailsCodec(),
        max_message_bytes=max_message_bytes,
    )
