"""The HTTP cache's requests: GET, HEAD and PUT of blobs, action results and values.

The store, the checks and the limits are those of the gRPC services. What differs is that a path tells a hash and no
size, and that a value under ``/cache/`` is no part of REAPI at all.

Spec: Bazel's documentation, "Remote caching", HTTP caching protocol; RFC 9110 for all that HTTP asks.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web

from lathe_cas.http_cache.answers import BrokenOffError, RefusedError, error_answer, refused_method
from lathe_cas.http_cache.bodies import BLOB_HEADERS, BodyLimits, receive_body, send_blob, whole_size
from lathe_cas.http_cache.collections import describe_collection, describe_value
from lathe_cas.http_cache.paths import ActionResultPath, BlobPath, CachePath, parse_path
from lathe_cas.soon import settled
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import DigestMismatchError, InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from lathe_cas.action_cache import ActionCache
    from lathe_cas.blob_store import BlobStore
    from lathe_cas.cas_metrics import CasCounters, HttpCacheCounts
    from lathe_cas.http_cache.opaque_values import OpaqueValues
    from lathe_shared.instance_name import InstanceNames

MAX_ACTION_RESULT_BYTES = 16 << 20
"""Largest ActionResult: what the gRPC services take as one message, too."""

STALL_SECONDS = 60.0
"""How long a transfer may stand still. Clients give up sooner: Bazel after 60 s, ccache after 10."""

_METHODS = ("GET", "HEAD", "PUT", "PROPFIND")
_VALUE_PREFIX = "/cache/"
_KINDS = {BlobPath: "cas", ActionResultPath: "ac"}


class HttpCache:
    """Serves the cache by HTTP.

    Args:
        blobs: Where the blobs are.
        action_cache: Gets and updates action results, over the same blobs.
        values: Tells which blob is the value of a key.
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
        counters: What was sent and received.
        counts: What became of requests.
        writable: Whether PUT is served.
        max_body_bytes: Largest blob or value that is taken.
        stall_seconds: How long a transfer may stand still.

    Attributes:
        running_requests: How many there are at this moment.
    """

    def __init__(
        self,
        blobs: BlobStore,
        action_cache: ActionCache,
        values: OpaqueValues,
        instance_names: InstanceNames,
        functions: Collection[DigestFunction],
        counters: CasCounters,
        counts: HttpCacheCounts,
        *,
        writable: bool,
        max_body_bytes: int,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._blobs = blobs
        self._action_cache = action_cache
        self._values = values
        self._instance_names = instance_names
        self._functions = functions
        self._counters = counters
        self._counts = counts
        self._allowed = "GET, HEAD, PUT" if writable else "GET, HEAD"
        self._writable = writable
        self._blob_limits = BodyLimits(max_body_bytes, "setting http_cache_max_body_bytes", stall_seconds)
        self._action_result_limits = BodyLimits(MAX_ACTION_RESULT_BYTES, "of an ActionResult", stall_seconds)
        self.running_requests = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def routes(self) -> list[web.RouteDef]:
        """Return the routes for an aiohttp application."""
        # Line breaks are matched, too, so that all malformed keys get the same answer.
        return [
            web.route("*", "/cache/{key:(?s:.*)}", self._serve),
            web.route("*", "/{path:(?s:(?:.*/)?(?:cas|ac)/.*)}", self._serve),
        ]

    async def drain(self) -> None:
        """Take no more requests, and wait for those that run."""
        self._draining = True
        await self._idle.wait()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.running_requests += 1
        self._idle.clear()
        kind, outcome = "none", "broken_off"
        try:
            try:
                self._check_request(request)
                if request.method == "PROPFIND" and request.path.endswith("/"):
                    kind, outcome = "cache", "hit"
                    return describe_collection(request.path)
                path = parse_path(request.path, self._functions)
                if path is None:
                    raise NotFoundError(f"{request.path[:140]!r} is no path of the cache")
                kind = _KINDS.get(type(path), "cache")
                response = await self._answer(request, path)
            except BrokenOffError:
                return _break_off(request)
            except ConnectionError:
                # Nobody is left to read an answer.
                return _break_off(request)
            except Exception as error:  # noqa: BLE001 -- a bug ends its request, and the service goes on
                response = error_answer(error, request)
            outcome = _outcome(request.method, response.status)
            return response
        finally:
            self._counts.add(kind, request.method if request.method in _METHODS else "other", outcome)
            self.running_requests -= 1
            if not self.running_requests:
                self._idle.set()

    def _check_request(self, request: web.Request) -> None:
        """Refuse what is wrong with a request whatever it names.

        Raises:
            RefusedError: Something is.
        """
        if self._draining:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the service is stopping")
        if "Origin" in request.headers:
            # A page may give its own name to an address that only its reader reaches, such as loopback.
            raise RefusedError(HTTPStatus.FORBIDDEN, "the cache is not for pages in browsers")
        if request.method == "PROPFIND" and request.path.startswith(_VALUE_PREFIX):
            return
        if request.method not in ("GET", "HEAD", "PUT"):
            raise refused_method(self._allowed)
        if request.method != "PUT":
            return
        if not self._writable:
            raise RefusedError(
                HTTPStatus.FORBIDDEN, "the HTTP cache is read-only (setting http_cache)", {"Allow": self._allowed}
            )
        if "Content-Range" in request.headers:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a PUT brings all bytes; Content-Range is not served")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "what is stored is what is sent; Content-Encoding is not served",
                {"Accept-Encoding": "identity"},
            )

    async def _answer(self, request: web.Request, path: CachePath) -> web.StreamResponse:
        if isinstance(path, BlobPath):
            self._instance_names.check(path.instance_name)
            if request.method == "PUT":
                return await self._put_blob(request, path.digest)
            return await self._send(request, await whole_size(self._blobs, path.digest))
        if isinstance(path, ActionResultPath):
            self._instance_names.check(path.instance_name)
            if request.method == "PUT":
                return await self._put_action_result(request, path)
            return await self._get_action_result(path)
        return await self._answer_value(request, path.key)

    async def _answer_value(self, request: web.Request, key: str) -> web.StreamResponse:
        if request.method == "PUT":
            return await self._put_value(request, key)
        value = await self._values.find(key)
        if value is None:
            raise NotFoundError(f"there is no value under the key {key!r}")
        if request.method == "PROPFIND":
            return describe_value(request.path, value.size_bytes)
        return await self._send(request, value)

    async def _send(self, request: web.Request, digest: Digest) -> web.StreamResponse:
        return await send_blob(request, self._blobs, digest, self._blob_limits.stall_seconds, self._count_sent)

    async def _put_blob(self, request: web.Request, expected: Digest) -> web.StreamResponse:
        body = receive_body(request, self._blob_limits, self._count_received)
        (size_bytes,) = await settled(self._blobs.find_sizes([expected.key]))
        if size_bytes is None:
            await self._store(body, expected.function, expected.hash)
        else:
            # Bazel asks nobody what is there before it sends. Nothing is written twice; a lie is found all the same.
            await _verify(body, expected)
        return web.Response()

    async def _put_value(self, request: web.Request, key: str) -> web.StreamResponse:
        body = receive_body(request, self._blob_limits, self._count_received)
        await self._values.put(key, await self._store(body, DigestFunction.SHA256))
        return web.Response()

    async def _store(
        self, body: AsyncIterator[memoryview], function: DigestFunction, expected_hash: str | None = None
    ) -> Digest:
        """Store a body as a blob, or nothing of it."""
        upload = await self._blobs.open_unnamed_upload(function, expected_hash)
        return await upload.take_all(body)

    async def _get_action_result(self, path: ActionResultPath) -> web.StreamResponse:
        found = await settled(self._action_cache.get(path.instance_name, path.action_digest))
        if found is None:
            self._counters.action_result_misses += 1
            raise NotFoundError(f"no complete action result for action {path.action_digest.hash}")
        self._counters.action_result_hits += 1
        return web.Response(body=found, headers=BLOB_HEADERS)

    async def _put_action_result(self, request: web.Request, path: ActionResultPath) -> web.StreamResponse:
        pieces = [piece async for piece in receive_body(request, self._action_result_limits, lambda _: None)]
        try:
            await self._action_cache.update(path.instance_name, path.action_digest, b"".join(pieces))
        except InvalidArgumentError as error:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST,
                f"{error.message}; under ac/ there are ActionResults alone, other values belong under /cache/",
            ) from None
        return web.Response()

    def _count_sent(self, size_bytes: int) -> None:
        self._counters.sent_bytes += size_bytes

    def _count_received(self, size_bytes: int) -> None:
        self._counters.received_bytes += size_bytes


async def _verify(body: AsyncIterator[memoryview], expected: Digest) -> None:
    """Read a body to its end, and check that it is what it is said to be."""
    hasher = expected.function.new_hasher()
    size_bytes = 0
    async for piece in body:
        hasher.update(piece)
        size_bytes += len(piece)
    if hasher.hexdigest() != expected.hash:
        found = Digest(hasher.hexdigest(), size_bytes, expected.function)
        raise DigestMismatchError(Digest(expected.hash, size_bytes, expected.function), str(found))


def _break_off(request: web.Request) -> web.StreamResponse:
    """End a connection in the middle of a message, so that the client cannot take what it has for all."""
    if request.transport is not None:
        request.transport.abort()
    response = web.Response()
    response.force_close()
    return response


def _outcome(method: str, status: int) -> str:
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "failed"
    if status == HTTPStatus.NOT_FOUND:
        return "miss"
    if status >= HTTPStatus.BAD_REQUEST:
        return "refused"
    return "stored" if method == "PUT" else "hit"
