"""ByteStream Read, Write and QueryWriteStatus, as a stranger calls them."""

import hashlib
import random
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.integration.independent_client.client import CHUNK_BYTES, INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes
from tests.support.waiting import eventually

HASHES = {"SHA256": "sha256", "SHA1": "sha1", "MD5": "md5", "SHA384": "sha384", "SHA512": "sha512"}


def write_status(client: IndependentClient, name: str) -> tuple[int, bool]:
    answer = client.bytestream.QueryWriteStatus(client.api.bytestream.QueryWriteStatusRequest(resource_name=name))
    return answer.committed_size, answer.complete


class InterruptedWrite:
    """A Write whose client sends some pieces, then nothing, and then goes away."""

    def __init__(self, client: IndependentClient, name: str, data: bytes) -> None:
        self._requests = client.write_requests(name, data, finish=False)
        self._leave = threading.Event()
        self._call = client.bytestream.Write.future(self._pieces())

    def _pieces(self) -> Iterator[Any]:
        yield from self._requests
        self._leave.wait(60)

    def go_away(self) -> None:
        self._call.cancel()
        self._leave.set()


def test_the_empty_blob(client: IndependentClient) -> None:
    assert client.write(client.upload_name(b""), b"") == 0
    assert client.read(client.read_name(b"")) == b""


def test_a_blob_of_64_mib(client: IndependentClient) -> None:
    data = random.Random(64).randbytes(64 << 20)
    name = client.upload_name(data)

    assert client.write(name, data) == len(data)
    assert hashlib.sha256(client.read(client.read_name(data))).digest() == hashlib.sha256(data).digest()
    assert write_status(client, name) == (len(data), True)


@pytest.mark.parametrize("size", [200, 65_519, 65_520, 65_521, 1 << 20])
def test_sizes_around_those_of_chunks(client: IndependentClient, unique_bytes: UniqueBytes, size: int) -> None:
    data = unique_bytes(size)

    assert client.write(client.upload_name(data), data) == size
    assert client.read(client.read_name(data)) == data


def test_pieces_of_one_byte_and_empty_ones(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(300)
    name = client.upload_name(data)
    make = client.api.bytestream.WriteRequest
    requests = [make(resource_name=name)]
    requests += [make(write_offset=index, data=data[index : index + 1]) for index in range(len(data))]
    requests += [make(resource_name=name, write_offset=len(data), finish_write=True)]

    assert client.bytestream.Write(iter(requests)).committed_size == len(data)
    assert client.read(client.read_name(data)) == data


@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 1), (1, 0), (65_520, 0), (65_519, 2), (100_000, 65_520), (7, 999_999)]
)
def test_reading_a_part(client: IndependentClient, unique_bytes: UniqueBytes, offset: int, limit: int) -> None:
    data = unique_bytes(200_000)
    client.write(client.upload_name(data), data)

    assert client.read(client.read_name(data), offset, limit) == data[offset:][: limit or None]


def test_reading_from_the_end_gives_nothing(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(200)
    client.store(data)

    assert client.read(client.read_name(data), offset=200) == b""


def test_a_second_upload_of_the_same_blob_ends_at_once(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(3 << 20)
    client.write(client.upload_name(data), data)
    # The rest never comes: the answer can't have waited for it.
    only_the_first = InterruptedWrite(client, client.upload_name(data), data[:CHUNK_BYTES])

    assert only_the_first._call.result(timeout=30).committed_size == len(data)
    only_the_first.go_away()


def test_an_interrupted_upload_goes_on_where_it_stopped(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(5 << 20)
    name = client.upload_name(data)
    interrupted = InterruptedWrite(client, name, data[: 4 << 20])
    eventually(lambda: write_status(client, name)[0] > 0, "a part of the upload is committed")
    interrupted.go_away()

    committed, complete = write_status(client, name)
    assert 0 < committed <= 4 << 20
    assert not complete
    assert client.missing(client.digest(data)) == [client.digest(data).hash]
    # What was committed at the time of the question may have grown since; a write from there on is right all the same.
    assert client.write(name, data, offset=committed) == len(data)
    assert write_status(client, name) == (len(data), True)
    assert client.read(client.read_name(data)) == data


def test_an_upload_may_begin_anew(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(3 << 20)
    name = client.upload_name(data)
    interrupted = InterruptedWrite(client, name, data[: 2 << 20])
    eventually(lambda: write_status(client, name)[0] > 0, "a part of the upload is committed")
    interrupted.go_away()

    assert client.write(name, data) == len(data)
    assert client.read(client.read_name(data)) == data


def test_an_upload_that_nobody_began_has_no_bytes(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    name = client.upload_name(unique_bytes(200))

    try:
        assert write_status(client, name) == (0, False)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND  # noqa: PT017 # the API allows either answer


def test_two_uploads_of_one_blob_at_once(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(2 << 20)
    calls = [client.bytestream.Write.future(client.write_requests(client.upload_name(data), data)) for _ in range(4)]

    assert [call.result(timeout=60).committed_size for call in calls] == [len(data)] * 4
    assert client.read(client.read_name(data)) == data


@pytest.mark.parametrize("instance", ["", "main", "a/b/c", "my-uploads/x"])
@pytest.mark.parametrize("suffix", ["", "/some/file.txt"])
def test_instance_names_and_what_follows_the_size(
    client: IndependentClient, unique_bytes: UniqueBytes, instance: str, suffix: str
) -> None:
    data = unique_bytes(300)
    prefix = f"{instance}/" if instance else ""

    assert client.write(f"{prefix}uploads/{uuid.uuid4()}/blobs/{client.blob_name(data)}{suffix}", data) == len(data)
    assert client.read(f"{prefix}blobs/{client.blob_name(data)}") == data


# Spec: ContentAddressableStorage, the words that no segment of an instance name may be.
@pytest.mark.parametrize("instance", ["uploads", "x/blobs/y", "compressed-blobs", "a//b"])
def test_instance_names_that_no_resource_name_can_hold(
    client: IndependentClient, unique_bytes: UniqueBytes, instance: str
) -> None:
    data = unique_bytes(300)

    with pytest.raises(grpc.RpcError) as refused:
        client.write(f"{instance}/uploads/{uuid.uuid4()}/blobs/{client.blob_name(data)}", data)

    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "instance_name" in (refused.value.details() or "")
    assert client.missing(client.digest(data)) == [client.digest(data).hash]


@pytest.mark.parametrize("name", HASHES)
def test_every_advertised_digest_function(client: IndependentClient, unique_bytes: UniqueBytes, name: str) -> None:
    stub: Any = client.api.reapi_stubs.CapabilitiesStub(client.cas_channel)
    offered = stub.GetCapabilities(client.api.reapi.GetCapabilitiesRequest(instance_name=INSTANCE))
    function = client.api.reapi.DigestFunction.Value.Value(name)
    assert function in offered.cache_capabilities.digest_functions
    data = unique_bytes(300)
    hash_ = hashlib.new(HASHES[name], data).hexdigest()

    # By the length of the hash alone, as the API wants it for these functions.
    assert client.write(f"{INSTANCE}/uploads/{uuid.uuid4()}/blobs/{hash_}/300", data) == 300
    assert client.read(f"{INSTANCE}/blobs/{HASHES[name]}/{hash_}/300") == data
    request = client.api.reapi.FindMissingBlobsRequest(
        instance_name=INSTANCE, blob_digests=[{"hash": hash_, "size_bytes": 300}], digest_function=function
    )
    assert not client.cas.FindMissingBlobs(request).missing_blob_digests
