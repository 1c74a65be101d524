"""What the tests of images and stack share. They need a running engine and both docker-composes; nothing skips."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from tests.support.compose_stack import V1, ComposeStack
from tests.support.required import require_programs
from tests.support.workspace import Workspace, make_workspace

stacks = pytest.StashKey[list[ComposeStack]]()


@pytest.fixture(scope="session")
def stacks_in_use(request: pytest.FixtureRequest) -> list[ComposeStack]:
    """Collect the stacks whose logs a failure shows."""
    return request.config.stash.setdefault(stacks, [])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of the containers' logs with a failure."""
    report = yield
    if report.failed:
        report.sections.extend(("logs", stack.logs()) for stack in item.config.stash.get(stacks, []))
    return report


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Build the three images, the worker's with a compiler."""
    require_programs("docker", "docker-compose", "bazel")
    ComposeStack(V1, tmp_path_factory.mktemp("unused")).compose("build")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Make the workspace that most tests build."""
    return make_workspace(tmp_path_factory.mktemp("workspace") / "main")


@pytest.fixture(scope="module")
def lathe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name a LATHE_DIR that does not exist yet: the stack has to make it."""
    return tmp_path_factory.mktemp("stack") / "lathe"
