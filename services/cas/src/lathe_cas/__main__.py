"""The ``lathe-cas`` command."""

from __future__ import annotations

import os
import sys

from lathe_cas.config import CasSettings
from lathe_shared.config_loading import load_settings


def main() -> None:
    """Read the settings and serve until told to stop; or check the store, as ``lathe-cas fsck``."""
    if sys.argv[1:2] == ["fsck"]:
        from lathe_cas.fsck.command import main as fsck

        sys.exit(fsck(sys.argv[2:], os.environ))
    # A check does without the service, which takes most of a second to import.
    from lathe_cas.app import build
    from lathe_shared.lifecycle import run_service

    sys.exit(run_service(load_settings(CasSettings), build))


if __name__ == "__main__":
    main()
