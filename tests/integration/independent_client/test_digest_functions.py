"""Digest functions other than SHA-256, from uploads to executed actions, as a stranger uses them."""

import hashlib
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from blake3 import blake3
from tests.integration.independent_client.actions import Actions
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes

from lathe_shared.sha256_tree import Sha256Tree

Hash = Callable[[bytes], str]


def tree_hash(data: bytes) -> str:
    tree = Sha256Tree()  # its own tests hold it against REAPI's values
    tree.update(data)
    return tree.hexdigest()


HASHES: dict[str, Hash] = {
    "SHA1": lambda data: hashlib.sha1(data).hexdigest(),
    "MD5": lambda data: hashlib.md5(data).hexdigest(),
    "SHA384": lambda data: hashlib.sha384(data).hexdigest(),
    "SHA512": lambda data: hashlib.sha512(data).hexdigest(),
    "SHA256TREE": tree_hash,
    "BLAKE3": lambda data: blake3(data).hexdigest(),
}


class Typed:
    """Digests and requests by one function."""

    def __init__(self, client: IndependentClient, name: str) -> None:
        self.client = client
        self.hash = HASHES[name]
        self.function = client.api.reapi.DigestFunction.Value.Value(name)
        # Spec: on resource names; the function is left out where the hash's length tells it.
        self.segment = f"{name.lower()}/" if name in ("SHA256TREE", "BLAKE3") else ""

    def digest(self, data: bytes) -> Any:
        return self.client.api.reapi.Digest(hash=self.hash(data), size_bytes=len(data))

    def name(self, data: bytes) -> str:
        return f"blobs/{self.segment}{self.hash(data)}/{len(data)}"

    def store(self, *blobs: bytes) -> list[Any]:
        digests = [self.digest(data) for data in blobs]
        request = self.client.api.reapi.BatchUpdateBlobsRequest(
            instance_name=INSTANCE,
            requests=[{"digest": digest, "data": data} for digest, data in zip(digests, blobs, strict=True)],
            digest_function=self.function,
        )
        answer = self.client.cas.BatchUpdateBlobs(request)
        assert [response.status.code for response in answer.responses] == [0] * len(blobs), answer
        return digests

    def missing(self, *digests: Any) -> list[str]:
        request = self.client.api.reapi.FindMissingBlobsRequest(
            instance_name=INSTANCE, blob_digests=digests, digest_function=self.function
        )
        return [digest.hash for digest in self.client.cas.FindMissingBlobs(request).missing_blob_digests]


@pytest.fixture(params=HASHES)
def typed(client: IndependentClient, request: pytest.FixtureRequest) -> Typed:
    return Typed(client, request.param)


def test_blobs_go_there_and_back(client: IndependentClient, typed: Typed, unique_bytes: UniqueBytes) -> None:
    small, large = unique_bytes(2000), unique_bytes(3_000_000)
    assert client.write(f"{INSTANCE}/uploads/{uuid.uuid4()}/{typed.name(large)}", large) == len(large)
    typed.store(small)

    assert typed.missing(typed.digest(small), typed.digest(large), typed.digest(b"")) == []
    assert client.read(f"{INSTANCE}/{typed.name(large)}") == large
    assert client.read(f"{INSTANCE}/{typed.name(small)}", offset=10, limit=5) == small[10:15]
    # The function is a part of the identity.
    assert client.missing(client.digest(small)) == [client.digest(small).hash]


def test_bytes_that_are_another_blob_s_are_refused(
    client: IndependentClient, typed: Typed, unique_bytes: UniqueBytes
) -> None:
    data = unique_bytes(5000)
    with pytest.raises(grpc.RpcError) as refused:
        client.write(f"{INSTANCE}/uploads/{uuid.uuid4()}/{typed.name(data)}", data[:-1] + b"x")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert typed.missing(typed.digest(data)) == [typed.hash(data)]


def test_actions_run_by_it(
    client: IndependentClient, typed: Typed, actions: Actions, unique_bytes: UniqueBytes
) -> None:
    reapi = client.api.reapi
    source = unique_bytes(5000)
    root = reapi.Directory()
    root.files.add(name="source", digest=typed.digest(source))
    root_bytes = root.SerializeToString()
    command = reapi.Command(
        arguments=["/bin/sh", "-c", "mkdir out && cat source source > out/twice"], output_paths=["out"]
    ).SerializeToString()
    action = reapi.Action(command_digest=typed.digest(command), input_root_digest=typed.digest(root_bytes))
    *_, action_digest = typed.store(source, root_bytes, command, action.SerializeToString())

    response = actions.execute(action_digest, digest_function=typed.function)

    assert response.status.code == 0, response
    assert response.result.exit_code == 0, response
    (folder,) = response.result.output_directories
    tree_name = f"{INSTANCE}/blobs/{typed.segment}{folder.tree_digest.hash}/{folder.tree_digest.size_bytes}"
    tree = reapi.Tree.FromString(client.read(tree_name))
    assert tree.root.files[0].digest == typed.digest(source * 2)
    assert client.read(f"{INSTANCE}/{typed.name(source * 2)}") == source * 2
    assert actions.execute(action_digest, digest_function=typed.function).cached_result


def test_a_function_of_its_hash_s_length_is_not_taken_for_sha_256(
    client: IndependentClient, unique_bytes: UniqueBytes
) -> None:
    data = unique_bytes(300)
    typed = Typed(client, "BLAKE3")
    with pytest.raises(grpc.RpcError) as refused:
        client.write(f"{INSTANCE}/uploads/{uuid.uuid4()}/blobs/{typed.hash(data)}/300", data)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_what_no_server_here_computes_is_refused_by_name(client: IndependentClient) -> None:
    request = client.api.reapi.FindMissingBlobsRequest(
        instance_name=INSTANCE, blob_digests=[client.digest(b"x")], digest_function=client.api.reapi.DigestFunction.VSO
    )
    with pytest.raises(grpc.RpcError, match=r"VSO is not one of SHA256, .*BLAKE3") as refused:
        client.cas.FindMissingBlobs(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
