"""Execute and WaitExecution on a real worker, as a stranger calls them."""

from typing import Any

import grpc
import pytest
from tests.integration.independent_client.actions import Actions
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes
from tests.support.cluster import Cluster
from tests.support.waiting import eventually

# Longer than any test waits: such an action ends by being killed, or its test fails.
ENDLESS = "echo begun; sleep 1000; echo ended"

# Spec: ExecutedActionMetadata; the order in which they come about.
TIMESTAMPS = (
    "queued",
    "worker_start",
    "input_fetch_start",
    "input_fetch_completed",
    "execution_start",
    "execution_completed",
    "output_upload_start",
    "output_upload_completed",
    "worker_completed",
)


@pytest.fixture
def actions(client: IndependentClient, unique_bytes: UniqueBytes) -> Actions:
    return Actions(client, unique_bytes(200))


def cached(client: IndependentClient, action_digest: Any) -> Any:
    """Look an action up in the action cache; None if it is not there."""
    request = client.api.reapi.GetActionResultRequest(instance_name=INSTANCE, action_digest=action_digest)
    try:
        return client.action_cache.GetActionResult(request)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        return None


def blob(client: IndependentClient, digest: Any) -> bytes:
    data = client.read(f"{INSTANCE}/blobs/{digest.hash}/{digest.size_bytes}")
    assert client.digest(data) == digest
    return data


def test_the_stages_of_an_execution(actions: Actions) -> None:
    digest = actions.store("cat name", inputs={"name": b"Lathe"})

    operations = list(actions.start(digest))

    assert {operation.name for operation in operations} == {operations[0].name}
    assert operations[0].name.startswith(f"{INSTANCE}/operations/")
    assert [operation.done for operation in operations] == [False] * (len(operations) - 1) + [True]
    assert {actions.metadata(operation).action_digest.hash for operation in operations} == {digest.hash}
    stages = list(dict.fromkeys(map(actions.stage, operations)))
    # A quick action may be over before its client hears that it runs.
    assert [stage for stage in stages if stage != "EXECUTING"] == ["CACHE_CHECK", "QUEUED", "COMPLETED"]
    # Spec: Execute; errors are in the response, never in Operation.error.
    response = actions.response(operations[-1])
    assert response.status.code == 0
    assert not response.cached_result
    assert response.result.stdout_raw == b"Lathe"


def test_results_say_who_ran_the_action_and_when(actions: Actions) -> None:
    metadata = actions.run("true; true", inputs={"a": b"b"}).execution_metadata

    assert metadata.worker
    times = [getattr(metadata, f"{name}_timestamp").ToNanoseconds() for name in TIMESTAMPS]
    assert times == sorted(times)
    assert times[0] > 0
    assert metadata.virtual_execution_duration.ToNanoseconds() > 0


