"""FindMissingBlobs, BatchUpdateBlobs, BatchReadBlobs and GetTree, as a stranger calls them."""

from typing import Any

import grpc
import pytest
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes


def batch_update(client: IndependentClient, *blobs: tuple[Any, bytes]) -> Any:
    requests = [{"digest": digest, "data": data} for digest, data in blobs]
    return client.cas.BatchUpdateBlobs(
        client.api.reapi.BatchUpdateBlobsRequest(instance_name=INSTANCE, requests=requests)
    )


def batch_read(client: IndependentClient, *digests: Any) -> Any:
    return client.cas.BatchReadBlobs(client.api.reapi.BatchReadBlobsRequest(instance_name=INSTANCE, digests=digests))


def max_batch_bytes(client: IndependentClient) -> int:
    stub: Any = client.api.reapi_stubs.CapabilitiesStub(client.cas_channel)
    capabilities = stub.GetCapabilities(client.api.reapi.GetCapabilitiesRequest(instance_name=INSTANCE))
    return int(capabilities.cache_capabilities.max_batch_total_size_bytes)


def test_find_missing_blobs_returns_the_absent_ones(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    there, absent = unique_bytes(200), unique_bytes(300)
    client.store(there)

    missing = client.missing(client.digest(there), client.digest(absent), client.digest(b""))

    assert missing == [client.digest(absent).hash]


def test_find_missing_blobs_of_a_thousand(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    blobs = [unique_bytes(150) for _ in range(1000)]
    client.store(*blobs[::2])

    missing = client.missing(*map(client.digest, blobs))

    assert missing == [client.digest(data).hash for data in blobs[1::2]]


def test_a_digest_with_another_size_is_another_blob(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    (digest,) = client.store(unique_bytes(200))
    other = client.api.reapi.Digest(hash=digest.hash, size_bytes=digest.size_bytes + 1)

    assert client.missing(other) == [other.hash]


def test_a_batch_is_read_as_it_was_written(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    blobs = [b"", *(unique_bytes(size) for size in (128, 65_519, 65_520, 65_521, 300_000))]
    digests = client.store(*blobs)

    responses = batch_read(client, *digests).responses

    assert [response.status.code for response in responses] == [0] * len(blobs)
    assert {response.digest.hash: response.data for response in responses} == {
        digest.hash: data for digest, data in zip(digests, blobs, strict=True)
    }


def test_one_wrong_blob_leaves_the_rest_of_its_batch_alone(
    client: IndependentClient, unique_bytes: UniqueBytes
) -> None:
    right, promised, malformed = unique_bytes(200), unique_bytes(201), client.api.reapi.Digest(hash="x", size_bytes=3)

    answer = batch_update(
        client, (client.digest(promised), b"something else"), (malformed, b"abc"), (client.digest(right), right)
    )

    codes = {response.digest.hash: response.status.code for response in answer.responses}
    invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert codes == {client.digest(promised).hash: invalid, "x": invalid, client.digest(right).hash: 0}
    assert client.missing(client.digest(promised), client.digest(right)) == [client.digest(promised).hash]


def test_reading_an_absent_blob_in_a_batch(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    there, absent = unique_bytes(200), unique_bytes(201)
    client.store(there)

    answer = batch_read(client, client.digest(absent), client.digest(there))

    found = {response.digest.hash: (response.status.code, response.data) for response in answer.responses}
    assert found == {
        client.digest(absent).hash: (grpc.StatusCode.NOT_FOUND.value[0], b""),
        client.digest(there).hash: (0, there),
    }


def test_a_batch_as_large_as_advertised_is_taken(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    half = max_batch_bytes(client) // 2
    blobs = [unique_bytes(half), unique_bytes(half)]

    digests = client.store(*blobs)

    assert sorted(response.data for response in batch_read(client, *digests).responses) == sorted(blobs)


def test_a_larger_batch_is_refused_as_a_whole(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    limit = max_batch_bytes(client)
    blobs = [unique_bytes(limit // 2), unique_bytes(limit // 2), unique_bytes(200)]

    with pytest.raises(grpc.RpcError) as refused:
        batch_update(client, *((client.digest(data), data) for data in blobs))

    # Spec: BatchUpdateBlobs, INVALID_ARGUMENT for more than the server supports.
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(limit) in (refused.value.details() or "")
    assert len(client.missing(*map(client.digest, blobs))) == len(blobs)


def test_a_batch_far_beyond_all_limits_is_refused(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    data = unique_bytes(64 << 20)

    with pytest.raises(grpc.RpcError) as refused:
        batch_update(client, (client.digest(data), data))

    assert refused.value.code() in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT}
    assert client.missing(client.digest(data)) == [client.digest(data).hash]


def test_reading_more_than_a_batch_holds_is_refused(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    limit = max_batch_bytes(client)
    digests = [client.store(unique_bytes(limit // 2 + 1))[0] for _ in range(2)]

    with pytest.raises(grpc.RpcError) as refused:
        batch_read(client, *digests)

    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


class TestGetTree:
    @pytest.fixture
    def tree(self, client: IndependentClient, unique_bytes: UniqueBytes) -> dict[str, Any]:
        """A root with 20 directories, each with one of its own, all holding one more that is the same for all."""
        reapi = client.api.reapi
        directories = [
            reapi.Directory(files=[{"name": "leaf", "digest": client.digest(b"not stored, and not asked for")}])
        ]
        (shared,) = client.store(directories[0].SerializeToString())
        children = []
        for index in range(20):
            name = unique_bytes(200).decode()
            inner = reapi.Directory(directories=[{"name": "shared", "digest": shared}])
            inner.symlinks.add(name=name, target="shared")
            (inner_digest,) = client.store(inner.SerializeToString())
            outer = reapi.Directory(
                directories=[{"name": "inner", "digest": inner_digest}, {"name": "shared", "digest": shared}]
            )
            (outer_digest,) = client.store(outer.SerializeToString())
            children.append({"name": f"child{index:02}", "digest": outer_digest})
            directories += [inner, outer]
        root = reapi.Directory(directories=children)
        (root_digest,) = client.store(root.SerializeToString())
        return {"root": root, "digest": root_digest, "all": [root, *directories]}

    def get_tree(self, client: IndependentClient, **fields: Any) -> list[Any]:
        request = client.api.reapi.GetTreeRequest(**{"instance_name": INSTANCE, **fields})
        return list(client.cas.GetTree(request))

    @staticmethod
    def encoded(directories: list[Any]) -> set[bytes]:
        return {directory.SerializeToString() for directory in directories}

    def test_returns_every_directory_with_the_root_first(self, client: IndependentClient, tree: dict[str, Any]) -> None:
        pages = self.get_tree(client, root_digest=tree["digest"])

        directories = [directory for page in pages for directory in page.directories]
        assert directories[0] == tree["root"]
        assert self.encoded(directories) == self.encoded(tree["all"])
        assert pages[-1].next_page_token == ""

    def test_no_page_is_larger_than_asked_for(self, client: IndependentClient, tree: dict[str, Any]) -> None:
        pages = self.get_tree(client, root_digest=tree["digest"], page_size=7)

        assert {len(page.directories) <= 7 for page in pages} == {True}
        directories = [directory for page in pages for directory in page.directories]
        assert self.encoded(directories) == self.encoded(tree["all"])

    def test_goes_on_from_a_page_token(self, client: IndependentClient, tree: dict[str, Any]) -> None:
        first, *_ = self.get_tree(client, root_digest=tree["digest"], page_size=5)
        assert first.next_page_token

        rest = self.get_tree(client, root_digest=tree["digest"], page_size=5, page_token=first.next_page_token)

        directories = [directory for page in [first, *rest] for directory in page.directories]
        assert self.encoded(directories) == self.encoded(tree["all"])
        assert tree["root"] not in [directory for page in rest for directory in page.directories]

    def test_omits_a_subtree_that_is_not_there(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        absent = client.digest(unique_bytes(200))
        root = client.api.reapi.Directory(directories=[{"name": "gone", "digest": absent}])
        (digest,) = client.store(root.SerializeToString())

        (page,) = self.get_tree(client, root_digest=digest)

        assert list(page.directories) == [root]

    def test_an_absent_root_is_not_found(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            self.get_tree(client, root_digest=client.digest(unique_bytes(200)))

        assert refused.value.code() == grpc.StatusCode.NOT_FOUND

    @pytest.mark.parametrize("token", ["no token of ours", "💥" * 50, "a" * 10_000], ids=["text", "emoji", "long"])
    def test_a_made_up_page_token_is_refused(self, client: IndependentClient, tree: dict[str, Any], token: str) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            self.get_tree(client, root_digest=tree["digest"], page_token=token)

        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "page_token" in (refused.value.details() or "")

    def test_a_blob_that_is_no_directory_is_refused(self, client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        (digest,) = client.store(b"\xff" + unique_bytes(200))

        with pytest.raises(grpc.RpcError) as refused:
            self.get_tree(client, root_digest=digest)

        assert refused.value.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
