"""The ``lathe-cas`` command."""

from __future__ import annotations

import sys

from lathe_cas.app import build
from lathe_cas.config import CasSettings
from lathe_shared.config_loading import load_settings
from lathe_shared.lifecycle import run_service


def main() -> None:
    """Read the settings and serve until told to stop."""
    sys.exit(run_service(load_settings(CasSettings), build))


if __name__ == "__main__":
    main()
