"""Blobs as zstd streams, made and read by another implementation: gRPC's own client and python-zstandard."""

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes
from tests.integration.independent_client.generated_api import GeneratedApi
from tests.support.service_process import HOST, ServiceProcess, free_ports
from tests.support.waiting import eventually
from tests.unit.cas.zstd_frames import bomb

IDENTITY, ZSTD = 0, 1
INVALID = grpc.StatusCode.INVALID_ARGUMENT
SIZES = [300, 65_521, 3 << 20]


def encoded(data: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def frames(data: bytes, frame_bytes: int) -> bytes:
    """Compress to a stream of independent frames."""
    return b"".join(encoded(data[at : at + frame_bytes]) for at in range(0, len(data), frame_bytes))


def decoded(stream: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) as reader:
        return reader.read()


def seeded(size: int, seed: int) -> bytes:
    """Bytes of which half is redundant."""
    return random.Random(seed).randbytes(size // 2).hex().encode()


def zstd_read_name(client: IndependentClient, data: bytes) -> str:
    return f"{INSTANCE}/compressed-blobs/zstd/{client.blob_name(data)}"


def zstd_upload_name(client: IndependentClient, data: bytes) -> str:
    return f"{INSTANCE}/uploads/{uuid.uuid4()}/compressed-blobs/zstd/{client.blob_name(data)}"


def batch_update(client: IndependentClient, *items: tuple[Any, bytes, int]) -> list[Any]:
    requests = [{"digest": digest, "data": data, "compressor": compressor} for digest, data, compressor in items]
    request = client.api.reapi.BatchUpdateBlobsRequest(instance_name=INSTANCE, requests=requests)
    return list(client.cas.BatchUpdateBlobs(request).responses)


def batch_read(client: IndependentClient, *digests: Any, acceptable: tuple[int, ...] = ()) -> list[Any]:
    request = client.api.reapi.BatchReadBlobsRequest(
        instance_name=INSTANCE, digests=digests, acceptable_compressors=acceptable
    )
    return list(client.cas.BatchReadBlobs(request).responses)


def refusal(call: Any, code: grpc.StatusCode = INVALID) -> str:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    assert refused.value.code() == code, refused.value
    return refused.value.details() or ""


def test_zstd_is_advertised(client: IndependentClient) -> None:
    stub: Any = client.api.reapi_stubs.CapabilitiesStub(client.cas_channel)
    cache = stub.GetCapabilities(client.api.reapi.GetCapabilitiesRequest(instance_name=INSTANCE)).cache_capabilities
    assert ZSTD in cache.supported_compressors
    assert ZSTD in cache.supported_batch_update_compressors


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frame_bytes", [1 << 30, 100_000])
def test_written_as_zstd_and_read_in_every_way(
    client: IndependentClient, unique_bytes: UniqueBytes, size: int, frame_bytes: int
) -> None:
    data = unique_bytes(size)
    stream = frames(data, frame_bytes)

    assert client.write(zstd_upload_name(client, data), stream) == len(stream)
    assert client.missing(client.digest(data)) == []
    assert client.read(client.read_name(data)) == data
    assert client.read(zstd_read_name(client, data)) == stream
    (plain,) = batch_read(client, client.digest(data))
    assert (plain.data, plain.compressor) == (data, IDENTITY)
    (compressed,) = batch_read(client, client.digest(data), acceptable=(ZSTD,))
    assert (compressed.data, compressed.compressor) == (stream, ZSTD)


@pytest.mark.parametrize("size", SIZES)
def test_written_plain_and_read_as_zstd(client: IndependentClient, unique_bytes: UniqueBytes, size: int) -> None:
    data = unique_bytes(size)
    client.write(client.upload_name(data), data)

    stream = client.read(zstd_read_name(client, data))
    assert decoded(stream) == data
    assert len(stream) < size
    (found,) = batch_read(client, client.digest(data), acceptable=(ZSTD,))
    assert data == (decoded(found.data) if found.compressor == ZSTD else found.data)


def test_a_large_blob_both_ways(client: IndependentClient) -> None:
    data = seeded(48 << 20, 1)
    stream = encoded(data, 1)

    assert client.write(zstd_upload_name(client, data), stream) == len(stream)
    assert client.read(zstd_read_name(client, data)) == stream
    assert client.read(client.read_name(data)) == data


@pytest.mark.parametrize("offset", [0, 1, 65_520, 1_999_999, 2_000_000])
@pytest.mark.parametrize("came_as", ["plain", "one frame", "frames"])
def test_offsets_count_bytes_of_the_blob(
    client: IndependentClient, unique_bytes: UniqueBytes, came_as: str, offset: int
) -> None:
    data = unique_bytes(2_000_000)
    if came_as == "plain":
        client.write(client.upload_name(data), data)
    else:
        client.write(zstd_upload_name(client, data), frames(data, 1 << 30 if came_as == "one frame" else 100_000))

    assert decoded(client.read(zstd_read_name(client, data), offset)) == data[offset:]
    assert client.read(client.read_name(data), offset, 70_000) == data[offset : offset + 70_000]
    refusal(lambda: client.read(zstd_read_name(client, data), len(data) + 1), grpc.StatusCode.OUT_OF_RANGE)


def test_a_compressed_read_has_no_limit(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(300)
    client.store(data)

    assert "read_limit" in refusal(lambda: client.read(zstd_read_name(client, data), 0, 10))
    assert "read_offset" in refusal(lambda: client.read(zstd_read_name(client, data), -1), grpc.StatusCode.OUT_OF_RANGE)


def test_a_blob_that_is_not_there(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    refusal(lambda: client.read(zstd_read_name(client, unique_bytes(300))), grpc.StatusCode.NOT_FOUND)


def test_the_empty_blob(client: IndependentClient) -> None:
    assert client.write(zstd_upload_name(client, b""), encoded(b"")) == -1
    assert decoded(client.read(zstd_read_name(client, b""))) == b""
    (outcome,) = batch_update(client, (client.digest(b""), encoded(b""), ZSTD))
    assert outcome.status.code == 0


@pytest.mark.parametrize("size", [300, 3 << 20])
def test_an_upload_of_what_is_there_is_not_needed(
    client: IndependentClient, unique_bytes: UniqueBytes, size: int
) -> None:
    data = unique_bytes(size)
    client.write(client.upload_name(data), data)

    # Spec: ContentAddressableStorage, on uploads of blobs that another client has completed.
    assert client.write(zstd_upload_name(client, data), encoded(data)) == -1


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "another blob": lambda data: encoded(b"\0" * 9 + data[9:]),
    "cut off": lambda data: encoded(data)[:-1],
    "garbage behind": lambda data: encoded(data) + b"garbage",
    "plain": lambda data: data,
    "one byte less": lambda data: encoded(data[:-1]),
    "one byte more": lambda data: encoded(data + b"x"),
    "a bomb": lambda data: bomb(10_000),
}


@pytest.mark.parametrize("size", [300, 3 << 20])
@pytest.mark.parametrize("how", BROKEN)
def test_a_stream_that_is_not_the_blob_is_refused(
    client: IndependentClient, unique_bytes: UniqueBytes, size: int, how: str
) -> None:
    data = seeded(size, size) + unique_bytes(200)
    name = zstd_upload_name(client, data)

    assert refusal(lambda: client.write(name, BROKEN[how](data)))
    (outcome,) = batch_update(client, (client.digest(data), BROKEN[how](data), ZSTD))
    assert outcome.status.code == INVALID.value[0]
    assert client.missing(client.digest(data)) == [client.digest(data).hash]
    # The right stream is taken afterwards, under the same name.
    stream = encoded(data)
    assert client.write(name, stream) == len(stream)
    assert client.read(client.read_name(data)) == data


@pytest.mark.parametrize(("claims", "reason"), [(299, "more than the 299"), (301, "where the digest has 301")])
def test_a_right_hash_with_a_wrong_size(
    client: IndependentClient, unique_bytes: UniqueBytes, claims: int, reason: str
) -> None:
    data = unique_bytes(300)
    name = zstd_upload_name(client, data).replace("/300", f"/{claims}")

    assert reason in refusal(lambda: client.write(name, encoded(data)))
    assert client.missing(client.digest(data)) == [client.digest(data).hash]


@pytest.mark.parametrize("compressor", ["deflate", "brotli", "lz4", "identity"])
def test_other_compressors_are_refused_with_what_is_offered(
    client: IndependentClient, unique_bytes: UniqueBytes, compressor: str
) -> None:
    data = unique_bytes(300)

    for name, call in (
        (zstd_read_name(client, data), client.read),
        (zstd_upload_name(client, data), lambda name: client.write(name, data)),
    ):
        assert "not one of zstd" in refusal(lambda call=call, name=name: call(name.replace("zstd", compressor)))


@pytest.mark.parametrize("compressor", [2, 3, 99, -1])
def test_other_compressors_in_a_batch(client: IndependentClient, unique_bytes: UniqueBytes, compressor: int) -> None:
    good, bad = unique_bytes(300), unique_bytes(400)

    outcomes = batch_update(client, (client.digest(bad), bad, compressor), (client.digest(good), encoded(good), ZSTD))

    assert [outcome.status.code for outcome in outcomes] == [INVALID.value[0], 0]
    assert "ZSTD" in outcomes[0].status.message
    assert client.missing(client.digest(bad), client.digest(good)) == [client.digest(bad).hash]
    # Of what a client accepts, what is not known does not matter.
    (found,) = batch_read(client, client.digest(good), acceptable=(compressor,))
    assert (found.data, found.compressor) == (good, IDENTITY)


def test_a_batch_of_both_kinds(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    plain, first, second, wrong = (unique_bytes(size) for size in (300, 70_000, 500, 600))

    outcomes = batch_update(
        client,
        (client.digest(first), encoded(first), ZSTD),
        (client.digest(plain), plain, IDENTITY),
        (client.digest(wrong), encoded(first), ZSTD),
        (client.digest(second), encoded(second), ZSTD),
    )

    assert [outcome.status.code for outcome in outcomes] == [0, 0, INVALID.value[0], 0]
    found = batch_read(client, *map(client.digest, (first, plain, second)), acceptable=(IDENTITY, ZSTD))
    assert [(each.data, each.compressor) for each in found] == [
        (encoded(first), ZSTD), (plain, IDENTITY), (encoded(second), ZSTD)
    ]  # fmt: skip


def test_a_batch_that_would_decompress_to_too_much(client: IndependentClient) -> None:
    data = [bytes(3_000_000), b"\1" * 3_000_000, b"\2" * 1_000_000]

    outcomes = batch_update(client, *((client.digest(each), encoded(each), ZSTD) for each in data))

    assert [outcome.status.code for outcome in outcomes] == [0, INVALID.value[0], 0]
    assert "decompresses to more" in outcomes[1].status.message


def test_frames_with_a_dictionary_are_refused(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(300)
    # A frame whose descriptor announces the id of a dictionary.
    stream = b"\x28\xb5\x2f\xfd\x01\x38\x07" + b"\x01\x00\x00"

    assert "dictionary" in refusal(lambda: client.write(zstd_upload_name(client, data), stream))


def test_a_stream_that_broke_off_begins_anew(client: IndependentClient) -> None:
    data = seeded(12 << 20, 2)
    stream, name = encoded(data, 1), zstd_upload_name(client, data)

    # The client ends its side early, and learns how much of the blob is kept: nothing of a frame that was begun.
    part = client.write_requests(name, stream[: 4 << 20], finish=False)
    assert client.bytestream.Write(part).committed_size == 0
    answer = client.bytestream.QueryWriteStatus(client.api.bytestream.QueryWriteStatusRequest(resource_name=name))
    assert (answer.committed_size, answer.complete) == (0, False)
    assert "write_offset" in refusal(lambda: client.write(name, stream, offset=4 << 20))
    assert client.write(name, stream) == len(stream)
    assert client.read(client.read_name(data)) == data


class OwnCas:
    """A CAS of one test."""

    def __init__(self, api: GeneratedApi, folder: Path, *flags: str) -> None:
        port, http_port = free_ports(2)
        self.service = ServiceProcess(
            "cas",
            "lathe-cas",
            [f"--host={HOST}", f"--port={port}", f"--http-port={http_port}", f"--data-dir={folder / 'data'}", *flags],
            http_port,
            folder / "cas.log",
        )
        self.client = IndependentClient(api, f"{HOST}:{port}", f"{HOST}:{port}")
        self.start()

    def start(self) -> None:
        self.service.start()
        self.service.wait_healthy()

    def metric(self, name: str) -> float:
        return self.service.metrics().total(f"lathe_cas_{name}")

    def discard(self) -> None:
        self.client.close()
        self.service.discard()


@pytest.fixture
def own_cas(api: GeneratedApi, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OwnCas]:
    cas = OwnCas(api, tmp_path, *getattr(request, "param", ()))
    yield cas
    cas.discard()


def test_a_restart_in_between(own_cas: OwnCas) -> None:
    client = own_cas.client
    data, other = seeded(3 << 20, 3), seeded(12 << 20, 4)
    stream, other_stream = encoded(data), encoded(other, 1)
    name = zstd_upload_name(client, other)
    client.write(zstd_upload_name(client, data), stream)
    leave = threading.Event()
    begun = client.bytestream.Write.future(unfinished(client, name, other_stream[: 4 << 20], leave))
    eventually(lambda: own_cas.metric("staged_bytes") > 0, "a part of the upload is staged")

    own_cas.service.kill()
    with pytest.raises(grpc.RpcError):
        begun.result(timeout=60)
    leave.set()
    own_cas.start()

    assert client.read(zstd_read_name(client, data)) == stream
    assert client.read(client.read_name(data)) == data
    assert client.missing(client.digest(other)) == [client.digest(other).hash]
    assert client.write(name, other_stream) == len(other_stream)
    assert client.read(client.read_name(other)) == other
    assert own_cas.metric("staged_bytes") == 0


def unfinished(client: IndependentClient, name: str, stream: bytes, leave: threading.Event) -> Iterator[Any]:
    """Send all that is given, and then nothing more."""
    yield from client.write_requests(name, stream, finish=False)
    leave.wait(60)


@pytest.mark.parametrize("own_cas", [("--max-size-bytes=2000000", "--lease-seconds=0")], indirect=True)
def test_eviction_counts_what_is_on_disk(own_cas: OwnCas) -> None:
    client = own_cas.client
    blobs = [seeded(100_000, seed) for seed in range(60)]
    for data in blobs:
        (outcome,) = batch_update(client, (client.digest(data), encoded(data), ZSTD))
        assert outcome.status.code == 0
        assert own_cas.metric("stored_bytes") <= 2_000_000

    kept = len(blobs) - len(client.missing(*map(client.digest, blobs)))
    assert kept == own_cas.metric("blobs")
    assert kept * 100_000 == own_cas.metric("blob_bytes") > 2_000_000
    assert own_cas.metric("evicted_blobs_total") == len(blobs) - kept > 0
    assert own_cas.metric("compressed_blobs_total") == len(blobs)
    assert own_cas.metric("compression_saved_bytes_total") > len(blobs) * 40_000
    for data in blobs[-10:]:
        assert client.read(client.read_name(data)) == data


@pytest.mark.parametrize("own_cas", [("--compress-stored=true", "--zstd-level=1")], indirect=True)
def test_a_cas_that_compresses_what_it_stores(own_cas: OwnCas) -> None:
    client = own_cas.client
    blobs = [seeded(size, size) for size in (1_000, 100_000, 5 << 20)]
    for data in blobs:
        client.write(client.upload_name(data), data)
    client.store(b"few bytes", seeded(10_000, 5))

    assert own_cas.metric("compressed_blobs_total") == 4
    assert own_cas.metric("stored_bytes") < 0.7 * own_cas.metric("blob_bytes")
    for data in blobs:
        assert client.read(client.read_name(data)) == data
        assert client.read(client.read_name(data), 500, 300) == data[500:800]
        stream = client.read(zstd_read_name(client, data))
        assert decoded(stream) == data
        assert len(stream) < len(data)


def test_a_bomb_of_a_declared_tebibyte_takes_neither_memory_nor_disk(own_cas: OwnCas) -> None:
    client = own_cas.client
    before = own_cas.service.metrics().total("process_resident_memory_bytes")
    name = f"{INSTANCE}/uploads/{uuid.uuid4()}/compressed-blobs/zstd/{'0' * 64}/{1 << 40}"

    refusal(lambda: client.write(name, bomb(100_000)), grpc.StatusCode.RESOURCE_EXHAUSTED)
    # As large as the store would take, and of another hash: decoded to its end, piece by piece.
    name = f"{INSTANCE}/uploads/{uuid.uuid4()}/compressed-blobs/zstd/{'0' * 64}/{4000 * (128 << 10)}"
    assert "do not match" in refusal(lambda: client.write(name, bomb(4000)))
    after = own_cas.service.metrics().total("process_resident_memory_bytes")
    assert after - before < 100 << 20
    assert own_cas.metric("staged_bytes") == own_cas.metric("blobs") == 0
