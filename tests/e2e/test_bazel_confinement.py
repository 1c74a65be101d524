"""Actions that try through Bazel what an action must not be able to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.support.bazel import Bazel
from tests.support.cluster import Cluster
from tests.support.probe import Probe, processes_with
from tests.support.waiting import eventually
from tests.support.workspace import Workspace

# Argument of `sleep` by which the test finds the processes that an action left behind.
MARK = "87123.25"


@pytest.fixture
def probe(bazel: Bazel, cluster: Cluster, workspace: Workspace) -> Probe:
    workspace.write_probe(port=cluster.cas_port, worker_data=cluster.worker_data(0), mark=MARK)
    return Probe(bazel)


@pytest.mark.parametrize("change", ["rewrite_input", "replace_input", "chmod_input"])
def test_an_action_cannot_change_the_input_that_others_get(
    probe: Probe, bazel: Bazel, workspace: Workspace, change: str
) -> None:
    before = probe.run("look_at_input")
    assert before[0] == "the input as it was"
    probe.run(change)
    bazel.clean()
    assert probe.run("look_at_input") == before


def test_an_action_has_no_network(probe: Probe, workspace: Workspace) -> None:
    command = ["sh", "odd/probe.sh", "network", "odd/victim.txt"]
    outside = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True, check=True)
    assert outside.stdout.splitlines()[0] == "connect: done"
    assert probe.run("network")[0] == "connect: refused"


def test_an_action_sees_nothing_of_its_worker(probe: Probe, cluster: Cluster) -> None:
    assert any(path.is_file() for path in cluster.worker_data(0).rglob("*"))
    assert probe.run("read_worker") == ["list: refused", "write: refused", "files: 0"]


def test_an_action_writes_nothing_outside(probe: Probe) -> None:
    assert probe.run("write_outside")[:2] == ["write to /usr: refused", "write to /etc: refused"]
    assert not list(Path("/tmp").glob("lathe_probe_*"))


def test_an_action_leaves_no_process(probe: Probe) -> None:
    assert probe.run("daemon") == ["started"]
    eventually(lambda: not processes_with(MARK), "no process of the action is left")
