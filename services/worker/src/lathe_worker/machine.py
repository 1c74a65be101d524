"""What the machine offers: processors, as this process may use them, and properties that commands find out.

Spec: cgroups(7), cpu.max (version 2) and cpu.cfs_quota_us (version 1).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND_SECONDS = 30.0
"""How long a command that finds out a property may take."""


class PropertyError(Exception):
    """A property's command failed; the message says how."""


def cpu_count(proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the processors that this process may use: its affinity, and a container's quota, rounded down, at least 1.

    Args:
        proc: This process's directory in /proc.
        cgroups: Where control groups are mounted.
    """
    count = len(os.sched_getaffinity(0))
    for quota in _quotas(proc, cgroups):
        count = min(count, int(quota))
    return max(count, 1)


def _quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """Give the processor quotas of this process's control group and of those around it."""
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, name = membership.split(":", 2)
        if not controllers:
            top, read = cgroups, _quota_v2
        elif "cpu" in controllers.split(","):
            top, read = cgroups / "cpu", _quota_v1
        else:
            continue
        # A container sees its own group as the top, or a name that does not exist in its view: the top counts always.
        group = top / name.lstrip("/")
        for directory in (group, *group.parents):
            if directory == top or top in directory.parents:
                quota = read(directory)
                if quota is not None:
                    yield quota


def _quota_v2(directory: Path) -> float | None:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None


async def property_values(command: str) -> list[str]:
    """Run a shell command and return what it prints: a value a line.

    Raises:
        PropertyError: It failed, printed nothing or took too long.
    """
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise PropertyError(f"{command!r} took longer than {COMMAND_SECONDS:g} s") from None
    if process.returncode != 0:
        said = stderr.decode(errors="replace").strip()[-500:]
        raise PropertyError(f"{command!r} ended with exit code {process.returncode}: {said}")
    values = [line.strip() for line in stdout.decode(errors="replace").splitlines() if line.strip()]
    if not values:
        raise PropertyError(f"{command!r} printed nothing")
    return values
