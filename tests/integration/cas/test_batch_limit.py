"""A CAS that was told how large batches may be: what it advertises is what it takes and gives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from lathe_cas.app import build
from lathe_cas.config import CasSettings
from lathe_protos import reapi
from lathe_shared.digest import Digest
from lathe_shared.lifecycle import ServiceRuntime

RPC_SECONDS = 20
HOST = "127.0.0.1"
LIMIT_BYTES = 10_000
Call = Callable[[str, Any], Awaitable[bytes]]
SERVICE = "/build.bazel.remote.execution.v2.ContentAddressableStorage"


def update(*blobs: bytes) -> reapi.BatchUpdateBlobsRequest:
    return reapi.BatchUpdateBlobsRequest(
        requests=[
            reapi.BatchUpdateBlobsRequestRequest(digest=Digest.of(blob).to_message(), data=blob) for blob in blobs
        ]
    )


@asynccontextmanager
async def cas(tmp_path: Path, limit_bytes: int) -> AsyncIterator[Call]:
    settings = CasSettings(
        host=HOST,
        port=0,
        http_port=0,
        data_dir=tmp_path,
        max_size_bytes=1 << 26,
        max_batch_total_size_bytes=limit_bytes,
    )
    runtime = ServiceRuntime(settings, CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        # A client that was told to take larger messages than gRPC's libraries do by themselves.
        options = [("grpc.max_receive_message_length", 16 << 20)]
        async with grpc.aio.insecure_channel(f"{HOST}:{runtime.ports['grpc']}", options) as channel:

            async def call(path: str, request: Any) -> bytes:
                answer: bytes = await channel.unary_unary(path, None, None)(bytes(request), timeout=RPC_SECONDS)
                return answer

            yield call
    finally:
        assert await runtime.stop()


async def test_the_limit_is_advertised_and_held(tmp_path: Path) -> None:
    async with cas(tmp_path, LIMIT_BYTES) as call:
        path = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities"
        capabilities = reapi.ServerCapabilities().parse(await call(path, b""))
        assert capabilities.cache_capabilities.max_batch_total_size_bytes == LIMIT_BYTES

        first, second, one_too_many = bytes(LIMIT_BYTES - 1), b"x", b"yz"
        path = f"{SERVICE}/BatchUpdateBlobs"
        stored = reapi.BatchUpdateBlobsResponse().parse(await call(path, update(first, second)))
        assert [item.status.code for item in stored.responses] == [0, 0]
        with pytest.raises(grpc.aio.AioRpcError, match=f"at most {LIMIT_BYTES}") as refused:
            await call(path, update(first, one_too_many))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        await call(path, update(one_too_many))

        path = f"{SERVICE}/BatchReadBlobs"
        digests = [Digest.of(blob).to_message() for blob in (first, second, one_too_many)]
        request = reapi.BatchReadBlobsRequest(digests=digests[:2])
        read = reapi.BatchReadBlobsResponse().parse(await call(path, request))
        assert [item.data for item in read.responses] == [first, second]
        with pytest.raises(grpc.aio.AioRpcError, match=f"at most {LIMIT_BYTES}") as refused:
            await call(path, reapi.BatchReadBlobsRequest(digests=[digests[0], digests[2]]))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("limit_bytes", [5 << 20, 15 << 20])
async def test_a_limit_above_the_usual_message_is_held_by_reads_too(tmp_path: Path, limit_bytes: int) -> None:
    blobs = [bytes((number,)) * (limit_bytes // 5) for number in range(5)]
    async with cas(tmp_path, limit_bytes) as call:
        await call(f"{SERVICE}/BatchUpdateBlobs", update(*blobs))
        request = reapi.BatchReadBlobsRequest(digests=[Digest.of(blob).to_message() for blob in blobs])
        read = reapi.BatchReadBlobsResponse().parse(await call(f"{SERVICE}/BatchReadBlobs", request))
    assert [(item.status.code, item.data == blob) for item, blob in zip(read.responses, blobs, strict=True)] == [
        (0, True)
    ] * 5
