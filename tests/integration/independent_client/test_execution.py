"""Execute and WaitExecution on a real worker, as a stranger calls them."""

from typing import Any

import grpc
import pytest
from tests.integration.independent_client.actions import ENDLESS, Actions
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes

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


def test_the_advertised_node_properties_are_set_on_inputs_and_reported_of_outputs(
    client: IndependentClient, actions: Actions
) -> None:
    api = client.api.reapi
    offered = actions.capabilities().execution_capabilities.supported_node_properties
    assert set(offered) == {"mtime", "unix_mode"}
    properties = api.NodeProperties()
    properties.mtime.seconds, properties.mtime.nanos = 1_234_567_890, 123_456_000
    properties.unix_mode.value = 0o640
    data, root = b"content", api.Directory()
    root.files.add(name="in", digest=client.digest(data), node_properties=properties)
    command = api.Command(
        arguments=["/bin/sh", "-c", "cp -p in out; mkdir dir; cp -p in dir; ln -s in link"],
        output_paths=["out", "dir", "link"],
        output_node_properties=offered,
    )
    action = api.Action(
        command_digest=client.digest(command.SerializeToString()),
        input_root_digest=client.digest(root.SerializeToString()),
    )
    blobs = (data, root.SerializeToString(), command.SerializeToString(), action.SerializeToString())

    response = actions.execute(client.store(*blobs)[-1])

    assert response.result.exit_code == 0, response
    (out,), (link,), (directory,) = (
        response.result.output_files,
        response.result.output_symlinks,
        response.result.output_directories,
    )
    (inner,) = api.Tree.FromString(blob(client, directory.tree_digest)).root.files
    assert out.node_properties == inner.node_properties == properties
    assert link.node_properties.HasField("mtime")
    assert link.node_properties.HasField("unix_mode")


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
        assert second.result == first.result == actions.cached(digest)
        assert not client.missing(*(file.digest for file in second.result.output_files))

    def test_skipping_the_look_up_runs_it_again(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store(self.COUNTED)
        first = actions.execute(digest)

        second = actions.execute(digest, skip_cache_lookup=True)

        assert not second.cached_result
        assert second.result.stdout_raw != first.result.stdout_raw
        # Spec: ExecuteRequest.skip_cache_lookup; the result is remembered all the same.
        assert actions.cached(digest) == second.result

    def test_what_must_not_be_cached_is_not(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store(self.COUNTED, do_not_cache=True)

        first, second = actions.execute(digest), actions.execute(digest)

        assert not first.cached_result
        assert not second.cached_result
        assert first.result.stdout_raw != second.result.stdout_raw
        assert actions.cached(digest) is None

    def test_a_failure_is_a_result_and_is_not_cached(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store("echo said; echo why >&2; echo x > out; exit 3", output_paths=["out"])

        response = actions.execute(digest)

        assert response.status.code == 0
        result = response.result
        assert (result.exit_code, result.stdout_raw, result.stderr_raw) == (3, b"said\n", b"why\n")
        assert blob(client, result.output_files[0].digest) == b"x\n"
        assert actions.cached(digest) is None
        assert not actions.execute(digest).cached_result

    def test_a_timeout_shows_what_was_printed_so_far(self, client: IndependentClient, actions: Actions) -> None:
        digest = actions.store(ENDLESS, timeout={"seconds": 0, "nanos": 500_000_000})

        response = actions.execute(digest)

        # Spec: Execute; Bazel shows such a test as TIMEOUT.
        assert response.status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert "0.5" in response.status.message
        assert response.result.stdout_raw == b"begun\n"
        assert actions.cached(digest) is None


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
