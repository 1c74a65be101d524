"""A CAS that was told which digest functions to offer."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from lathe_cas.app import build
from lathe_cas.config import CasSettings
from lathe_protos import reapi
from lathe_shared.cas_wire import find_missing_request
from lathe_shared.config_loading import ConfigurationError, read_settings
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.lifecycle import ServiceRuntime

RPC_SECONDS = 20
HOST = "127.0.0.1"
FIND_MISSING = "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs"
CAPABILITIES = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities"


async def test_only_what_is_offered_is_served(tmp_path: Path) -> None:
    settings = CasSettings(
        host=HOST, port=0, http_port=0, data_dir=tmp_path, max_size_bytes=1 << 24, digest_functions=["blake3", "sha1"]
    )
    runtime = ServiceRuntime(settings, CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{runtime.ports['grpc']}") as channel:

            async def call(path: str, request: bytes) -> bytes:
                answer: bytes = await channel.unary_unary(path, None, None)(request, timeout=RPC_SECONDS)
                return answer

            capabilities = reapi.ServerCapabilities().parse(await call(CAPABILITIES, b""))
            assert capabilities.cache_capabilities.digest_functions == [DigestFunction.SHA1, DigestFunction.BLAKE3]

            with pytest.raises(grpc.aio.AioRpcError, match="SHA256 is not one of SHA1, BLAKE3") as refused:
                await call(FIND_MISSING, find_missing_request("", [Digest.of(b"x")]))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT

            # Without a function, 64 digits can only be BLAKE3's here: its empty blob is there, SHA-256's is not.
            empty = [Digest.of(b"", function) for function in (DigestFunction.BLAKE3, DigestFunction.SHA256)]
            asked = reapi.FindMissingBlobsRequest(blob_digests=[digest.to_message() for digest in empty])
            missing = reapi.FindMissingBlobsResponse().parse(await call(FIND_MISSING, bytes(asked)))
            assert missing.missing_blob_digests == [empty[1].to_message()]
    finally:
        assert await runtime.stop()


def test_a_function_that_nobody_computes_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match=r"digest_functions.*'md4' is not one of sha256, sha1"):
        read_settings(CasSettings, ["--digest-functions=sha256,md4"], {})
    with pytest.raises(ConfigurationError, match="digest_functions"):
        read_settings(CasSettings, ["--digest-functions="], {})
