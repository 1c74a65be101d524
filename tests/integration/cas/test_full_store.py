"""A CAS that is full of leased data, and one blob that fifty clients bring at once: what grpcio is told."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from lathe_cas.app import build
from lathe_cas.config import CasSettings
from lathe_protos import bytestream, reapi
from lathe_shared.config_loading import ConfigurationError, read_settings
from lathe_shared.digest import Digest
from lathe_shared.lifecycle import ServiceRuntime

RPC_SECONDS = 20
HOST = "127.0.0.1"
SERVICE = "/build.bazel.remote.execution.v2."
WRITE = "/google.bytestream.ByteStream/Write"
LIMIT_BYTES = 4 << 20
MESSAGE_BYTES = 100_000
CLIENTS = 50


class Client:
    """Calls over one channel, and what the CAS says about itself."""

    def __init__(self, channel: grpc.aio.Channel, http_address: str) -> None:
        self.channel = channel
        self.http_address = http_address

    async def call(self, path: str, request: Any) -> bytes:
        answer: bytes = await self.channel.unary_unary(SERVICE + path, None, None)(bytes(request), timeout=RPC_SECONDS)
        return answer

    async def batch(self, *blobs: bytes) -> list[tuple[int, str]]:
        requests = [
            reapi.BatchUpdateBlobsRequestRequest(digest=Digest.of(data).to_message(), data=data) for data in blobs
        ]
        answer = await self.call(
            "ContentAddressableStorage/BatchUpdateBlobs", reapi.BatchUpdateBlobsRequest(requests=requests)
        )
        statuses = [response.status for response in reapi.BatchUpdateBlobsResponse().parse(answer).responses]
        return [(status.code, status.message) for status in statuses]

    async def write(self, requests: Any) -> int:
        call = self.channel.stream_unary(WRITE, None, None)
        answer = await call(requests, timeout=RPC_SECONDS)
        return bytestream.WriteResponse().parse(answer).committed_size

    async def status(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.http_address}/status") as answer:
            page: dict[str, Any] = await answer.json()
            return page

    async def metrics(self) -> str:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.http_address}/metrics") as answer:
            return await answer.text()


@asynccontextmanager
async def serving(path: Path, **given: Any) -> AsyncIterator[Client]:
    given = {"max_size_bytes": LIMIT_BYTES} | given
    settings = CasSettings(host=HOST, port=0, http_port=0, data_dir=path, **given)
    runtime = ServiceRuntime(settings, CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{runtime.ports['grpc']}") as channel:
            yield Client(channel, f"{HOST}:{runtime.ports['http']}")
    finally:
        assert await runtime.stop()


def write_requests(data: bytes) -> Iterator[bytes]:
    name = f"uploads/{uuid.uuid4()}/blobs/{Digest.of(data)}"
    for start in range(0, len(data), MESSAGE_BYTES):
        piece = data[start : start + MESSAGE_BYTES]
        finish = start + MESSAGE_BYTES >= len(data)
        yield bytes(bytestream.WriteRequest(name if not start else "", start, finish, piece))


async def fill(client: Client) -> None:
    number = 0
    while (await client.batch(number.to_bytes(4, "big") * 25_000))[0][0] == 0:
        number += 1
    assert number > 30


async def test_a_store_full_of_leased_data_says_so_everywhere(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await fill(client)
        (first, second) = await client.batch(b"x" * 500_000, b"small")
        refusals = [first[1]]
        assert first[0] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert second == (0, ""), "each blob for itself"
        action = Digest.of(b"action").to_message()
        result = reapi.ActionResult(stdout_raw=bytes(500_000))
        attempts: list[Callable[[], Any]] = [
            lambda: client.write(write_requests(b"y" * 500_000)),
            lambda: client.write(write_requests(b"z" * 3_000_000)),
            lambda: client.call(
                "ActionCache/UpdateActionResult",
                reapi.UpdateActionResultRequest(action_digest=action, action_result=result),
            ),
        ]
        for attempt in attempts:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await attempt()
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            refusals.append(refused.value.details() or "")
        for text in refusals:
            for part in (f"limit is {LIMIT_BYTES} (setting max_size_bytes)", "10800 seconds (setting lease_seconds)"):
                assert part in text
        page = await client.status()
        assert page["limits"]["lease_seconds"] == 10_800
        assert page["limits"]["max_age_seconds"] is None
        assert (page["limits"]["low_watermark"], page["limits"]["high_watermark"]) == (0.9, 0.95)
        assert page["store"]["staged_bytes"] == 0, "what found no room keeps none"
        assert page["since_start"]["refused_writes"] == len(refusals) + 1
        metrics = await client.metrics()
        assert f"lathe_cas_refused_writes_total {len(refusals) + 1}.0" in metrics
        assert "\nlathe_cas_least_evicted_age_seconds " not in metrics, "nothing was evicted"


async def test_without_a_lease_old_data_makes_room(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_seconds=0) as client:
        for number in range(60):
            assert await client.batch(number.to_bytes(4, "big") * 25_000) == [(0, "")]
        assert "lathe_cas_least_evicted_age_seconds 0.0" in await client.metrics()


async def test_a_blob_that_fifty_bring_at_once_is_stored_once(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    # Room for two of them: were each staged for itself, most would be refused.
    async with serving(tmp_path, max_size_bytes=6 << 20) as client:
        others_have_begun = asyncio.Event()
        begun = 0

        async def first() -> AsyncIterator[bytes]:
            for number, request in enumerate(write_requests(data)):
                if number == 15:
                    await others_have_begun.wait()
                yield request

        async def other() -> AsyncIterator[bytes]:
            nonlocal begun
            requests = write_requests(data)
            for _ in range(12):
                yield next(requests)
            begun += 1
            if begun == CLIENTS - 1:
                others_have_begun.set()
            # No more before somebody else is through: this one can only be answered by that.
            await is_over.wait()
            for request in requests:
                yield request

        is_over = asyncio.Event()
        writes = [asyncio.create_task(client.write(other())) for _ in range(CLIENTS - 1)]
        assert await client.write(first()) == len(data)
        is_over.set()
        assert await asyncio.gather(*writes) == [len(data)] * (CLIENTS - 1)
        since_start = (await client.status())["since_start"]
        assert since_start["written_blobs"] == 1
        assert since_start["received_bytes"] < CLIENTS * len(data) * 2 / 3, "most had their answer early"
        # One that comes when all is over has its answer after its first message.
        assert await client.write(write_requests(data)) == len(data)
        assert await client.batch(*[b"the same"] * 10) == [(0, "")] * 10
        assert (await client.status())["since_start"]["written_blobs"] == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--low-watermark=0.95"], r"low_watermark \(0.95\) must be less than high_watermark \(0.95\)"),
        (["--high-watermark=1.5"], "high_watermark"),
        (["--low-watermark=0"], "low_watermark"),
        (["--lease-seconds=-1"], "lease_seconds"),
        (["--max-age-seconds=600"], r"max_age_seconds \(600\) is less than lease_seconds \(10800\)"),
        (["--lease-seconds=99999999999"], "lease_seconds"),
    ],
)
def test_eviction_that_makes_no_sense_is_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        read_settings(CasSettings, arguments, {})


def test_eviction_can_be_set() -> None:
    arguments = ["--lease-seconds=0", "--max-age-seconds=600", "--high-watermark=0.5", "--low-watermark=0.4"]
    policy = read_settings(CasSettings, arguments, {}).storage_options().policy
    assert (policy.lease_seconds, policy.max_age_seconds, policy.high_ratio, policy.low_ratio) == (0, 600, 0.5, 0.4)
