"""The ``lathe-cas`` command."""

from __future__ import annotations

import faulthandler
import os
import sys

from lathe_cas.config import CasSettings
from lathe_shared.config_loading import load_settings


def main() -> None:
    """Read the settings and serve until told to stop; or check the store, as ``lathe-cas fsck``."""
    if sys.argv[1:2] == ["fsck"]:
        from lathe_cas.fsck.command import main as fsck

        sys.exit(fsck(sys.argv[2:], os.environ))
    # A damaged page of the store's file can have LMDB end the process: whoever reads the log then sees that it was.
    faulthandler.enable()
    # A check does without the service, which takes most of a second to import.
    settings = load_settings(CasSettings)
    from lathe_cas.app import build, prepare
    from lathe_shared.lifecycle import run_service

    if settings.processes == 1:
        sys.exit(run_service(settings, build))
    from lathe_shared.process_group import run_processes

    ports = {"http": settings.http_port, "grpc": settings.port}
    if settings.tls_port is not None:
        ports["tls"] = settings.tls_port
    sys.exit(run_processes(settings, settings.processes, ports, lambda: prepare(settings)))


if __name__ == "__main__":
    main()
