"""What the machine offers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lathe_worker.machine import PropertyError, cpu_count, property_values

ALL = len(os.sched_getaffinity(0))


def place(tmp_path: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    (proc / "cgroup").write_text(membership)
    for name, content in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(content)
    return proc, cgroups


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, min(ALL, 1)),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        ("4:cpu,cpuacct:/docker/x\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/a\n1:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, ALL),
        ("0::/\n", {}, ALL),
    ],
)
def test_a_quota_counts_as_processors(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    assert cpu_count(*place(tmp_path, membership, files)) == expected


def test_without_control_groups_affinity_counts(tmp_path: Path) -> None:
    assert cpu_count(tmp_path / "no", tmp_path / "no") == ALL


async def test_a_command_s_lines_are_values() -> None:
    assert await property_values("echo ' a '; echo; echo b c") == ["a", "b c"]


@pytest.mark.parametrize(
    ("command", "text"), [("echo why >&2; exit 4", "exit code 4: why"), ("true", "printed nothing")]
)
async def test_a_command_that_fails_is_named(command: str, text: str) -> None:
    with pytest.raises(PropertyError, match=text):
        await property_values(command)
