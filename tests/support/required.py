"""Programs that tests need: absent ones skip a test on a developer's machine, and fail it wherever all must run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# `make test` sets the first, CI systems the second.
_ALL_MUST_RUN = ("LATHE_REQUIRE_ALL", "CI")


def require_programs(*programs: str) -> None:
    """Skip the test when a program is not installed, or fail it when nothing may be skipped."""
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    _missing(f"not installed: {', '.join(missing)}; `make test` as root installs what tests need")


def require_private_mounts(folder: Path) -> None:
    """Skip the test when this user may not mount a file system for one process, or fail it when nothing may be skipped.

    Args:
        folder: Something to mount on.
    """
    require_programs("unshare", "mount")
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True)
    if tried.returncode:
        _missing(f"no mount without being root: {tried.stderr.decode().strip()}")


def _missing(reason: str) -> None:
    if any(os.environ.get(name) for name in _ALL_MUST_RUN):
        pytest.fail(reason)
    pytest.skip(reason)
