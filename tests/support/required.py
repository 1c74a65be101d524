"""Programs that tests need: absent ones skip a test on a developer's machine, and fail it wherever all must run."""

from __future__ import annotations

import os
import shutil

import pytest

# `make test` sets the first, CI systems the second.
_ALL_MUST_RUN = ("LATHE_REQUIRE_ALL", "CI")


def require_programs(*programs: str) -> None:
    """Skip the test when a program is not installed, or fail it when nothing may be skipped."""
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}; `make test` as root installs what tests need"
    if any(os.environ.get(name) for name in _ALL_MUST_RUN):
        pytest.fail(reason)
    pytest.skip(reason)
