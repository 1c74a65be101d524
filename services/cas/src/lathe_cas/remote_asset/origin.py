"""Downloads from where an address leads, within bounds.

Spec: Remote Asset API, FetchBlobResponse.status, for which error means what.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.abc import AbstractResolver
from typing_extensions import override
from yarl import URL

import lathe_cas
from lathe_cas.remote_asset.host_patterns import HostPatterns, is_public
from lathe_shared.errors import (
    AbortedError,
    DeadlineExceededError,
    LatheError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Mapping

    from aiohttp.abc import ResolveResult

MAX_REDIRECTS = 10
"""As many as Bazel's own downloader and curl's users put up with; a chain is two or three long."""

_CONNECT_SECONDS = 30.0
_SILENCE_SECONDS = 60.0
"""A server that says nothing for so long has gone: TCP itself would wait for a quarter of an hour."""

_PIECE_BYTES = 256 << 10

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ABSENT = frozenset({404, 410})
_DENIED = frozenset({401, 403, 407, 451})


class _PrivateAddressError(OSError):
    """A host has private addresses only."""


class _PublicResolver(AbstractResolver):
    """Resolves names to addresses that may be connected to.

    What it returns is what is connected to: nobody asks a second time, when the answer could be another.
    """

    def __init__(self, hosts: HostPatterns) -> None:
        self._hosts = hosts
        self._inner = aiohttp.ThreadedResolver()

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if self._hosts.names(host):
            return found
        public = [result for result in found if is_public(result["host"])]
        if not public:
            raise _PrivateAddressError(f"{host} has no public address")
        return public

    @override
    async def close(self) -> None:
        await self._inner.close()


class Origin:
    """Fetches content by HTTP. Made on the event loop that uses it.

    Args:
        hosts: Those that content may come from.
        max_bytes: Bound on what is downloaded.
        tls: Verifies hosts; by the system's authorities if absent.
    """

    def __init__(self, hosts: HostPatterns, max_bytes: int, tls: ssl.SSLContext | None = None) -> None:
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_PublicResolver(hosts), ssl=True if tls is None else tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Bytes are wanted as they are: the checksum of an archive is that of its compressed form.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": f"lathe-cas/{lathe_cas.__version__}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS),
        )

    async def aclose(self) -> None:
        """Close what connections there are."""
        await self._session.close()

    async def download(
        self,
        uri: str,
        headers: Mapping[str, str],
        timeout_seconds: float,
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """Fetch what is at an address, and wherever that sends us.

        Args:
            uri: The address.
            headers: Sent with the request, and with redirected ones to the same place.
            timeout_seconds: For all of it.
            write: Given the bytes as they come.

        Raises:
            NotFoundError: Nothing is there.
            PermissionDeniedError: The host is not allowed, or refuses.
            ResourceExhaustedError: It is too large.
            DeadlineExceededError: It took too long.
            UnavailableError: The host cannot be reached or has trouble; another time may do.
            AbortedError: It cannot be fetched for another reason.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._follow(self._allowed(uri), headers, write)
        except aiohttp.ServerTimeoutError as error:
            raise DeadlineExceededError(f"{_shown(uri)} cannot be fetched: {error}") from None
        except TimeoutError:
            raise DeadlineExceededError(f"{_shown(uri)} was not fetched within {timeout_seconds:g} s") from None
        except aiohttp.ClientConnectorDNSError as error:
            if isinstance(error.os_error, _PrivateAddressError):
                raise PermissionDeniedError(
                    f"{error.os_error}; for a private one it has to be named in remote_asset_hosts"
                ) from None
            raise UnavailableError(f"{_shown(uri)} cannot be fetched: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"{_shown(uri)} cannot be fetched: {str(error) or type(error).__name__}") from None
        except ValueError as error:
            raise AbortedError(f"{_shown(uri)} cannot be fetched: {error}") from None

    async def _follow(self, url: URL, headers: Mapping[str, str], write: Callable[[bytes], Awaitable[None]]) -> None:
        redirects = 0
        while redirects <= MAX_REDIRECTS:
            redirects += 1
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    await self._receive(url, response, write)
                    return
                target = url.join(URL(response.headers.get("Location", "")))
            previous, url = url, self._allowed(str(target))
            if previous.scheme == "https" and url.scheme != "https":
                raise AbortedError(f"{_shown(str(previous))} redirects to where there is no TLS")
            if previous.origin() != url.origin():
                headers = {}
        raise AbortedError(f"{MAX_REDIRECTS} redirects did not come to an end, the last of them to {_shown(str(url))}")

    async def _receive(
        self, url: URL, response: aiohttp.ClientResponse, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        if response.status != 200:
            raise _refusal(url, response.status)
        self._check_size(url, response.content_length or 0)
        received_bytes = 0
        async for piece in response.content.iter_chunked(_PIECE_BYTES):
            received_bytes += len(piece)
            self._check_size(url, received_bytes)
            await write(piece)

    def _check_size(self, url: URL, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise ResourceExhaustedError(
                f"{_shown(str(url))} has more than {self._max_bytes} bytes (setting remote_asset_max_bytes)"
            )

    def _allowed(self, uri: str) -> URL:
        """Parse an address.

        Raises:
            NotFoundError: It is nothing that can be fetched.
            PermissionDeniedError: It leads where content may not come from.
        """
        try:
            url = URL(uri)
        except ValueError:
            url = URL()
        host = url.raw_host
        if host is None or url.scheme not in ("http", "https"):
            raise NotFoundError(f"{_shown(uri)} is no http or https address, and nothing was pushed for it")
        if url.raw_user is not None or url.raw_password is not None:
            raise PermissionDeniedError("addresses with a user or password in them are not fetched; use a header")
        if not self._hosts.allows(host):
            raise PermissionDeniedError(f"content from {host!r} is not allowed (setting remote_asset_hosts)")
        return url


def _refusal(url: URL, status: int) -> LatheError:
    text = f"{_shown(str(url))} is answered with HTTP status {status}"
    if status in _ABSENT:
        return NotFoundError(text)
    if status in _DENIED:
        return PermissionDeniedError(text)
    if status == 429 or status >= 500:
        return UnavailableError(text)
    return AbortedError(text)


def _shown(uri: str) -> str:
    """Return an address as it may be shown: without its query, in which there may be a secret, and not too long."""
    shown = uri.partition("?")[0].partition("#")[0]
    if "@" in shown:
        shown = "an address with a user in it"
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
