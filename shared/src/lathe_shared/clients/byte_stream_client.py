"""ByteStream: one blob of any size, in pieces, resumed where it broke off.

Spec: google/bytestream/bytestream.proto; REAPI, ContentAddressableStorage, on resource names and early completion.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from grpclib.const import Cardinality
from grpclib.exceptions import StreamTerminatedError

from lathe_shared.cas_wire import committed_size, read_request, read_response_data, write_request
from lathe_shared.errors import BlobNotFoundError, InternalError, LatheError, NotFoundError, UnavailableError
from lathe_shared.resource_name import format_read, format_write
from lathe_shared.wire import string_field

if TYPE_CHECKING:
    import grpclib.client

    from lathe_shared.clients.rpc_client import RpcClient
    from lathe_shared.digest import Digest

READ = "/google.bytestream.ByteStream/Read"
WRITE = "/google.bytestream.ByteStream/Write"
QUERY_WRITE_STATUS = "/google.bytestream.ByteStream/QueryWriteStatus"

WRITE_CHUNK_BYTES = 1 << 19
"""Bytes in one WriteRequest: enough to make the cost of a message vanish, little against the flow-control window."""

BASE_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""A transfer's deadline allows for this rate, after a base; what is slower than that counts as hanging."""

ReadAt = Callable[[int, int], Awaitable[bytes]]
"""Gives up to so many bytes of a source from an offset on, and none at its end."""


def transfer_seconds(size_bytes: int) -> float:
    """Return the deadline of a transfer of so many bytes, in seconds."""
    return BASE_SECONDS + size_bytes / SLOWEST_BYTES_PER_SECOND


class ByteStreamClient:
    """Reads and writes blobs over ByteStream.

    Args:
        rpc: The connection to the CAS.
    """

    def __init__(self, rpc: RpcClient) -> None:
        self._rpc = rpc

    async def read(self, instance_name: str, digest: Digest, offset: int = 0) -> AsyncGenerator[memoryview, None]:
        """Give a blob's bytes from an offset on, in pieces; goes on where it was when the connection was lost.

        Args:
            instance_name: The instance to ask.
            digest: The blob.
            offset: Bytes to leave out at the front; not negative.

        Raises:
            BlobNotFoundError: The CAS does not hold the blob.
            LatheError: It answered with another error, or stayed away.
        """
        name = format_read(digest, instance_name)
        position = offset
        failures = 0
        while True:
            request = read_request(name, position)
            try:
                timeout = transfer_seconds(digest.size_bytes)
                async with aclosing(self._rpc.server_stream(READ, request, timeout_seconds=timeout)) as messages:
                    async for message in messages:
                        data = read_response_data(message)
                        if data:
                            position += len(data)
                            failures = 0
                            yield data
                if position != digest.size_bytes:
                    raise InternalError(f"{self._rpc.peer} ended {digest} at {position} bytes")
                return
            except NotFoundError:
                raise BlobNotFoundError(digest) from None
            except UnavailableError:
                failures += 1
                if failures >= self._rpc.retry.attempts:
                    raise
            await self._rpc.pause(failures)

    async def write(self, instance_name: str, digest: Digest, read_at: ReadAt) -> None:
        """Upload a blob, from where an earlier try has got to when the connection was lost.

        Returns as soon as the CAS has the blob, which it may have before all was sent.

        Args:
            instance_name: The instance to upload to.
            digest: The blob.
            read_at: Gives its bytes, again if need be.

        Raises:
            InvalidArgumentError: The bytes do not match the digest.
            LatheError: The CAS answered with another error, or stayed away.
        """
        name = format_write(digest, str(uuid.uuid4()), instance_name)
        is_first = True

        async def attempt() -> None:
            nonlocal is_first
            offset = 0 if is_first else await self._committed(name)
            is_first = False
            if offset < digest.size_bytes or offset == 0:
                await self._write_once(name, digest, read_at, offset)

        await self._rpc.retried(attempt)

    async def _committed(self, name: str) -> int:
        """Ask how much of an upload has arrived."""
        try:
            return committed_size(await self._rpc.unary(QUERY_WRITE_STATUS, string_field(1, name)))
        except NotFoundError:
            return 0

    async def _write_once(self, name: str, digest: Digest, read_at: ReadAt, offset: int) -> None:
        timeout = transfer_seconds(digest.size_bytes)
        stream = self._rpc.open(WRITE, Cardinality.STREAM_UNARY, timeout)
        messages = _write_requests(name, digest.size_bytes, read_at, offset)
        response = await exchange(self._rpc, stream, messages)
        committed = committed_size(response)
        if committed != digest.size_bytes:
            raise InternalError(f"{self._rpc.peer} acknowledged {committed} bytes of {digest}")


async def _write_requests(
    name: str, size_bytes: int, read_at: ReadAt, offset: int
) -> AsyncIterator[tuple[bytes, bool]]:
    """Give the messages of a Write, each with whether it is the last."""
    while True:
        wanted = min(WRITE_CHUNK_BYTES, size_bytes - offset)
        data = await read_at(offset, wanted) if wanted else b""
        if len(data) < wanted:
            # The source became shorter: an end that does not fit the digest lets the CAS say so.
            size_bytes = offset + len(data)
        is_last = offset + len(data) >= size_bytes
        yield write_request(name, offset, is_last, data), is_last
        if is_last:
            return
        offset += len(data)
        name = ""


async def exchange(
    rpc: RpcClient, stream: grpclib.client.Stream[bytes, bytes], messages: AsyncIterator[tuple[bytes, bool]]
) -> bytes:
    """Send a stream of requests and return the one response, even if it comes before all is sent.

    Args:
        rpc: The client that opened ``stream``.
        stream: The call, not begun.
        messages: The requests, each with whether it is the last. What they raise is raised here.

    Raises:
        LatheError: The peer answered with an error, or the connection was lost.
    """
    await stream.__aenter__()
    response = None
    tasks: list[asyncio.Task[None] | asyncio.Task[bytes | None]] = []
    # This exception makes grpclib look for an error in the trailers, and reset the stream if it is still open.
    reason = StreamTerminatedError("nothing more is wanted")
    try:
        with rpc.errors():
            await stream.send_request()
        sender = asyncio.create_task(_send_all(rpc, stream, messages))
        receiver = asyncio.create_task(stream.recv_message())
        tasks = [sender, receiver]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not receiver.done():
            sender.result()
        with rpc.errors():
            response = await receiver
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with rpc.errors():
            await stream.__aexit__(StreamTerminatedError, reason, None)
    if response is None:
        raise InternalError(f"{rpc.peer} answered with nothing")
    return response


async def _send_all(
    rpc: RpcClient, stream: grpclib.client.Stream[bytes, bytes], messages: AsyncIterator[tuple[bytes, bool]]
) -> None:
    async for message, is_last in messages:
        try:
            with rpc.errors():
                await stream.send_message(message, end=is_last)
        except LatheError:
            # Whatever stops the sending has its cause in what the receiver is about to see.
            return
