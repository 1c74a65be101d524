"""The HTTP cache over a real LMDB store, on a real port."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from tests.contract.cas.blob_making import missing
from tests.contract.cas.lmdb_store import LmdbStore

from lathe_cas.action_cache import ActionCache
from lathe_cas.blob_store import BlobStore
from lathe_cas.cas_metrics import CasCounters, HttpCacheCounts
from lathe_cas.http_cache.opaque_values import OpaqueValues
from lathe_cas.http_cache.requests import HttpCache
from lathe_cas.soon import settled
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.http_port import HttpPort
from lathe_shared.instance_name import InstanceNames
from lathe_shared.metrics import ServiceMetrics

HOST = "127.0.0.1"
# Nothing here comes near it; it only ends a test that hangs.
DEADLINE_SECONDS = 30.0
BINARY = "application/octet-stream"


@dataclass
class Answer:
    """A response that was read to its end."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(repr=False)

    @property
    def text(self) -> str:
        return self.body.decode()


class HttpServer:
    """A store, the cache over it, and a client."""

    def __init__(
        self, store: LmdbStore, cache: HttpCache, http_port: HttpPort, port: int, client: aiohttp.ClientSession
    ) -> None:
        self.store = store
        self.cache = cache
        self.port = port
        self.client = client
        self._http_port = http_port
        self._closed = False

    async def close(self) -> None:
        """Close the port, recount the store and close it, as a service that stops does."""
        if self._closed:
            return
        self._closed = True
        await self._http_port.close()
        await self.store.recount()
        await self.store.close()

    @property
    def blobs(self) -> BlobStore:
        return self.store.blobs

    async def ask(
        self,
        method: str,
        path: str,
        data: bytes | AsyncIterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        url = f"http://{HOST}:{self.port}{path}"
        body = io.BytesIO(data) if isinstance(data, bytes) else data
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            self.client.request(method, url, data=body, headers={"Content-Type": BINARY} | (headers or {})) as response,
        ):
            return Answer(response.status, await response.read(), response.headers)

    async def get(self, path: str) -> Answer:
        return await self.ask("GET", path)

    async def put(self, path: str, data: bytes | AsyncIterator[bytes]) -> Answer:
        return await self.ask("PUT", path, data)

    async def action_result(self, instance_name: str, action_digest: Digest) -> bytes | None:
        """Look an action result up as the gRPC service does."""
        return await settled(ActionCache(self.store.results, self.blobs).get(instance_name, action_digest))

    def missing(self, *digests: Digest) -> list[Digest]:
        return missing(self.blobs, *digests)

    def is_clean(self) -> bool:
        """Say whether the store holds nothing at all, neither whole nor unfinished."""
        status = self.blobs.status()
        return not (status.blobs or status.action_results or status.staged_bytes or self.store.blobs.active_uploads)

    async def requests(self) -> dict[tuple[str, str, str], int]:
        """Return the counts of requests by kind, method and outcome."""
        text = (await self.get("/metrics")).text
        return {
            (sample.labels["kind"], sample.labels["method"], sample.labels["outcome"]): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "lathe_cas_http_cache_requests_total"
        }


@asynccontextmanager
async def http_server(
    path: Path,
    *,
    writable: bool = True,
    limit_bytes: int = 1 << 30,
    max_body_bytes: int = 1 << 30,
    stall_seconds: float = DEADLINE_SECONDS,
    instance_names: tuple[str, ...] = (),
) -> AsyncIterator[HttpServer]:
    """Serve until the block ends; the store is recounted then."""
    store = LmdbStore(path / "store", limit_bytes)
    await store.open()
    metrics = ServiceMetrics("cas", CollectorRegistry())
    cache = HttpCache(
        store.blobs,
        ActionCache(store.results, store.blobs),
        OpaqueValues(store.results),
        InstanceNames(instance_names),
        tuple(DigestFunction),
        CasCounters(),
        HttpCacheCounts(metrics),
        writable=writable,
        max_body_bytes=max_body_bytes,
        stall_seconds=stall_seconds,
    )
    port = HttpPort(metrics, lambda: True, dict, cache.routes())
    number = await port.start(HOST, 0)
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        server = HttpServer(store, cache, port, number, client)
        try:
            yield server
        finally:
            await server.close()


async def in_pieces(data: bytes, piece_bytes: int = 100_000) -> AsyncIterator[bytes]:
    """Make aiohttp send a body whose length it does not know, by chunks."""
    for start in range(0, len(data), piece_bytes):
        yield data[start : start + piece_bytes]


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until a condition holds."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 -- what is waited for has no event
            await asyncio.sleep(0.001)
