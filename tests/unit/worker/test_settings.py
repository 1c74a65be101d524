"""The worker's settings, its data directory, and what it asks of bubblewrap."""

from __future__ import annotations

from pathlib import Path

import pytest

from lathe_shared.config_loading import ConfigurationError, read_settings
from lathe_worker.config import CommandProperty, WorkerSettings
from lathe_worker.data_directory import DataDirectory, DataDirectoryError
from lathe_worker.private_mount import can_reach
from lathe_worker.sandbox import ActionUser, ResourceLimits, SandboxUnavailableError
from lathe_worker.sandbox_probe import explain
from lathe_worker.sandboxes.bubblewrap_arguments import host_view, limit_prefix
from lathe_worker.sandboxes.bubblewrap_sandbox import BubblewrapSandbox


def test_defaults_are_the_contract_s() -> None:
    settings = read_settings(WorkerSettings)

    assert (settings.cas_endpoint, settings.scheduler_endpoint) == ("127.0.0.1:50051", "127.0.0.1:50061")
    assert (settings.http_port, settings.sandbox, settings.network) == (50083, "bubblewrap", "none")
    assert settings.data_dir == Path.home() / ".cache/lathe/worker"


def test_endpoints_come_from_the_plain_variables_too() -> None:
    settings = read_settings(WorkerSettings, (), {"CAS_ENDPOINT": "cas", "SCHEDULER_ENDPOINT": "other:7"})

    assert (settings.cas_endpoint, settings.scheduler_endpoint) == ("cas:50051", "other:7")


def test_properties_are_values_lists_or_commands(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('[properties]\nOS = "linux"\ntools = ["a", "b"]\ncpu_count = {command = "nproc"}\n')
    settings = read_settings(WorkerSettings, ["--config", str(file)])

    assert settings.properties == {"OS": "linux", "tools": ["a", "b"], "cpu_count": CommandProperty(command="nproc")}


@pytest.mark.parametrize("paths", ["usr", "/", "/usr,etc"])
def test_readable_paths_are_absolute(paths: str) -> None:
    with pytest.raises(ConfigurationError, match="absolute path"):
        read_settings(WorkerSettings, [f"--readable-paths={paths}"])


def test_a_data_directory_is_one_worker_s(tmp_path: Path) -> None:
    first = DataDirectory(tmp_path / "data")
    with pytest.raises(DataDirectoryError, match="in use by another worker"):
        DataDirectory(tmp_path / "data")
    first.close()
    DataDirectory(tmp_path / "data").close()

    assert (tmp_path / "data/cache").stat().st_mode & 0o777 == 0o700


def test_a_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataDirectoryError, match="file"):
        DataDirectory(tmp_path / "file")


def test_symlinks_of_the_machine_stay_symlinks_and_absent_paths_are_left_out(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    (shown / "data").mkdir(parents=True)
    view = host_view([str(shown), str(tmp_path / "absent")], [shown / "data", tmp_path / "elsewhere"])

    hidden = str(shown / "data")
    assert list(view.arguments) == ["--ro-bind", str(shown), str(shown), "--tmpfs", hidden, "--remount-ro", hidden]


def test_limits_are_asked_for_only_where_set() -> None:
    assert limit_prefix(ResourceLimits()) == []
    assert limit_prefix(ResourceLimits(max_open_files=99)) == ["prlimit", "--core=0", "--nofile=99", "--"]


def test_a_closed_parent_directory_keeps_the_action_user_out(tmp_path: Path) -> None:
    user = ActionUser(64321, 64321)
    inner = tmp_path / "closed/inner"
    inner.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)

    assert not can_reach(inner, user)
    assert can_reach(Path("/usr/bin"), user)


@pytest.mark.parametrize(
    ("problem", "cure"),
    [
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths=unconfined"),
        ("bwrap: No permissions to create new namespace", "user.max_user_namespaces"),
        ("bwrap: setting up uid map: Permission denied", "user.max_user_namespaces"),
        ("bwrap: Can't find source path /root/x: Permission denied", "chmod o+x"),
        ("setpriv: setresuid failed: Operation not permitted", "ordinary user"),
    ],
)
def test_what_bubblewrap_says_is_explained(problem: str, cure: str) -> None:
    assert cure in explain(problem)
    assert explain(explain(problem)) == explain(problem)


async def test_a_missing_bubblewrap_is_named_with_its_package(tmp_path: Path) -> None:
    sandbox = BubblewrapSandbox(host_view([], []), bwrap="no-such-bwrap")
    with pytest.raises(SandboxUnavailableError, match=r"package bubblewrap.*sandbox to 'none'"):
        await sandbox.probe(tmp_path)
