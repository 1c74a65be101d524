"""What the end-to-end tests share: one cluster, one workspace, one Bazel server; and logs in a failure's report."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from tests.support.bazel import Bazel, BazelResult
from tests.support.cluster import Cluster
from tests.support.reapi_client import ReapiClient
from tests.support.required import require_programs
from tests.support.workspace import Workspace, make_workspace

LOG_TAIL_BYTES = 6_000

_clusters = pytest.StashKey[list[Cluster]]()


@pytest.fixture(scope="session")
def _clusters_in_use(request: pytest.FixtureRequest) -> list[Cluster]:
    return request.config.stash.setdefault(_clusters, [])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of all services' logs with a failure."""
    report = yield
    if report.failed:
        for cluster in item.config.stash.get(_clusters, []):
            for service in cluster.services:
                report.sections.append((f"log of {service.name}", _tail(service.log)))
    return report


def _tail(log: Path) -> str:
    data = log.read_bytes() if log.exists() else b""
    return data[-LOG_TAIL_BYTES:].decode(errors="replace")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, _clusters_in_use: list[Cluster]) -> Iterator[Cluster]:
    """Run a cluster with one worker; a test that takes something down brings it up again."""
    require_programs("bazel", "g++", "bwrap")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    _clusters_in_use.append(cluster)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.discard()
        _clusters_in_use.remove(cluster)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Make the workspace that most tests build."""
    return make_workspace(tmp_path_factory.mktemp("workspace") / "main")


@pytest.fixture(scope="session")
def bazel(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, workspace: Workspace) -> Iterator[Bazel]:
    """Run a Bazel server for that workspace."""
    bazel = Bazel(workspace.root, tmp_path_factory.mktemp("bazel"), cluster.bazel_flags)
    yield bazel
    bazel.remove()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[ReapiClient]:
    """Give a client that is not Bazel."""
    with ReapiClient(cluster.cas_port, cluster.scheduler_port) as client:
        yield client


@pytest.fixture(scope="session")
def first_build(bazel: Bazel) -> BazelResult:
    """Build and test everything once, in a cluster that has never seen any of it."""
    return bazel.run("test", "//...")