class TestOutputs:
    SCRIPT = (
        "mkdir -p out/deep dir/sub/empty; echo plain > out/plain; echo run > out/deep/run; chmod +x out/deep/run;"
        " echo leaf > dir/sub/leaf; chmod +x dir/sub/leaf; echo top > dir/top; ln -s sub/leaf dir/link;"
        " ln -s plain out/link; ln -s ../dir out/link_to_dir; : > out/empty"
    )
    FILES = ("out/plain", "out/deep/run", "out/empty")
    LINKS = ("out/link", "out/link_to_dir")

    def check_files_and_directory(self, client: IndependentClient, result: Any) -> None:
        files = {file.path: (blob(client, file.digest), file.is_executable) for file in result.output_files}
        assert files == {"out/plain": (b"plain\n", False), "out/deep/run": (b"run\n", True), "out/empty": (b"", False)}
        (directory,) = result.output_directories
        assert directory.path == "dir"
        self.check_tree(client, client.api.reapi.Tree.FromString(blob(client, directory.tree_digest)))

    def check_tree(self, client: IndependentClient, tree: Any) -> None:
        children = {client.digest(child.SerializeToString()).hash: child for child in tree.children}
        (top,), (link,), (sub_node,) = tree.root.files, tree.root.symlinks, tree.root.directories
        assert (top.name, blob(client, top.digest), top.is_executable) == ("top", b"top\n", False)
        assert (link.name, link.target) == ("link", "sub/leaf")
        # Directories are written canonically: the bytes inside the Tree are those that their digests name.
        assert sub_node.name == "sub"
        sub = children.pop(sub_node.digest.hash)
        (leaf,), (empty_node,) = sub.files, sub.directories
        assert (leaf.name, blob(client, leaf.digest), leaf.is_executable) == ("leaf", b"leaf\n", True)
        assert children.pop(empty_node.digest.hash) == client.api.reapi.Directory()
        assert not children

    def test_by_output_paths(self, client: IndependentClient, actions: Actions) -> None:
        result = actions.run(self.SCRIPT, output_paths=[*self.FILES, *self.LINKS, "dir"])

        self.check_files_and_directory(client, result)
        links = {link.path: link.target for link in result.output_symlinks}
        assert links == {"out/link": "plain", "out/link_to_dir": "../dir"}
        assert not [*result.output_file_symlinks, *result.output_directory_symlinks]

    def test_by_output_files_and_output_directories(self, client: IndependentClient, actions: Actions) -> None:
        result = actions.run(
            self.SCRIPT, output_files=[*self.FILES, "out/link"], output_directories=["dir", "out/link_to_dir"]
        )

        self.check_files_and_directory(client, result)
        assert [(link.path, link.target) for link in result.output_file_symlinks] == [("out/link", "plain")]
        assert [link.path for link in result.output_directory_symlinks] == ["out/link_to_dir"]

    def test_paths_are_relative_to_the_working_directory(self, client: IndependentClient, actions: Actions) -> None:
        result = actions.run(
            'cp input ../up; mkdir "$WHERE"; cp input "$WHERE/down"',
            inputs={"here": {"input": b"input"}},
            working_directory="here",
            environment_variables=[{"name": "WHERE", "value": "below"}],
            output_paths=["../up", "below/down"],
        )

        assert {file.path: blob(client, file.digest) for file in result.output_files} == {
            "../up": b"input",
            "below/down": b"input",
        }

    def test_inputs_keep_their_exec_bits(self, actions: Actions) -> None:
        result = actions.run("./run.sh", inputs={"run.sh": b"#!/bin/sh\ntest ! -x data && echo ran", "data": b""})

        assert (result.exit_code, result.stdout_raw) == (0, b"ran\n")

    def test_one_that_was_not_made_is_left_out(self, actions: Actions) -> None:
        result = actions.run("echo x > made", output_paths=["made", "never", "nor/this"])

        assert result.exit_code == 0
        assert [file.path for file in result.output_files] == ["made"]
        assert not [*result.output_directories, *result.output_symlinks]

    def test_what_an_action_says(self, client: IndependentClient, actions: Actions) -> None:
        result = actions.run("echo little; printf 'not text \\377'; head -c 100000 /dev/zero >&2")

        assert result.stdout_raw == b"little\nnot text \xff"
        assert not result.stderr_raw
        assert blob(client, result.stderr_digest) == bytes(100_000)


