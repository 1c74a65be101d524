"""docker compose v2, with what only it can ask for: a /proc of their own for actions.

The tests of this module share one stack and follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bazel import Bazel, BazelResult
from tests.support.compose_stack import V1, V2, WORKER_HTTP_PORT, ComposeStack
from tests.support.probe import Probe, processes_with
from tests.support.stack_trials import (
    MARK,
    WORKER_DATA,
    check_containment,
    check_hardening,
    check_removed,
    start_in_the_middle,
)
from tests.support.waiting import eventually
from tests.support.workspace import Workspace, make_workspace


@pytest.fixture(scope="module")
def stack(images: None, lathe_dir: Path, stacks_in_use: list[ComposeStack]) -> Iterator[ComposeStack]:
    stack = ComposeStack(V2, lathe_dir, ("fresh-proc.yml",))
    stacks_in_use.append(stack)
    try:
        stack.up()
        yield stack
    finally:
        stacks_in_use.remove(stack)
        stack.discard()


@pytest.fixture(scope="module")
def own_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace") / "second", salt="second")


@pytest.fixture(scope="module")
def bazel(tmp_path_factory: pytest.TempPathFactory, stack: ComposeStack, own_workspace: Workspace) -> Iterator[Bazel]:
    bazel = Bazel(own_workspace.root, tmp_path_factory.mktemp("bazel"), stack.bazel_flags)
    yield bazel
    bazel.remove()


@pytest.fixture(scope="module")
def first_build(stack: ComposeStack, bazel: Bazel) -> BazelResult:
    """Build and test everything, while the stack is scaled up and down."""
    build = start_in_the_middle(stack, bazel)
    stack.up(workers=3)
    assert build.running, "scaled up while Bazel builds"
    stack.up(workers=1)
    build.wait()
    bazel.clean()
    return bazel.run("test", "//...")


def test_the_file_means_the_same_to_both(stack: ComposeStack, lathe_dir: Path) -> None:
    for compose in (V1, V2):
        listed = ComposeStack(compose, lathe_dir).compose("config", "--services").stdout.split()
        assert sorted(listed) == ["lathe_cas", "lathe_init", "lathe_scheduler", "lathe_worker"]


def test_all_become_healthy_and_actions_get_a_proc_of_their_own(stack: ComposeStack) -> None:
    check_hardening(stack)
    assert "own /proc" in stack.status("lathe_worker", WORKER_HTTP_PORT)["sandbox"]


def test_bazel_builds_and_tests_while_workers_come_and_go(first_build: BazelResult) -> None:
    assert first_build.exit_code == 0, first_build.output
    assert set(first_build.spawns) == {"remote", "remote cache hit"}
    assert "9 tests pass" in first_build.output


def test_actions_are_contained_under_that_proc_too(stack: ComposeStack, bazel: Bazel, own_workspace: Workspace) -> None:
    own_workspace.write_probe(port=WORKER_HTTP_PORT, worker_data=Path(WORKER_DATA), mark=MARK)
    check_containment(stack, bazel, Probe(bazel), own_proc=True)
    eventually(lambda: not processes_with(MARK), "no process of an action is left")


def test_everything_is_still_cached_after_down_and_up(
    stack: ComposeStack, bazel: Bazel, first_build: BazelResult
) -> None:
    stack.down()
    stack.up()
    bazel.clean()
    again = bazel.test("//...")
    assert again.spawns == {"remote cache hit": sum(first_build.spawns.values())}


def test_down_leaves_nothing(stack: ComposeStack) -> None:
    check_removed(stack)
