"""What the worker's integration tests share: places that an unprivileged user can reach, and real sandboxes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.integration.worker.workbench import Workbench
from tests.support.required import require_programs

from lathe_worker.child_process import become_subreaper
from lathe_worker.sandbox import ActionUser
from lathe_worker.sandboxes.bubblewrap_arguments import DEFAULT_READABLE_PATHS, host_view
from lathe_worker.sandboxes.bubblewrap_sandbox import BubblewrapSandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ACTION_USER = ActionUser(64321, 64321)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may pass through; pytest's own are closed to all but one."""
    path = Path(tempfile.mkdtemp(prefix="lathe-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["another uid", "the worker's uid"])
def bubblewrap(request: pytest.FixtureRequest, open_directory: Path) -> BubblewrapSandbox:
    """A sandbox in each of its two forms; only root can have the first."""
    require_programs("bwrap")
    become_subreaper()
    view = host_view(DEFAULT_READABLE_PATHS, [open_directory])
    if request.param == "the worker's uid":
        return BubblewrapSandbox(view)
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    return BubblewrapSandbox(view, action_user=ACTION_USER)


@pytest.fixture
async def bench(bubblewrap: BubblewrapSandbox, open_directory: Path) -> AsyncIterator[Workbench]:
    """An executor with everything around it, over blobs in memory."""
    bench = Workbench(bubblewrap, open_directory)
    yield bench
    await bench.close()
