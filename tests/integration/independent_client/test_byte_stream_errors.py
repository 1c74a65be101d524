"""ByteStream when something is wrong: the answers say what, and nothing wrong is ever stored."""

from typing import Any

import grpc
import pytest
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes

HASH = "0123456789abcdef" * 4
UPLOAD = "uploads/12345678-1234-4234-8234-123456789abc"

MALFORMED = {
    "nothing": "",
    "slashes": "////",
    "no size": f"{INSTANCE}/blobs/{HASH}",
    "no hash": f"{INSTANCE}/blobs/5",
    "short hash": f"{INSTANCE}/blobs/abc/5",
    "upper case": f"{INSTANCE}/blobs/{HASH.upper()}/5",
    "not hexadecimal": f"{INSTANCE}/blobs/{'x' * 64}/5",
    "negative size": f"{INSTANCE}/blobs/{HASH}/-5",
    "size with a sign": f"{INSTANCE}/blobs/{HASH}/+5",
    "size that is no number": f"{INSTANCE}/blobs/{HASH}/five",
    "size in other digits": f"{INSTANCE}/blobs/{HASH}/\u0665",
    "size beyond int64": f"{INSTANCE}/blobs/{HASH}/{2**63}",
    "unknown digest function": f"{INSTANCE}/blobs/whirlpool/{HASH}/5",
    "compressor that is not offered": f"{INSTANCE}/compressed-blobs/deflate/{HASH}/5",
    "another word": f"{INSTANCE}/files/{HASH}/5",
}


def refusal(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value


def fields(client: IndependentClient, error: grpc.RpcError) -> list[str]:
    """Return the request's fields that an INVALID_ARGUMENT names; its text names them, too."""
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    (bad_request,) = client.details(error)
    names = [violation.field for violation in bad_request.field_violations]
    assert all(name in (error.details() or "") for name in names)
    # A resource name has parts of its own: resource_name.hash.
    return [name.partition(".")[0] for name in names]


class TestMalformedResourceNames:
    @pytest.mark.parametrize("name", MALFORMED.values(), ids=MALFORMED)
    def test_in_a_read(self, client: IndependentClient, name: str) -> None:
        assert fields(client, refusal(lambda: client.read(name))) == ["resource_name"]

    @pytest.mark.parametrize("name", MALFORMED.values(), ids=MALFORMED)
    def test_in_a_write(self, client: IndependentClient, name: str) -> None:
        upload = name.replace(INSTANCE, f"{INSTANCE}/{UPLOAD}", 1)

        assert fields(client, refusal(lambda: client.write(upload, b"12345"))) == ["resource_name"]

    @pytest.mark.parametrize("name", MALFORMED.values(), ids=MALFORMED)
    def test_in_a_question_for_a_write(self, client: IndependentClient, name: str) -> None:
        request = client.api.bytestream.QueryWriteStatusRequest(
            resource_name=name.replace(INSTANCE, f"{INSTANCE}/{UPLOAD}", 1)
        )

        assert fields(client, refusal(lambda: client.bytestream.QueryWriteStatus(request))) == ["resource_name"]

    def test_an_upload_without_an_id(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(200)
        name = f"{INSTANCE}/uploads//blobs/{client.blob_name(data)}"

        assert fields(client, refusal(lambda: client.write(name, data))) == ["resource_name"]
        assert client.missing(client.digest(data)) == [client.digest(data).hash]

    def test_writing_what_can_only_be_read_and_the_other_way_round(
        self, client: IndependentClient, unique_bytes: UniqueBytes
    ) -> None:
        data = unique_bytes(200)
        client.store(data)

        assert fields(client, refusal(lambda: client.write(client.read_name(data), data))) == ["resource_name"]
        # To a read, what stands before blobs/ is the name of an instance, and none may have such words.
        assert fields(client, refusal(lambda: client.read(client.upload_name(data)))) == ["instance_name"]


class TestBytesThatAreNotTheBlob:
    @pytest.mark.parametrize("change", ["other bytes", "one too few", "one too many", "none at all"])
    @pytest.mark.parametrize("size", [300, 3 << 20])
    def test_are_refused_and_not_stored(
        self, client: IndependentClient, unique_bytes: UniqueBytes, change: str, size: int
    ) -> None:
        data = unique_bytes(size)
        sent = {
            "other bytes": data[:-1] + b"\xff",
            "one too few": data[:-1],
            "one too many": data + b"\xff",
            "none at all": b"",
        }[change]
        name = client.upload_name(data)

        assert fields(client, refusal(lambda: client.write(name, sent)))
        assert client.missing(client.digest(data)) == [client.digest(data).hash]
        assert refusal(lambda: client.read(client.read_name(data))).code() == grpc.StatusCode.NOT_FOUND
        # The right bytes are taken afterwards, under the same name.
        assert client.write(name, data) == size
        assert client.read(client.read_name(data)) == data

    def test_a_right_hash_with_a_wrong_size(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(300)
        name = client.upload_name(data).replace("/300", "/299")

        assert fields(client, refusal(lambda: client.write(name, data)))
        assert client.missing(client.digest(data)) == [client.digest(data).hash]

    def test_an_offset_that_leaves_a_gap(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(300)

        error = refusal(lambda: client.write(client.upload_name(data), data, offset=100))

        assert fields(client, error) == ["write_offset"]
        assert client.missing(client.digest(data)) == [client.digest(data).hash]


class TestReading:
    def test_what_is_not_there(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(200)

        error = refusal(lambda: client.read(client.read_name(data)))

        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert client.blob_name(data) in (error.details() or "")

    def test_from_beyond_the_end(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(200)
        client.store(data)

        # Spec: ReadRequest.read_offset.
        assert refusal(lambda: client.read(client.read_name(data), 201)).code() == grpc.StatusCode.OUT_OF_RANGE

    def test_from_before_the_beginning(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(200)
        client.store(data)

        # Spec: ReadRequest.read_offset.
        error = refusal(lambda: client.read(client.read_name(data), -1))
        assert error.code() == grpc.StatusCode.OUT_OF_RANGE
        assert "read_offset" in (error.details() or "")

    def test_fewer_bytes_than_none(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(200)
        client.store(data)

        assert fields(client, refusal(lambda: client.read(client.read_name(data), 0, -1))) == ["read_limit"]
