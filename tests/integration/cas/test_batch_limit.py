"""A CAS that was told how large batches may be: what it advertises is what it takes and gives."""

from __future__ import annotations

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
SERVICE = "/build.bazel.remote.execution.v2.ContentAddressableStorage"


def update(*blobs: bytes) -> reapi.BatchUpdateBlobsRequest:
    return reapi.BatchUpdateBlobsRequest(
        requests=[
            reapi.BatchUpdateBlobsRequestRequest(digest=Digest.of(blob).to_message(), data=blob) for blob in blobs
        ]
    )


async def test_the_limit_is_advertised_and_held(tmp_path: Path) -> None:
    settings = CasSettings(
        host=HOST,
        port=0,
        http_port=0,
        data_dir=tmp_path,
        max_size_bytes=1 << 24,
        max_batch_total_size_bytes=LIMIT_BYTES,
    )
    runtime = ServiceRuntime(settings, CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{runtime.ports['grpc']}") as channel:

            async def call(path: str, request: Any) -> bytes:
                answer: bytes = await channel.unary_unary(path, None, None)(bytes(request), timeout=RPC_SECONDS)
                return answer

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
    finally:
        assert await runtime.stop()
