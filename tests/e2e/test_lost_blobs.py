"""Inputs that the CAS has lost: Execute lists them, uploading them heals, and Bazel gets on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.bazel import Bazel
from tests.support.cluster import Cluster
from tests.support.lost_blobs import lose_blob
from tests.support.reapi_client import ReapiClient, digest_of, missing_subjects, reapi_message
from tests.support.workspace import make_workspace

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION.value[0]


@dataclass
class NestedAction:
    """An action that prints a file two directories down."""

    input_data: bytes
    action: Any
    blobs: list[bytes]


@pytest.fixture
def nested_action() -> NestedAction:
    input_data = b"nested input " + os.urandom(8).hex().encode()
    lower = reapi_message("Directory")
    lower.files.add(name="input.txt", digest=digest_of(input_data))
    upper = reapi_message("Directory")
    upper.directories.add(name="lower", digest=digest_of(lower.SerializeToString()))
    root = reapi_message("Directory")
    root.directories.add(name="upper", digest=digest_of(upper.SerializeToString()))
    command = reapi_message("Command", arguments=["cat", "upper/lower/input.txt"])
    blobs = [message.SerializeToString() for message in (lower, upper, root, command)]
    action = reapi_message("Action", command_digest=digest_of(blobs[3]), input_root_digest=digest_of(blobs[2]))
    blobs.append(action.SerializeToString())
    return NestedAction(input_data, digest_of(blobs[-1]), [input_data, *blobs])


def lose(cluster: Cluster, digest: Any) -> None:
    """Take a blob out of the CAS while it is down, and bring it up again."""
    cluster.cas.stop()
    lose_blob(cluster.cas_data, digest.hash, digest.size_bytes)
    cluster.cas.start()
    cluster.wait_ready()


def test_execute_lists_a_lost_nested_input_and_an_upload_heals(
    client: ReapiClient, cluster: Cluster, nested_action: NestedAction
) -> None:
    client.upload(*nested_action.blobs)
    lost = digest_of(nested_action.input_data)
    lose(cluster, lost)

    response = client.execute(nested_action.action)
    assert response.status.code == FAILED_PRECONDITION, response
    assert missing_subjects(response.status) == [f"blobs/{lost.hash}/{lost.size_bytes}"]

    client.upload(nested_action.input_data)
    response = client.execute(nested_action.action)
    assert response.status.code == 0, response
    assert response.result.exit_code == 0, response
    assert response.result.stdout_raw or client.read(response.result.stdout_digest) == nested_action.input_data


def test_a_lost_directory_is_listed(client: ReapiClient, cluster: Cluster, nested_action: NestedAction) -> None:
    client.upload(*nested_action.blobs)
    lost = digest_of(nested_action.blobs[2])
    lose(cluster, lost)
    response = client.execute(nested_action.action)
    assert response.status.code == FAILED_PRECONDITION, response
    assert missing_subjects(response.status) == [f"blobs/{lost.hash}/{lost.size_bytes}"]


def test_a_result_whose_output_is_lost_is_a_miss(
    client: ReapiClient, cluster: Cluster, nested_action: NestedAction
) -> None:
    command = reapi_message("Command", arguments=["cp", "upper/lower/input.txt", "copy.txt"], output_paths=["copy.txt"])
    action = reapi_message(
        "Action",
        command_digest=digest_of(command.SerializeToString()),
        input_root_digest=digest_of(nested_action.blobs[3]),
    )
    _, action_digest, *_ = client.upload(command.SerializeToString(), action.SerializeToString(), *nested_action.blobs)
    assert client.execute(action_digest).result.exit_code == 0
    assert client.action_result(action_digest) is not None
    lose(cluster, digest_of(nested_action.input_data))
    assert client.action_result(action_digest) is None


@pytest.fixture
def fresh_bazel(tmp_path: Path, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Bazel]:
    workspace = make_workspace(tmp_path / "workspace", salt=request.node.name)
    bazel = Bazel(workspace.root, tmp_path / "bazel", cluster.bazel_flags)
    yield bazel
    bazel.remove()


def test_bazel_uploads_a_lost_source_again(fresh_bazel: Bazel, cluster: Cluster) -> None:
    fresh_bazel.build("//libs:lib_00")
    source = fresh_bazel.workspace / "libs/lib_00.h"
    lose(cluster, digest_of(source.read_bytes()))
    built = fresh_bazel.build("//libs:lib_01")  # compiles against lib_00.h
    assert set(built.spawns) <= {"remote", "remote cache hit"}


def test_bazel_without_the_bytes_builds_a_lost_output_again(fresh_bazel: Bazel, cluster: Cluster) -> None:
    fresh_bazel.build("//generated:two_outputs")
    header = fresh_bazel.output_file("generated/answer.h").read_bytes()
    fresh_bazel.clean()
    fresh_bazel.build("--remote_download_minimal", "//generated:header")
    assert not fresh_bazel.output_file("generated/answer.h").exists()
    lose(cluster, digest_of(header))

    # Bazel 4.2.3 asks which inputs are missing, wants to upload the header, and has never had it: it cannot go back
    # to the action that made it. The way out that it leaves to its user is a clean; then it must not get the same
    # incomplete result from the cache again.
    result = fresh_bazel.run("build", "--remote_download_minimal", "//libs:lib_00")
    assert result.exit_code != 0
    assert "generated/answer.h (No such file or directory)" in result.output
    fresh_bazel.clean()
    built = fresh_bazel.build("--remote_download_minimal", "//libs:lib_00")
    assert built.spawns["remote"] > 0
