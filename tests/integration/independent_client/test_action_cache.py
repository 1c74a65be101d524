"""GetActionResult and UpdateActionResult, at the CAS and through the scheduler."""

from typing import Any

import grpc
import pytest
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes


@pytest.fixture(params=["cas", "scheduler"])
def action_cache(request: pytest.FixtureRequest, client: IndependentClient) -> Any:
    return client.action_cache if request.param == "cas" else client.proxied_action_cache


def get(client: IndependentClient, action_cache: Any, action_digest: Any, **fields: Any) -> Any:
    request = client.api.reapi.GetActionResultRequest(
        **{"instance_name": INSTANCE, "action_digest": action_digest, **fields}
    )
    return action_cache.GetActionResult(request)


def update(client: IndependentClient, action_cache: Any, action_digest: Any, result: Any, **fields: Any) -> Any:
    request = client.api.reapi.UpdateActionResultRequest(
        **{"instance_name": INSTANCE, "action_digest": action_digest, "action_result": result, **fields}
    )
    return action_cache.UpdateActionResult(request)


def complete_result(client: IndependentClient, unique_bytes: UniqueBytes) -> Any:
    """A result with every kind of output, all of which the CAS has."""
    output, stdout, leaf = unique_bytes(200), unique_bytes(201), unique_bytes(202)
    directory = client.api.reapi.Directory(files=[{"name": "leaf", "digest": client.digest(leaf)}])
    tree = client.api.reapi.Tree(root=directory).SerializeToString()
    client.store(output, stdout, leaf, tree)
    result = client.api.reapi.ActionResult(
        output_files=[{"path": "out", "digest": client.digest(output), "is_executable": True}],
        output_directories=[{"path": "dir", "tree_digest": client.digest(tree)}],
        output_symlinks=[{"path": "link", "target": "out"}],
        output_file_symlinks=[{"path": "link", "target": "out"}],
        exit_code=3,
        stdout_digest=client.digest(stdout),
        stderr_raw=b"\x00\xff not text",
    )
    result.execution_metadata.worker = "somebody's worker"
    result.execution_metadata.execution_start_timestamp.FromNanoseconds(1_700_000_000_123_456_789)
    return result


def test_a_result_comes_back_as_it_was_given(
    client: IndependentClient, action_cache: Any, unique_bytes: UniqueBytes
) -> None:
    action_digest, result = client.digest(unique_bytes(150)), complete_result(client, unique_bytes)

    # Nanoseconds included, which the service's own message classes don't have.
    assert update(client, action_cache, action_digest, result) == result
    assert get(client, action_cache, action_digest) == result
    assert get(client, client.action_cache, action_digest) == result


def test_a_second_result_takes_the_place_of_the_first(
    client: IndependentClient, action_cache: Any, unique_bytes: UniqueBytes
) -> None:
    action_digest = client.digest(unique_bytes(150))
    update(client, action_cache, action_digest, client.api.reapi.ActionResult(exit_code=1))
    update(client, action_cache, action_digest, client.api.reapi.ActionResult(exit_code=2))

    assert get(client, action_cache, action_digest).exit_code == 2


def test_an_empty_result(client: IndependentClient, action_cache: Any, unique_bytes: UniqueBytes) -> None:
    action_digest = client.digest(unique_bytes(150))
    update(client, action_cache, action_digest, client.api.reapi.ActionResult())

    assert get(client, action_cache, action_digest) == client.api.reapi.ActionResult()


def test_an_unknown_action_is_not_found(
    client: IndependentClient, action_cache: Any, unique_bytes: UniqueBytes
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        get(client, action_cache, client.digest(unique_bytes(150)))

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_instance_name_is_part_of_the_key(
    client: IndependentClient, action_cache: Any, unique_bytes: UniqueBytes
) -> None:
    action_digest = client.digest(unique_bytes(150))
    update(client, action_cache, action_digest, client.api.reapi.ActionResult(exit_code=1))

    with pytest.raises(grpc.RpcError) as refused:
        get(client, action_cache, action_digest, instance_name="main/other")

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("kind", ["output_files", "output_directories", "stdout_digest", "stderr_digest", "leaf"])
def test_a_result_with_an_absent_blob_is_a_miss(
    client: IndependentClient, unique_bytes: UniqueBytes, kind: str
) -> None:
    absent = client.digest(unique_bytes(300))
    result = complete_result(client, unique_bytes)
    if kind == "output_files":
        result.output_files.add(path="gone", digest=absent)
    elif kind == "output_directories":
        result.output_directories.add(path="gone", tree_digest=absent)
    elif kind == "leaf":
        tree = client.api.reapi.Tree(children=[{"files": [{"name": "gone", "digest": absent}]}])
        result.output_directories.add(path="tree", tree_digest=client.store(tree.SerializeToString())[0])
    else:
        getattr(result, kind).CopyFrom(absent)
    action_digest = client.digest(unique_bytes(150))

    try:
        update(client, client.action_cache, action_digest, result)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION  # noqa: PT017 # the API lets a server refuse it
    with pytest.raises(grpc.RpcError) as refused:
        get(client, client.action_cache, action_digest)

    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_wanting_outputs_inline_is_no_error(
    client: IndependentClient, action_cache: Any, unique_bytes: UniqueBytes
) -> None:
    action_digest, result = client.digest(unique_bytes(150)), complete_result(client, unique_bytes)
    update(client, action_cache, action_digest, result)

    got = get(client, action_cache, action_digest, inline_stdout=True, inline_stderr=True, inline_output_files=["out"])

    assert got.stdout_digest == result.stdout_digest
    assert got.output_files[0].digest == result.output_files[0].digest
