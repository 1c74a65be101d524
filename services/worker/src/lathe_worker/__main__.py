"""The ``lathe-worker`` command."""

from __future__ import annotations

import sys

from lathe_shared.config_loading import load_settings
from lathe_shared.lifecycle import run_service
from lathe_worker.app import build
from lathe_worker.config import WorkerSettings


def main() -> None:
    """Read the settings and serve until told to stop."""
    sys.exit(run_service(load_settings(WorkerSettings), build))


if __name__ == "__main__":
    main()
