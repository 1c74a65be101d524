"""Messages in encodings that protobuf allows and hardly any client uses: the answers are those to the usual ones."""

from typing import Any

import pytest
from tests.integration.independent_client.actions import Actions
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes
from tests.integration.independent_client.every_rpc import RPCS, EveryRpc
from tests.integration.independent_client.odd_encoding import odd_encoding


@pytest.mark.parametrize("name", RPCS)
def test_requests(client: IndependentClient, unique_bytes: UniqueBytes, name: str) -> None:
    rpc = EveryRpc(client, unique_bytes(300)).rpc(name)
    plain, odd = rpc.requests(), [odd_encoding(request) for request in rpc.requests()]
    # The encoding itself is right if google-protobuf reads it as the same fields, but for the names that are fresh.
    for message, encoded in zip(plain, odd, strict=True):
        decoded = rpc.request_class.FromString(encoded)
        decoded.DiscardUnknownFields()
        for fresh in {"name", "resource_name"} & set(message.DESCRIPTOR.fields_by_name):
            setattr(decoded, fresh, getattr(message, fresh))
        assert decoded == message

    expected = rpc.plain_call()

    assert rpc.comparable(rpc.call(odd)) == expected


def test_actions_commands_and_directories(client: IndependentClient, actions: Actions) -> None:
    """All are read by the scheduler and again by the worker, and their digests are over the bytes as they are."""
    reapi = client.api.reapi

    def store(message: Any) -> Any:
        return client.store(odd_encoding(message))[0]

    (leaf,) = client.store(b"leaf")
    below = store(reapi.Directory(files=[{"name": "leaf.sh", "digest": leaf, "is_executable": True}]))
    root = store(
        reapi.Directory(
            files=[{"name": "top", "digest": leaf}, {"name": "top2", "digest": leaf}],
            directories=[{"name": "below", "digest": below}],
            symlinks=[{"name": "link", "target": "below"}],
        )
    )
    command = store(
        reapi.Command(
            arguments=["/bin/sh", "-c", "cat link/leaf.sh ../top* > $OUT; test -x leaf.sh && echo $A $OUT; exit $CODE"],
            environment_variables=[
                {"name": name, "value": value} for name, value in (("A", "1"), ("CODE", "3"), ("OUT", "out"))
            ],
            output_paths=["out", "never"],
            working_directory="below",
        )
    )
    action = reapi.Action(command_digest=command, input_root_digest=root, timeout={"seconds": 60}, do_not_cache=True)
    action.platform.properties.add(name="cpu_count", value="1")

    result = actions.execute(store(action)).result

    assert (result.exit_code, result.stdout_raw) == (3, b"1 out\n"), result
    assert [file.path for file in result.output_files] == ["out"]


def test_a_tree_that_an_action_result_names(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    """Whether a result is complete is known only by reading its Trees."""
    reapi = client.api.reapi
    leaf = unique_bytes(300)
    child = reapi.Directory(files=[{"name": "leaf", "digest": client.digest(leaf), "is_executable": True}])
    (child_digest,) = client.store(odd_encoding(child))
    tree = reapi.Tree(root={"directories": [{"name": "child", "digest": child_digest}]}, children=[child])
    (tree_digest,) = client.store(odd_encoding(tree))
    result = reapi.ActionResult(output_directories=[{"path": "out", "tree_digest": tree_digest}])
    action_digest = client.digest(unique_bytes(301))
    update = reapi.UpdateActionResultRequest(instance_name=INSTANCE, action_digest=action_digest, action_result=result)
    client.store(leaf)

    client.action_cache.UpdateActionResult(update)

    get = reapi.GetActionResultRequest(instance_name=INSTANCE, action_digest=action_digest)
    assert client.action_cache.GetActionResult(get) == result


def test_directories_in_get_tree(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    reapi = client.api.reapi
    child = reapi.Directory(symlinks=[{"name": unique_bytes(200).decode(), "target": "x"}])
    (child_digest,) = client.store(odd_encoding(child))
    root = reapi.Directory(
        directories=[{"name": "child", "digest": child_digest}], symlinks=[{"name": "x", "target": "y"}]
    )
    (root_digest,) = client.store(odd_encoding(root))

    (page,) = client.cas.GetTree(reapi.GetTreeRequest(instance_name=INSTANCE, root_digest=root_digest))

    # Not re-encoded: their digests are over these bytes.
    got = [directory.SerializeToString() for directory in page.directories]
    page.DiscardUnknownFields()
    assert list(page.directories) == [root, child]
    assert len(got[0]) > len(root.SerializeToString())
