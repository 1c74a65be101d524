"""A real Bazel builds and tests a C++ workspace through Lathe, and finds everything again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bazel import Bazel, BazelResult
from tests.support.cluster import Cluster
from tests.support.workspace import Workspace, make_workspace


def test_the_first_build_runs_every_spawn_remotely(first_build: BazelResult, workspace: Workspace) -> None:
    assert first_build.exit_code == 0, first_build.output
    assert workspace.compile_actions >= 60
    assert set(first_build.spawns) == {"remote"}
    assert first_build.spawns["remote"] > workspace.compile_actions
    assert "9 tests pass" in first_build.output


def test_outputs_arrive_as_what_they_are(bazel: Bazel) -> None:
    bazel.build("//special/...", "//generated/...")
    assert bazel.output_file("special/listing.txt").read_text().splitlines() == [
        "./count.txt",
        "./nested/deeper/tool.sh",
        "./nested/first.txt",
        "./nested/second.txt",
        "from the directory",
    ]
    directory = bazel.output_file("special/directory")
    assert os.access(directory / "nested/deeper/tool.sh", os.X_OK)
    link = bazel.output_file("special/link")
    assert link.is_symlink()
    assert link.read_text() == "behind the link\n"
    assert bazel.output_file("special/program.answer").read_text() == "the written program got 42\n"
    assert bazel.output_file("generated/empty.txt").read_bytes() == b""
    assert bazel.output_file("generated/program_output.txt").read_text().startswith("app_0 ")


def test_after_a_clean_every_spawn_is_a_remote_cache_hit(bazel: Bazel, first_build: BazelResult) -> None:
    bazel.clean(expunge=True)
    again = bazel.test("//...")
    assert again.spawns == {"remote cache hit": first_build.spawns["remote"]}


def test_after_all_services_were_stopped_and_started_every_spawn_is_still_a_hit(
    bazel: Bazel, cluster: Cluster, first_build: BazelResult
) -> None:
    exit_codes = cluster.stop()
    assert exit_codes == dict.fromkeys(exit_codes, 0)
    cluster.start()
    bazel.clean()
    again = bazel.test("//...")
    assert again.spawns == {"remote cache hit": first_build.spawns["remote"]}


# Bazel 4.2.3 refuses symlink outputs when it builds without the bytes.
WITHOUT_SYMLINKS = ("//...", "-//special:link")


def test_builds_without_the_bytes(bazel: Bazel) -> None:
    bazel.clean()
    minimal = bazel.test("--remote_download_minimal", "--", *WITHOUT_SYMLINKS)
    assert set(minimal.spawns) == {"remote cache hit"}
    assert not bazel.output_file("apps/app_0").exists()
    bazel.clean()


@pytest.fixture
def second_bazel(tmp_path: Path, cluster: Cluster, fresh_workspace: Workspace) -> Iterator[Bazel]:
    bazel = Bazel(fresh_workspace.root, tmp_path / "second_bazel", cluster.bazel_flags)
    yield bazel
    bazel.remove()


@pytest.fixture
def fresh_workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "fresh", salt="two clients")


@pytest.fixture
def third_bazel(tmp_path: Path, cluster: Cluster, fresh_workspace: Workspace) -> Iterator[Bazel]:
    bazel = Bazel(fresh_workspace.root, tmp_path / "third_bazel", cluster.bazel_flags)
    yield bazel
    bazel.remove()


def test_two_clients_that_build_the_same_run_each_action_once(
    second_bazel: Bazel, third_bazel: Bazel, cluster: Cluster
) -> None:
    targets = ("//libs/...", "//apps/...", "//cpp_checks/...")
    for client in (second_bazel, third_bazel):  # both servers up and the build analysed: then they start together
        client.build("--nobuild", *targets)
    dispatched, started = cluster.actions_dispatched(), cluster.actions_started()

    both = [client.start("build", *targets) for client in (second_bazel, third_bazel)]
    results = [client.wait() for client in both]

    for result in results:
        assert result.exit_code == 0, result.output
        assert set(result.spawns) <= {"remote", "remote cache hit"}
    distinct = {sum(result.spawns.values()) for result in results}
    assert len(distinct) == 1, "both have the same spawns"
    assert cluster.actions_dispatched() - dispatched == distinct.pop()
    assert cluster.actions_started() - started == cluster.actions_dispatched() - dispatched
