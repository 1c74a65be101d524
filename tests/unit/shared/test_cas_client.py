"""The CAS client against the fake CAS, over loopback."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path

import pytest
from typing_extensions import override

from lathe_shared import cas_wire
from lathe_shared.clients.action_cache_client import ActionCacheClient
from lathe_shared.clients.batch_limit import REMEMBERED_SECONDS
from lathe_shared.clients.byte_stream_client import WRITE_CHUNK_BYTES
from lathe_shared.clients.cas_client import MAX_BATCHED_BLOB_BYTES, CasClient
from lathe_shared.clients.rpc_client import RetryPolicy, RpcClient
from lathe_shared.digest import EMPTY_DIGEST, Digest, DigestFunction
from lathe_shared.errors import (
    BlobNotFoundError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    UnknownInstanceError,
)
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, client_streaming, server_streaming, unary
from lathe_shared.testing.builders import BlobSet
from lathe_shared.testing.fake_cas import FakeCas
from lathe_shared.testing.fake_clock import FakeClock, ImpatientClock
from lathe_shared.testing.serving import connect, serve, serving

WAIT_SECONDS = 30
LARGE = bytes(range(256)) * 4 * 5000  # 5 MB
SMALL = b"small"


@pytest.fixture
def cas() -> FakeCas:
    return FakeCas()


@pytest.fixture
async def client(cas: FakeCas) -> AsyncIterator[CasClient]:
    async with serving(cas.servicers()) as channel, asyncio.timeout(WAIT_SECONDS):
        yield CasClient(channel)


async def test_find_missing_names_what_is_absent(cas: FakeCas, client: CasClient) -> None:
    present = cas.put(SMALL)
    absent = Digest.of(b"absent")
    other_function = Digest.of(b"absent", DigestFunction.SHA1)

    missing = await client.find_missing("main", [present, absent, other_function, EMPTY_DIGEST])

    assert missing == {absent, other_function}


async def test_find_missing_asks_in_parts(cas: FakeCas, client: CasClient) -> None:
    digests = {Digest.of(str(number).encode()) for number in range(25_000)}

    assert await client.find_missing("main", digests) == digests
    assert cas.calls["FindMissingBlobs"] == 3


@pytest.mark.parametrize(
    "data", [b"", SMALL, b"x" * MAX_BATCHED_BLOB_BYTES, LARGE], ids=["empty", "small", "limit", "large"]
)
async def test_what_is_written_reads_back(cas: FakeCas, client: CasClient, tmp_path: Path, data: bytes) -> None:
    digest = Digest.of(data)
    source = tmp_path / "source"
    source.write_bytes(data)

    await client.write("main", digest, data)
    assert await client.read("main", digest) == data
    assert cas.get(digest) == data
    cas.blobs.clear()
    await client.write_file("main", digest, source)
    await client.read_to_file("main", digest, tmp_path / "target", mode=0o555)

    assert (tmp_path / "target").read_bytes() == data
    assert (tmp_path / "target").stat().st_mode & 0o7777 == 0o555
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


async def test_a_stream_begins_where_it_is_told(cas: FakeCas, client: CasClient) -> None:
    digest = cas.put(LARGE)

    async with aclosing(client.read_stream("main", digest, offset=1_000_001)) as pieces:
        assert b"".join([piece async for piece in pieces]) == LARGE[1_000_001:]


@pytest.mark.parametrize("size_bytes", [5, 5_000_000])
async def test_an_absent_blob_is_not_found(client: CasClient, tmp_path: Path, size_bytes: int) -> None:
    digest = Digest("0" * 64, size_bytes)

    with pytest.raises(BlobNotFoundError, match=f"{digest}"):
        await client.read("main", digest)
    with pytest.raises(BlobNotFoundError):
        await client.read_to_file("main", digest, tmp_path / "target")
    assert isinstance((await client.batch_read("main", [digest]))[digest], BlobNotFoundError)
    assert os.listdir(tmp_path) == []


async def test_a_wrong_size_in_a_batch_is_missing_and_the_right_one_is_there(cas: FakeCas, client: CasClient) -> None:
    digest = cas.put(SMALL)
    wrong = [Digest(digest.hash, size) for size in (len(SMALL) - 1, len(SMALL) + 1)]

    found = await client.batch_read("main", [*wrong, digest])

    assert found[digest] == SMALL
    assert [type(found[each]) for each in wrong] == [BlobNotFoundError] * 2


async def test_one_damaged_blob_is_its_own_error(cas: FakeCas, client: CasClient) -> None:
    for damaged in (cas.put(b"bad"), cas.put(LARGE)):
        cas.blobs[damaged] = cas.blobs[damaged][:-1] + b"?"
    present = cas.put(SMALL)

    found = await client.batch_read("main", cas.blobs)

    assert found.pop(present) == SMALL
    assert [type(error) for error in found.values()] == [InternalError] * 2


async def test_batches_are_split_and_complete(cas: FakeCas, client: CasClient) -> None:
    present = [cas.put(bytes([number]) * 200_000) for number in range(50)]
    large = cas.put(LARGE)
    absent = Digest.of(b"absent")

    found = await client.batch_read("main", [*present, large, absent, EMPTY_DIGEST])

    assert {digest: found[digest] for digest in present} == {digest: cas.blobs[digest] for digest in present}
    assert found[large] == LARGE
    assert found[EMPTY_DIGEST] == b""
    assert isinstance(found[absent], BlobNotFoundError)
    assert cas.calls["BatchReadBlobs"] == 3
    assert cas.calls["Read"] == 1


async def test_batches_are_no_larger_than_the_cas_takes(cas: FakeCas, client: CasClient) -> None:
    cas.max_batch_total_size_bytes = 100_000
    blobs = {Digest.of(data): data for data in [bytes([n]) * 30_000 for n in range(10)] + [b"x" * 100_001]}

    await client.upload("main", blobs)

    assert cas.blobs == blobs
    assert (cas.calls["BatchUpdateBlobs"], cas.calls["Write"]) == (4, 1)
    assert await client.batch_read("main", blobs) == blobs
    assert (cas.calls["BatchReadBlobs"], cas.calls["Read"]) == (4, 1)
    assert await client.read("main", Digest.of(b"x" * 100_001)) == b"x" * 100_001
    assert cas.calls["GetCapabilities"] == 1


@pytest.mark.parametrize("advertised", [0, 10_000_000])
async def test_batches_are_no_larger_than_the_client_wants(cas: FakeCas, client: CasClient, advertised: int) -> None:
    cas.max_batch_total_size_bytes = advertised
    blobs = {Digest.of(data): data for data in [bytes([n]) * 200_000 for n in range(50)]}

    await client.upload("main", blobs)

    assert cas.blobs == blobs
    assert cas.calls["BatchUpdateBlobs"] == 3


async def test_the_limit_of_a_cas_is_asked_for_once_a_minute(cas: FakeCas) -> None:
    present = [cas.put(bytes([n]) * 30_000) for n in range(10)]
    clock = FakeClock()
    async with serving(cas.servicers()) as channel, asyncio.timeout(WAIT_SECONDS):
        client = CasClient(channel, clock=clock)
        await asyncio.gather(*(client.read("main", digest) for digest in present))
        assert cas.calls["GetCapabilities"] == 1

        cas.max_batch_total_size_bytes = 100_000
        clock.advance_nowait(REMEMBERED_SECONDS)
        cas.calls.clear()
        found = await client.batch_read("main", present)

    assert found == {digest: cas.blobs[digest] for digest in present}
    assert (cas.calls["GetCapabilities"], cas.calls["BatchReadBlobs"]) == (1, 4)


async def test_a_question_for_the_limit_outlives_who_asked_first(cas: FakeCas) -> None:
    capabilities = GatedCapabilities(cas)
    digest = cas.put(SMALL)
    storage = cas.servicers()[0]
    async with serving([storage, capabilities]) as channel, asyncio.timeout(WAIT_SECONDS):
        client = CasClient(channel)
        first = asyncio.create_task(client.read("main", digest))
        await capabilities.asked.wait()
        second = asyncio.create_task(client.read("main", digest))
        await asyncio.sleep(0)
        first.cancel()
        capabilities.gate.set()

        assert await second == SMALL

    assert first.cancelled()
    assert cas.calls["GetCapabilities"] == 1


async def test_a_cas_without_capabilities_gets_batches_of_the_usual_size(cas: FakeCas) -> None:
    digest = cas.put(SMALL)
    async with serving(cas.servicers()[:1]) as channel:
        assert await CasClient(channel).read("main", digest) == SMALL


async def test_upload_sends_what_is_missing_by_batch_and_by_stream(
    cas: FakeCas, client: CasClient, tmp_path: Path
) -> None:
    file = tmp_path / "large"
    file.write_bytes(LARGE)
    blobs: dict[Digest, bytes | Path] = {Digest.of(bytes([n]) * 100): bytes([n]) * 100 for n in range(20)}
    blobs[Digest.of(LARGE)] = file
    blobs[EMPTY_DIGEST] = b""
    present = cas.put(b"\x00" * 100)

    uploaded = await client.upload("main", blobs)

    assert uploaded == blobs.keys() - {present, EMPTY_DIGEST}
    assert all(cas.get(digest) is not None for digest in blobs)
    assert (cas.calls["BatchUpdateBlobs"], cas.calls["Write"]) == (1, 1)
    assert await client.upload("main", blobs) == set()
    assert cas.calls["BatchUpdateBlobs"] == 1


async def test_many_files_at_once_do_not_block_each_other(cas: FakeCas, client: CasClient, tmp_path: Path) -> None:
    digests = [cas.put(os.urandom(size)) for size in (10, 400_000) * 40]

    async with asyncio.TaskGroup() as group:
        for digest in digests:
            group.create_task(client.read_to_file("main", digest, tmp_path / digest.hash))

    assert set(os.listdir(tmp_path)) == {digest.hash for digest in digests}


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["batch", "stream"])
async def test_bytes_that_do_not_match_are_refused(cas: FakeCas, client: CasClient, data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="do not match"):
        await client.write("main", Digest.of(data + b"?"), data + b"!")

    assert cas.blobs == {}


async def test_a_file_that_became_shorter_is_refused(cas: FakeCas, client: CasClient, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(LARGE[:-1])

    with pytest.raises(InvalidArgumentError):
        await client.write_file("main", Digest.of(LARGE), file)


async def test_a_file_that_is_not_there_is_the_callers_error(client: CasClient, tmp_path: Path) -> None:
    for data in (SMALL, LARGE):
        with pytest.raises(FileNotFoundError):
            await client.write_file("main", Digest.of(data), tmp_path / "absent")


async def test_an_upload_of_what_is_there_ends_early(cas: FakeCas, client: CasClient) -> None:
    large = LARGE * 10
    digest = cas.put(large)
    asked: list[int] = []

    async def read_at(offset: int, size: int) -> bytes:
        asked.append(offset)
        return large[offset : offset + size]

    await client._byte_stream.write("main", digest, read_at)

    assert len(asked) * WRITE_CHUNK_BYTES < len(large)


async def test_get_tree_gives_the_root_first(cas: FakeCas, client: CasClient) -> None:
    built = BlobSet()
    root = built.directory({"a/b/c.txt": b"c", "a/d.txt": b"d", "e.txt": b"e"})
    cas.put_all(built)

    directories = await client.get_tree("main", root)

    assert len(directories) == 3
    assert directories[0] == cas.blobs[root]
    with pytest.raises(BlobNotFoundError):
        await client.get_tree("main", Digest.of(b"absent"))


async def test_errors_keep_their_kind_and_text(cas: FakeCas) -> None:
    named = FakeCas(["main", "other"])
    async with serving(named.servicers()) as channel:
        with pytest.raises(InvalidArgumentError, match="knows 'main', 'other'") as caught:
            await CasClient(channel).find_missing("wrong", [Digest.of(b"x")])

    assert caught.value.field == "instance_name"
    assert not isinstance(caught.value, UnknownInstanceError)


async def test_action_results_come_back_as_they_were_stored(cas: FakeCas) -> None:
    async with serving(cas.servicers()) as channel:
        client = ActionCacheClient(channel)
        action = Digest.of(b"action")
        assert await client.get("main", action) is None

        await client.update("main", action, b"\x20\x07")

        assert await client.get("main", action) == b"\x20\x07"
        assert await client.get("other", action) is None
        capabilities = await client.capabilities("main")
        assert capabilities.cache_capabilities.max_batch_total_size_bytes == 4_000_000


class GatedCapabilities(Servicer):
    """A CAS that takes its time to say what it can do."""

    service_name = "build.bazel.remote.execution.v2.Capabilities"

    def __init__(self, cas: FakeCas) -> None:
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.real = cas.servicers()[3].rpcs()["GetCapabilities"]

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"GetCapabilities": unary(self.get)}

    async def get(self, request: bytes, context: RpcContext) -> bytes:
        self.asked.set()
        await self.gate.wait()
        answer: bytes = self.real.func(request, context)
        return answer


class Faulty(Servicer):
    """A CAS that breaks off in ways that a test chooses."""

    service_name = "google.bytestream.ByteStream"

    def __init__(self, cas: FakeCas) -> None:
        self.cas = cas
        self.reads = 0
        self.writes = 0
        self.real = cas.servicers()[1].rpcs()

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "Read": server_streaming(self.read),
            "Write": client_streaming(self.write),
            "QueryWriteStatus": self.real["QueryWriteStatus"],
        }

    async def read(self, request: bytes, context: RpcContext) -> AsyncIterator[bytes]:
        self.reads += 1
        sent = 0
        async for message in self.real["Read"].func(request, context):
            yield message
            sent += 1
            if sent == 10 and self.reads < 4:
                raise UnavailableError("for now")

    async def write(self, requests: AsyncIterator[bytes], context: RpcContext) -> bytes:
        self.writes += 1

        async def some() -> AsyncIterator[bytes]:
            taken = 0
            async for request in requests:
                yield request
                taken += 1
                if taken == 2 and self.writes < 4:
                    raise UnavailableError("for now")

        response: bytes = await self.real["Write"].func(some(), context)
        return response


QUICK = RetryPolicy(attempts=5, first_seconds=0.001, limit_seconds=0.001)


async def test_a_broken_read_goes_on_where_it_was(cas: FakeCas) -> None:
    digest = cas.put(LARGE)
    faulty = Faulty(cas)
    async with serving([faulty]) as channel, asyncio.timeout(WAIT_SECONDS):
        assert await CasClient(channel, retry=QUICK).read("main", digest) == LARGE

    assert faulty.reads == 4


async def test_a_broken_write_goes_on_where_it_was(cas: FakeCas) -> None:
    digest = Digest.of(LARGE)
    faulty = Faulty(cas)
    async with serving([faulty]) as channel, asyncio.timeout(WAIT_SECONDS):
        await CasClient(channel, retry=QUICK).write("main", digest, LARGE)

    assert cas.blobs[digest] == LARGE
    assert faulty.writes == 4


class Liar(Servicer):
    service_name = "build.bazel.remote.execution.v2.ContentAddressableStorage"

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"BatchReadBlobs": unary(self.batch_read)}

    def batch_read(self, data: bytes, _context: RpcContext) -> bytes:
        request = cas_wire.read_batch_read(data)
        return b"".join(cas_wire.batch_read_response_item(wire, b"other", b"") for wire, _, _ in request.digests)


async def test_bytes_from_the_cas_are_verified() -> None:
    async with serving([Liar()]) as channel:
        with pytest.raises(InternalError, match="in place of"):
            await CasClient(channel).read("main", Digest.of(SMALL))


async def test_a_peer_that_is_away_is_tried_again_then_unavailable() -> None:
    async with serve([]) as endpoint:
        pass
    clock = ImpatientClock()
    async with connect(endpoint) as channel:
        client = CasClient(channel, retry=RetryPolicy(attempts=4, first_seconds=1.0, limit_seconds=100.0), clock=clock)
        with pytest.raises(UnavailableError, match=f"the CAS at {endpoint} cannot be reached"):
            await client.find_missing("main", [Digest.of(b"x")])

    assert len(clock.pauses) == 3
    assert all(full / 2 <= pause <= full for pause, full in zip(clock.pauses, (1, 2, 4), strict=True))


async def test_calls_after_a_restart_succeed(cas: FakeCas) -> None:
    digest = cas.put(SMALL)
    async with serve(cas.servicers()) as first:
        port = first.port
    async with connect(first) as channel, asyncio.timeout(WAIT_SECONDS):
        client = CasClient(channel, retry=QUICK)
        for _ in range(3):
            async with serve(cas.servicers(), port=port):
                assert await client.read("main", digest) == SMALL
            with pytest.raises(UnavailableError):
                await client.read("main", digest)


class Slow(Servicer):
    service_name = "lathe.test.Slow"

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"Hang": unary(self.hang)}

    async def hang(self, _request: bytes, _context: RpcContext) -> bytes:
        await asyncio.Event().wait()
        return b""


async def test_a_peer_that_hangs_runs_into_the_deadline() -> None:
    async with serving([Slow()]) as channel:
        with pytest.raises(DeadlineExceededError):
            await RpcClient(channel).unary("/lathe.test.Slow/Hang", b"", timeout_seconds=0.05)


def test_pauses_grow_to_their_limit_and_differ() -> None:
    policy = RetryPolicy(first_seconds=1, limit_seconds=10)

    assert [policy.pause_seconds(n, 1.0) for n in (1, 2, 3, 4, 5, 500)] == [1, 2, 4, 8, 10, 10]
    assert policy.pause_seconds(1, 0.0) == 0.5
