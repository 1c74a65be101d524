"""A CAS on several disks, by grpcio: folders in any order, one more, one less, and one that is no store of its own."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from lathe_cas.app import build
from lathe_cas.config import CasSettings
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_protos import bytestream, reapi
from lathe_shared.cas_wire import find_missing_request
from lathe_shared.config_loading import ConfigurationError, read_settings
from lathe_shared.digest import Digest
from lathe_shared.lifecycle import ServiceRuntime, StartError

RPC_SECONDS = 20
HOST = "127.0.0.1"
LIMIT_BYTES = 300 << 20
SERVICE = "/build.bazel.remote.execution.v2."
BLOBS = [f"blob {number}".encode() * 40 for number in range(300)]
DIGESTS = [Digest.of(data) for data in BLOBS]
LARGE = b"0123456789abcdef" * 200_000


def settings(paths: Sequence[Path]) -> CasSettings:
    return CasSettings(host=HOST, port=0, http_port=0, data_dirs=list(paths), max_size_bytes=LIMIT_BYTES)


class Client:
    """Calls over one channel."""

    def __init__(self, channel: grpc.aio.Channel, runtime: ServiceRuntime) -> None:
        self.channel = channel
        self.runtime = runtime

    async def call(self, path: str, request: Any) -> bytes:
        answer: bytes = await self.channel.unary_unary(SERVICE + path, None, None)(bytes(request), timeout=RPC_SECONDS)
        return answer

    async def store_all(self) -> None:
        request = reapi.BatchUpdateBlobsRequest(
            requests=[
                reapi.BatchUpdateBlobsRequestRequest(digest=digest.to_message(), data=data)
                for digest, data in zip(DIGESTS, BLOBS, strict=True)
            ]
        )
        answer = reapi.BatchUpdateBlobsResponse().parse(
            await self.call("ContentAddressableStorage/BatchUpdateBlobs", request)
        )
        assert [response.digest for response in answer.responses] == [digest.to_message() for digest in DIGESTS]
        assert not any(response.status.code for response in answer.responses)

    async def missing(self, digests: Sequence[Digest] = DIGESTS) -> list[reapi.Digest]:
        answer = await self.call("ContentAddressableStorage/FindMissingBlobs", find_missing_request("", digests))
        return list(reapi.FindMissingBlobsResponse().parse(answer).missing_blob_digests)

    async def read_all(self) -> list[bytes]:
        request = reapi.BatchReadBlobsRequest(digests=[digest.to_message() for digest in DIGESTS])
        answer = await self.call("ContentAddressableStorage/BatchReadBlobs", request)
        return [response.data for response in reapi.BatchReadBlobsResponse().parse(answer).responses]

    async def write(self, data: bytes) -> None:
        digest = Digest.of(data)
        requests = [
            bytes(
                bytestream.WriteRequest(
                    resource_name=f"uploads/{uuid.uuid4()}/blobs/{digest}" if not start else "",
                    write_offset=start,
                    data=data[start : start + 500_000],
                    finish_write=start + 500_000 >= len(data),
                )
            )
            for start in range(0, len(data), 500_000)
        ]
        call = self.channel.stream_unary("/google.bytestream.ByteStream/Write", None, None)
        assert bytestream.WriteResponse().parse(await call(iter(requests), timeout=RPC_SECONDS)).committed_size == len(
            data
        )

    async def result(self, action: Digest) -> reapi.ActionResult | None:
        request = reapi.GetActionResultRequest(action_digest=action.to_message())
        try:
            return reapi.ActionResult().parse(await self.call("ActionCache/GetActionResult", request))
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            return None


@asynccontextmanager
async def serving(*paths: Path) -> AsyncIterator[Client]:
    runtime = ServiceRuntime(settings(paths), CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{runtime.ports['grpc']}") as channel:
            yield Client(channel, runtime)
    finally:
        assert await runtime.stop()


async def test_what_is_stored_is_found_whatever_the_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    action = Digest.of(b"an action")
    result = reapi.ActionResult(
        output_files=[reapi.OutputFile(path=str(digest), digest=digest.to_message()) for digest in DIGESTS]
    )
    async with serving(a, b, c) as client:
        assert await client.missing() == [digest.to_message() for digest in DIGESTS], "in the order of the request"
        await client.store_all()
        await client.write(LARGE)
        update = reapi.UpdateActionResultRequest(action_digest=action.to_message(), action_result=result)
        await client.call("ActionCache/UpdateActionResult", update)
    async with serving(c, a, b) as client:
        assert await client.missing([*DIGESTS, Digest.of(LARGE)]) == []
        assert await client.read_all() == BLOBS
        assert await client.result(action) == result

    # A disk that died, and one that takes its place: what was on it is missing, and no result hides that.
    shutil.rmtree(b)
    async with serving(a, b, c) as client:
        lost = await client.missing()
        assert 0 < len(lost) < len(BLOBS)
        assert await client.result(action) is None
        await client.store_all()
        assert await client.missing() == []
        update = reapi.UpdateActionResultRequest(action_digest=action.to_message(), action_result=result)
        await client.call("ActionCache/UpdateActionResult", update)
        assert await client.result(action) == result


async def test_a_disk_more_costs_its_share_and_no_more(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    async with serving(a, b) as client:
        await client.store_all()
    async with serving(a, b, c) as client:
        assert len(await client.missing()) == pytest.approx(len(BLOBS) / 3, rel=0.3)


async def test_a_copy_of_another_store_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "a"):
        pass
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    runtime = ServiceRuntime(settings([tmp_path / "a", tmp_path / "b"]), CollectorRegistry())
    with pytest.raises(StartError, match="data_dirs: one of them is a copy of another"):
        await build(runtime)
    assert await runtime.stop()


async def test_a_blob_larger_than_a_disk_s_share_is_refused_as_advertised(tmp_path: Path) -> None:
    async with serving(tmp_path / "a", tmp_path / "b") as client:
        answer = reapi.ServerCapabilities().parse(
            await client.call("Capabilities/GetCapabilities", reapi.GetCapabilitiesRequest())
        )
        assert answer.cache_capabilities.max_cas_blob_size_bytes == LIMIT_BYTES // 2


def test_folders_that_make_no_sense_are_refused() -> None:
    for arguments, problem in (
        (["--data-dirs=/a,/a"], "names one folder twice"),
        (["--data-dirs=/a,/b,/c", "--max-size-bytes=2000000"], "less than 1048576 for each"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            read_settings(CasSettings, arguments, {})


async def test_a_store_of_a_newer_format_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records, "FORMAT_VERSION", records.FORMAT_VERSION + 1)
        LmdbEnvironment(tmp_path / "newer", 1 << 24).close()
    before = (tmp_path / "newer" / "data.mdb").read_bytes()
    runtime = ServiceRuntime(settings([tmp_path / "usual", tmp_path / "newer"]), CollectorRegistry())
    try:
        with pytest.raises(StartError, match=r"newer holds a store of format 3, .* start the newer version"):
            await build(runtime)
    finally:
        await runtime.stop()
    assert (tmp_path / "newer" / "data.mdb").read_bytes() == before
