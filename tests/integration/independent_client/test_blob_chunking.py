"""SplitBlob and SpliceBlob, as a stranger calls them."""

import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes

# Bounds of the chunks by the advertised average of 512 KiB; the last one may be smaller.
MIN_BYTES, MAX_BYTES = 128 << 10, 2 << 20


def split(client: IndependentClient, digest: Any, **fields: Any) -> Any:
    request = client.api.reapi.SplitBlobRequest(instance_name=INSTANCE, blob_digest=digest, **fields)
    return client.cas.SplitBlob(request)


def splice(client: IndependentClient, digest: Any, chunks: list[Any], **fields: Any) -> Any:
    request = client.api.reapi.SpliceBlobRequest(
        instance_name=INSTANCE, blob_digest=digest, chunk_digests=chunks, **fields
    )
    return client.cas.SpliceBlob(request)


def read_chunks(client: IndependentClient, chunks: list[Any]) -> list[bytes]:
    return [client.read(f"{INSTANCE}/blobs/{chunk.hash}/{chunk.size_bytes}") for chunk in chunks]


@pytest.fixture
def large(unique_bytes: UniqueBytes) -> bytes:
    """Make a blob that no other test has, and whose content does not repeat."""
    return random.Random(unique_bytes(200)).randbytes(9 << 20)


def test_a_blob_is_split_fetched_in_chunks_and_spliced_elsewhere(client: IndependentClient, large: bytes) -> None:
    client.write(client.upload_name(large), large)
    fast_cdc = client.api.reapi.ChunkingFunction.FAST_CDC_2020

    answer = split(client, client.digest(large), chunking_function=fast_cdc)

    assert answer.chunking_function == fast_cdc
    chunks = list(answer.chunk_digests)
    assert len(chunks) > 4
    assert all(MIN_BYTES <= chunk.size_bytes <= MAX_BYTES for chunk in chunks[:-1])
    assert b"".join(read_chunks(client, chunks)) == large
    assert split(client, client.digest(large)) == answer

    # A blob that differs in its middle shares all chunks but those around it.
    changed = large[: 4 << 20] + b"changed" + large[4 << 20 :]
    client.write(client.upload_name(changed), changed)
    others = list(split(client, client.digest(changed)).chunk_digests)
    assert len({chunk.hash for chunk in others} - {chunk.hash for chunk in chunks}) <= 2

    joined = large + changed
    spliced = splice(client, client.digest(joined), chunks + others)
    assert spliced.blob_digest == client.digest(joined)
    assert client.read(client.read_name(joined)) == joined
    assert list(split(client, client.digest(joined)).chunk_digests) == chunks + others


def test_a_blob_that_is_not_there(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    absent = client.digest(unique_bytes(200))

    with pytest.raises(grpc.RpcError) as refused:
        split(client, absent)

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert absent.hash in str(refused.value.details())


def test_a_chunk_that_is_not_there(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    there, absent = unique_bytes(200), unique_bytes(201)
    client.store(there)

    with pytest.raises(grpc.RpcError) as refused:
        splice(client, client.digest(there + absent), [client.digest(there), client.digest(absent)])

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert client.digest(absent).hash in str(refused.value.details())
    assert client.missing(client.digest(there + absent)) != []


def test_chunks_of_another_blob(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    first, second = unique_bytes(200), unique_bytes(200)
    chunks = client.store(first, second)

    with pytest.raises(grpc.RpcError) as refused:
        splice(client, client.digest(first + second), chunks[::-1])

    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert client.missing(client.digest(first + second)) != []


def test_what_is_wrong_with_a_request_is_named(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    (chunk,) = client.store(unique_bytes(200))
    odd = client.api.reapi.Digest(hash="ABC", size_bytes=3)
    wrong: dict[str, list[Callable[[], Any]]] = {
        "blob_digest.hash": [lambda: split(client, None), lambda: splice(client, None, [chunk])],
        "chunk_digests[1].hash": [lambda: splice(client, chunk, [chunk, odd])],
        "chunk_digests": [lambda: splice(client, chunk, []), lambda: splice(client, chunk, [chunk, chunk])],
        "digest_function": [lambda: split(client, chunk, digest_function=4)],
    }

    for field, calls in wrong.items():
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            (detail,) = client.details(refused.value)
            assert [violation.field for violation in detail.field_violations] == [field]