class TestActionCache:
    COUNTED = "echo $$; date +%s%N"
    """Prints something else each time it runs."""

    def test_a_second_execution_is_answered_from_the_cache(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store(f"{self.COUNTED} | tee out", output_paths=["out"])
        first = actions.execute(digest)

        second = actions.execute(digest)

        assert (first.cached_result, second.cached_result) == (False, True)
        assert second.result == first.result == cached(client, digest)
        assert not client.missing(*(file.digest for file in second.result.output_files))

    def test_skipping_the_look_up_runs_it_again(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store(self.COUNTED)
        first = actions.execute(digest)

        second = actions.execute(digest, skip_cache_lookup=True)

        assert not second.cached_result
        assert second.result.stdout_raw != first.result.stdout_raw
        # Spec: ExecuteRequest.skip_cache_lookup; the result is remembered all the same.
        assert cached(client, digest) == second.result

    def test_what_must_not_be_cached_is_not(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store(self.COUNTED, do_not_cache=True)

        first, second = actions.execute(digest), actions.execute(digest)

        assert not first.cached_result
        assert not second.cached_result
        assert first.result.stdout_raw != second.result.stdout_raw
        assert cached(client, digest) is None

    def test_a_failure_is_a_result_and_is_not_cached(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store("echo said; echo why >&2; echo x > out; exit 3", output_paths=["out"])

        response = actions.execute(digest)

        assert response.status.code == 0
        result = response.result
        assert (result.exit_code, result.stdout_raw, result.stderr_raw) == (3, b"said\n", b"why\n")
        assert blob(client, result.output_files[0].digest) == b"x\n"
        assert cached(client, digest) is None
        assert not actions.execute(digest).cached_result

    def test_a_timeout_shows_what_was_printed_so_far(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store(ENDLESS, timeout={"seconds": 0, "nanos": 500_000_000})

        response = actions.execute(digest)

        # Spec: Execute; Bazel shows such a test as TIMEOUT.
        assert response.status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert "0.5" in response.status.message
        assert response.result.stdout_raw == b"begun\n"
        assert cached(client, digest) is None


class TestMissingBlobs:
    @pytest.fixture
    def blobs(self, client: IndependentClient, actions: Actions, unique_bytes: UniqueBytes) -> list[bytes]:
        """All that an action needs, not stored: deep, b, a, top, root, Command, Action."""
        deep, top, remark = unique_bytes(300), unique_bytes(301), unique_bytes(200).decode()
        return actions.blobs(f"cat top a/b/deep # {remark}", inputs={"a": {"b": {"deep": deep}}, "top": top})

    @pytest.mark.parametrize("place", range(7), ids=["deep", "b", "a", "top", "root", "command", "action"])
    def test_each_is_named(self, client: IndependentClient, actions: Actions, blobs: list[bytes], place: int) -> None:
        digests = [client.digest(data) for data in blobs]
        client.store(*blobs[:place], *blobs[place + 1 :])

        status = actions.execute(digests[-1]).status

        assert status.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert actions.missing_subjects(status) == {actions.subject(digests[place])}
        client.store(blobs[place])
        assert actions.execute(digests[-1]).result.stdout_raw == blobs[3] + blobs[0]

    def test_all_that_can_be_known_are_named_at_once(
        self, client: IndependentClient, actions: Actions, blobs: list[bytes]
    ) -> None:
        deep, b, a, top, root, command, action = blobs
        client.store(b, a, root, action)

        status = actions.execute(client.digest(action)).status

        assert actions.missing_subjects(status) == {
            actions.subject(client.digest(data)) for data in (deep, top, command)
        }


class TestWrongRequests:
    def refused(self, client: IndependentClient, operations: Any) -> tuple[str, list[str]]:
        """Let a call be refused as INVALID_ARGUMENT; return its text, and the fields that its details name."""
        with pytest.raises(grpc.RpcError) as refused:
            list(operations)
        error = refused.value
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        (bad_request,) = client.details(error)
        return error.details() or "", [violation.field for violation in bad_request.field_violations]

    def test_an_unknown_platform_property(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store("true; true", platform={"properties": [{"name": "left-handed", "value": "yes"}]})

        text, fields = self.refused(client, actions.start(digest))

        assert fields == ["platform.properties"]
        assert "'left-handed'" in text
        assert "cpu_count" in text

    @pytest.mark.parametrize(
        "digest",
        [
            {},
            {"hash": "x", "size_bytes": 3},
            {"hash": "A" * 64, "size_bytes": 3},
            {"hash": "a" * 64, "size_bytes": -1},
            {"hash": "a" * 65, "size_bytes": 3},
        ],
        ids=["absent", "short", "upper case", "negative size", "long"],
    )
    def test_a_malformed_digest(self, client: IndependentClient, actions: Actions, digest: dict[str, Any]) -> None:
        text, fields = self.refused(client, actions.start(digest))

        wrong = "size_bytes" if digest.get("size_bytes", 0) < 0 else "hash"
        assert fields == [f"action_digest.{wrong}"]
        assert fields[0] in text

    def test_an_action_that_is_none(
        self, client: IndependentClient, actions: Actions, unique_bytes: UniqueBytes
    ) -> None:
        (digest,) = client.store(b"\xff" + unique_bytes(200))

        text, _ = self.refused(client, actions.start(digest))

        assert digest.hash in text

    def test_a_command_without_arguments(self, client: IndependentClient, actions: Actions) -> None:
        text, (field,) = self.refused(client, actions.start(actions.store()))

        assert "arguments" in field
        assert "arguments" in text


def test_a_cancelled_execution_ends_for_everyone_who_waits(
    client: IndependentClient, actions: Actions, cluster: Cluster
) -> None:
    digest = actions.store(ENDLESS)
    executing = actions.start(digest)
    operation = actions.until_stage(executing, "EXECUTING")[-1]
    assert actions.metadata(operation).partial_execution_metadata.worker
    assert actions.metadata(operation).partial_execution_metadata.HasField("execution_start_timestamp")
    waiting = actions.wait(operation.name)
    assert actions.stage(next(waiting)) == "EXECUTING"

    client.operations.CancelOperation(client.api.operations.CancelOperationRequest(name=operation.name))

    ends = [list(stream)[-1] for stream in (executing, waiting)]
    assert [actions.response(end).status.code for end in ends] == [grpc.StatusCode.CANCELLED.value[0]] * 2
    assert cached(client, digest) is None
    worker = cluster.workers[0]
    eventually(lambda: worker.metrics().total("lathe_worker_actions_executing") == 0, "the worker has nothing to do")


class TestWaitExecution:
    def test_after_the_end(self, actions: Actions) -> None:
        *_, end = actions.start(actions.store("echo once"))

        assert list(actions.wait(end.name)) == [end]

    def test_for_an_operation_that_never_was(self, actions: Actions) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            list(actions.wait(f"{INSTANCE}/operations/never-was"))

        # Bazel executes again then.
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


class TestOperations:
    def test_a_done_one_is_found(self, client: IndependentClient, actions: Actions) -> None:
        *_, end = actions.start(actions.store("echo once"))

        found = client.operations.GetOperation(client.api.operations.GetOperationRequest(name=end.name))

        assert found == end
        waited = client.operations.WaitOperation(client.api.operations.WaitOperationRequest(name=end.name))
        assert waited == end

    def test_a_running_one_is_found_and_listed(self, client: IndependentClient, actions: Actions) -> None:
        api = client.api.operations
        executing = actions.start(actions.store(ENDLESS))
        name = actions.until_stage(executing, "EXECUTING")[-1].name

        found = client.operations.GetOperation(api.GetOperationRequest(name=name))
        listed = client.operations.ListOperations(api.ListOperationsRequest(name=name)).operations
        running = client.operations.ListOperations(
            api.ListOperationsRequest(name=f"{INSTANCE}/operations", filter="stage=EXECUTING")
        ).operations
        client.operations.CancelOperation(api.CancelOperationRequest(name=name))

        assert actions.stage(found) == "EXECUTING"
        assert [found] == list(listed) == list(running)
        assert list(executing)[-1].done

    def test_a_list_comes_in_pages(self, client: IndependentClient, actions: Actions) -> None:
        ends = [list(actions.start(actions.store(f"echo {number}")))[-1].name for number in range(3)]
        names: list[str] = []
        token = ""
        while not names or token:
            request = client.api.operations.ListOperationsRequest(
                name=f"{INSTANCE}/operations", page_size=2, page_token=token
            )
            page = client.operations.ListOperations(request)
            assert 0 < len(page.operations) <= 2
            names += [operation.name for operation in page.operations]
            token = page.next_page_token

        assert names[-3:] == ends
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize("rpc", ["GetOperation", "CancelOperation", "DeleteOperation", "WaitOperation"])
    def test_one_that_never_was(self, client: IndependentClient, rpc: str) -> None:
        request = getattr(client.api.operations, f"{rpc}Request")(name=f"{INSTANCE}/operations/never-was")

        with pytest.raises(grpc.RpcError) as refused:
            getattr(client.operations, rpc)(request)

        assert refused.value.code() == grpc.StatusCode.NOT_FOUND

    def test_a_deleted_one_is_gone(self, client: IndependentClient, actions: Actions) -> None:
        api = client.api.operations
        *_, end = actions.start(actions.store("echo once"))

        client.operations.DeleteOperation(api.DeleteOperationRequest(name=end.name))

        with pytest.raises(grpc.RpcError) as refused:
            client.operations.GetOperation(api.GetOperationRequest(name=end.name))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
