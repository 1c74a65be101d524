"""Bodies of requests and responses, in bounded memory and with an end to waiting."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

from lathe_cas.http_cache.answers import BrokenOffError, RefusedError, refused_size
from lathe_cas.soon import settled
from lathe_shared.errors import BlobNotFoundError, LatheError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from lathe_cas.blob_store import BlobStore
    from lathe_shared.digest import Digest

GATHER_BYTES = 128 << 10
"""Bytes of a request that are handed on together, since a client may send them one by one; as ``upload_session`` has
it. It is also what is hashed on the event loop at once, in some 80 µs."""

WRITE_BYTES = 128 << 10
"""Bytes of a response that have to leave within the time for which a client may stall."""

BLOB_HEADERS = {
    "Content-Type": "application/octet-stream",
    # Strangers wrote it: no browser may take it for a page.
    "X-Content-Type-Options": "nosniff",
}


class BodyLimits(NamedTuple):
    """What a body may be.

    Attributes:
        max_bytes: How long.
        setting: Where that comes from, for the error.
        stall_seconds: How long nothing may move, in either direction.
    """

    max_bytes: int
    setting: str
    stall_seconds: float


def receive_body(
    request: web.BaseRequest, limits: BodyLimits, count: Callable[[int], None]
) -> AsyncIterator[memoryview]:
    """Return a request's body in pieces that are not changed afterwards.

    A length that is too large is refused at once. The rest is found out while the pieces are taken.

    Args:
        request: Its ``Content-Length`` may be absent, if its body is chunked.
        limits: What it may be.
        count: Told the size of each piece.

    Raises:
        RefusedError: It is longer than it may be.
        TimeoutError: Nothing arrived for too long.
        web.RequestPayloadError: It is malformed.
        ConnectionError: The client went away before its end.
    """
    if (request.content_length or 0) > limits.max_bytes:
        raise refused_size(limits.max_bytes, limits.setting)
    return _body_pieces(request, limits, count)


async def _body_pieces(
    request: web.BaseRequest, limits: BodyLimits, count: Callable[[int], None]
) -> AsyncIterator[memoryview]:
    _acknowledge_head(request)
    received_bytes = 0
    gathered = bytearray()
    while True:
        async with asyncio.timeout(limits.stall_seconds):
            data = await request.content.readany()
        received_bytes += len(data)
        if received_bytes > limits.max_bytes:
            raise refused_size(limits.max_bytes, limits.setting)
        gathered += data
        if gathered and (not data or len(gathered) >= GATHER_BYTES):
            count(len(gathered))
            yield memoryview(gathered)
            gathered = bytearray()
        if not data:
            return


def _acknowledge_head(request: web.BaseRequest) -> None:
    """Let the body come at once.

    Clients that write head and body one after the other and leave Nagle's algorithm on, as ccache does, keep the body
    back until the head is acknowledged; the kernel takes 40 ms for that when there is nothing to send along with it.
    """
    transport = request.transport
    connection = None if transport is None else transport.get_extra_info("socket")
    if connection is not None and not request.content.is_eof():
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class ByteRange(NamedTuple):
    """Which bytes of a blob are asked for: from ``start`` up to, and without, ``stop``."""

    start: int
    stop: int


def asked_range(request: web.Request, size_bytes: int, entity_tag: str) -> ByteRange | None:
    """Return the part of a blob that a request asks for; None for all of it.

    What is not one range of bytes is passed over, as the specification allows.

    Raises:
        RefusedError: The range has no byte of the blob.

    Spec: RFC 9110, section 14.2, Range, which is for GET alone; section 13.1.5, If-Range.
    """
    if request.method != "GET":
        return None
    if "Range" not in request.headers or request.headers.get("If-Range", entity_tag) != entity_tag:
        return None
    try:
        wanted = request.http_range
    except ValueError:
        return None
    start = 0 if wanted.start is None else int(wanted.start)
    if start < 0:
        start = max(0, size_bytes + start)
    stop = size_bytes if wanted.stop is None else min(int(wanted.stop), size_bytes)
    if start >= stop:
        raise RefusedError(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            f"the range has none of the {size_bytes} bytes",
            {"Content-Range": f"bytes */{size_bytes}"},
        )
    return ByteRange(start, stop)


async def send_blob(
    request: web.Request, blobs: BlobStore, digest: Digest, stall_seconds: float, count: Callable[[int], None]
) -> web.StreamResponse:
    """Answer with a blob, or with what the request asks for of it.

    Args:
        request: GET or HEAD, perhaps with conditions.
        blobs: Where the blob is.
        digest: The blob.
        stall_seconds: How long the client may take none of it.
        count: Told the size of each piece.

    Raises:
        BlobNotFoundError: It is not there.
        RefusedError: The range that is asked for is not there.
        BrokenOffError: The response has begun and cannot be completed.
        ConnectionError: The client went away.
    """
    entity_tag = f'"{digest.hash}"'
    headers = {"ETag": entity_tag, "Accept-Ranges": "bytes", **BLOB_HEADERS}
    if any(tag.value in ("*", digest.hash) for tag in request.if_none_match or ()):
        return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
    size_bytes = digest.size_bytes
    part = asked_range(request, size_bytes, entity_tag)
    start, stop = part or (0, size_bytes)
    response = web.StreamResponse(headers=headers)
    if part is not None:
        response.set_status(HTTPStatus.PARTIAL_CONTENT)
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
    response.content_length = stop - start
    if request.method == "HEAD":
        return response
    pieces = blobs.read(digest, start, stop - start)
    # Before the response begins: it is the last moment to say that the blob is not there, or damaged.
    first = await anext(pieces, b"")
    await response.prepare(request)
    try:
        await _write(response, first, stall_seconds, count)
        async for piece in pieces:
            await _write(response, piece, stall_seconds, count)
    except TimeoutError:
        raise BrokenOffError("the client stopped reading") from None
    except LatheError as error:
        raise BrokenOffError(str(error)) from error
    await response.write_eof()
    return response


async def _write(
    response: web.StreamResponse, piece: bytes, stall_seconds: float, count: Callable[[int], None]
) -> None:
    view = memoryview(piece)
    for start in range(0, len(view), WRITE_BYTES):
        async with asyncio.timeout(stall_seconds):
            await response.write(view[start : start + WRITE_BYTES])
    count(len(view))


async def whole_size(blobs: BlobStore, digest: Digest) -> Digest:
    """Return a digest with its size, which the path of a request does not tell.

    Raises:
        BlobNotFoundError: The blob is not there.
    """
    (size_bytes,) = await settled(blobs.find_sizes([digest.key]))
    if size_bytes is None:
        raise BlobNotFoundError(digest)
    return type(digest)(digest.hash, size_bytes, digest.function)
