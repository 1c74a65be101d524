"""The ``lathe-scheduler`` command."""

from __future__ import annotations

import sys

from lathe_scheduler.app import build
from lathe_scheduler.config import SchedulerSettings
from lathe_shared.config_loading import load_settings
from lathe_shared.lifecycle import run_service


def main() -> None:
    """Read the settings and serve until told to stop."""
    sys.exit(run_service(load_settings(SchedulerSettings), build))


if __name__ == "__main__":
    main()
