"""What a figure depends on beside the code: the machine, and the versions of what takes part."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

DISTRIBUTIONS = ("lathe-shared", "lathe-cas", "grpclib", "h2", "hpack", "jh2", "uvloop", "lmdb", "xxhash", "grpcio")
"""Whose versions a result names."""


def machine_facts() -> dict[str, object]:
    """Return facts about this machine as it is now, ready for JSON."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "versions": {name: importlib.metadata.version(name) for name in DISTRIBUTIONS},
    }


def cpu_model(cpuinfo: str) -> str:
    """Return the processor's name out of ``/proc/cpuinfo``."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()
