"""What the tests of images and stack share. They need a running engine and both docker-composes; nothing skips."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from tests.support.compose_stack import V1, ComposeStack
from tests.support.required import require_programs

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
