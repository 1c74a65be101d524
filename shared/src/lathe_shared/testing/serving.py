"""Servicers behind a real socket, and a channel to them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from lathe_shared.clients.rpc_client import open_channel
from lathe_shared.endpoint import Endpoint
from lathe_shared.grpc_transport import DEFAULT_MAX_MESSAGE_BYTES, GrpcChannel
from lathe_shared.service_boundary import make_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from lathe_shared.rpc_observer import RpcObserver
    from lathe_shared.service_boundary import Servicer

LOOPBACK = "127.0.0.1"


@asynccontextmanager
async def serve(
    servicers: Iterable[Servicer],
    *,
    port: int = 0,
    observer: RpcObserver | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
) -> AsyncIterator[Endpoint]:
    """Serve on a loopback port while the context lasts, and give its address.

    Args:
        servicers: What to serve.
        port: The port; 0 lets the kernel choose. A test that restarts a server gives the port of the first one.
        observer: What counts the RPCs.
        max_message_bytes: Bound on one received message.
    """
    server = make_server(servicers, observer, max_message_bytes=max_message_bytes)
    await server.start(LOOPBACK, port)
    try:
        yield Endpoint(LOOPBACK, server.port)
    finally:
        server.end_rpcs()
        await server.shut_down()


@asynccontextmanager
async def connect(endpoint: Endpoint) -> AsyncIterator[GrpcChannel]:
    """Give a channel to an address, closed when the context ends."""
    channel = open_channel(endpoint)
    try:
        yield channel
    finally:
        channel.close()


@asynccontextmanager
async def serving(servicers: Iterable[Servicer]) -> AsyncIterator[GrpcChannel]:
    """Serve on a loopback port while the context lasts, and give a channel to it."""
    async with serve(servicers) as endpoint, connect(endpoint) as channel:
        yield channel
