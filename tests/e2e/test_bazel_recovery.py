"""Builds that go on although a part of Lathe dies in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.bazel import Bazel, RunningBazel
from tests.support.cluster import Cluster
from tests.support.service_process import ServiceProcess
from tests.support.waiting import eventually
from tests.support.workspace import make_workspace

# Far enough into a build to have results, far enough from its end to have work left.
ACTIONS_BEFORE_THE_BLOW = 8

# By default Bazel gives up after five tries within three seconds, in which a service on a busy machine may not be back.
PATIENCE = "--remote_retries=10"


@pytest.fixture
def fresh_bazel(tmp_path: Path, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Bazel]:
    """Give a client whose workspace has no action in common with what was built before."""
    workspace = make_workspace(tmp_path / "workspace", salt=request.node.name)
    bazel = Bazel(workspace.root, tmp_path / "bazel", (*cluster.bazel_flags, PATIENCE))
    yield bazel
    bazel.remove()


@pytest.fixture
def start_in_the_middle(fresh_bazel: Bazel, cluster: Cluster) -> Callable[[], RunningBazel]:
    """Start a build and return when it is well under way."""

    def start() -> RunningBazel:
        fresh_bazel.build("--nobuild", "//libs/...", "//apps/...")
        before = cluster.scheduler.metrics().total("lathe_scheduler_actions_completed_total")
        build = fresh_bazel.start("build", "//libs/...", "//apps/...")

        def under_way() -> bool:
            metrics = cluster.scheduler.metrics()
            completed = metrics.total("lathe_scheduler_actions_completed_total") - before
            return completed >= ACTIONS_BEFORE_THE_BLOW and metrics.total("lathe_scheduler_actions_executing") > 0

        eventually(under_way, "the build is under way")
        assert build.running
        return build

    return start


def restart(service: ServiceProcess, cluster: Cluster) -> None:
    service.kill()
    service.start()
    cluster.wait_ready()


def test_a_build_survives_a_killed_worker_that_comes_back(
    start_in_the_middle: Callable[[], RunningBazel], cluster: Cluster
) -> None:
    build = start_in_the_middle()
    restart(cluster.workers[0], cluster)
    result = build.wait()
    assert result.exit_code == 0, result.output
    assert set(result.spawns) <= {"remote", "remote cache hit"}


def test_a_build_survives_a_killed_worker_when_there_is_another(
    start_in_the_middle: Callable[[], RunningBazel], cluster: Cluster
) -> None:
    second = cluster.add_worker()
    try:
        build = start_in_the_middle()
        cluster.workers[0].kill()
        result = build.wait()
        assert result.exit_code == 0, result.output
        assert second.metrics().total("lathe_worker_actions_started_total") > 0
    finally:
        cluster.workers[0].start()
        cluster.wait_ready()
        cluster.remove_worker(second)


def test_a_build_survives_a_killed_cas_that_comes_back(
    start_in_the_middle: Callable[[], RunningBazel], cluster: Cluster
) -> None:
    build = start_in_the_middle()
    restart(cluster.cas, cluster)
    result = build.wait()
    assert result.exit_code == 0, result.output


def test_a_build_survives_a_killed_scheduler_that_comes_back(
    start_in_the_middle: Callable[[], RunningBazel], cluster: Cluster
) -> None:
    build = start_in_the_middle()
    restart(cluster.scheduler, cluster)
    result = build.wait()
    assert result.exit_code == 0, result.output
