"""Run Bazel 4.2.3 without a network against a Lathe cluster.

Bazel's built-in WORKSPACE suffix names three repositories that it would download; the folders under ``stand_ins`` take
their places. Everything else about running it offline is in `OFFLINE_FLAGS`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"

# What any command needs without a network, or to give the same action keys in every terminal.
OFFLINE_FLAGS = (
    "--nosandbox_debug",  # Debian's system-wide bazelrc switches it on
    *(f"--override_repository={folder.name}={folder}" for folder in sorted(STAND_INS.iterdir())),
    "--curses=no",
    "--color=no",
    "--incompatible_strict_action_env",
    "--action_env=PATH=/usr/local/bin:/usr/bin:/bin",
    "--symlink_prefix=/",  # two clients may build one workspace: no links into either's output base
)

# Nothing may run or fall back to this machine's own hands.
REMOTE_ONLY_FLAGS = (
    "--spawn_strategy=remote",
    "--strategy=TestRunner=remote",
    "--genrule_strategy=remote",
    "--noremote_local_fallback",
    "--jobs=16",
)

# Longer than any build here takes on a loaded machine; a hanging Bazel is then killed and its output shown.
DEADLINE_SECONDS = 240.0

_SUMMARY = re.compile(r"^INFO: (\d+) process(?:es)?: (.*)\.$", re.MULTILINE)


@dataclass(frozen=True)
class BazelResult:
    """What one Bazel command left behind.

    Attributes:
        exit_code: Bazel's own; 0 success, 1 build failed, 3 tests failed, 36/37/38 environment or internal trouble.
        output: stdout and stderr together.
        processes: The summary line taken apart, kind of process to count: ``{"internal": 53, "remote": 146}``; empty
            when Bazel ran nothing or stopped early.
    """

    exit_code: int
    output: str
    processes: dict[str, int] = field(default_factory=dict)

    @property
    def spawns(self) -> dict[str, int]:
        """Leave out ``internal``, which are Bazel's own doings (symlinks, manifests) and never spawns."""
        return {kind: count for kind, count in self.processes.items() if kind != "internal"}


def parse_processes(output: str) -> dict[str, int]:
    """Take apart the last ``N processes: M internal, K remote.`` line of Bazel's output."""
    lines = _SUMMARY.findall(output)
    if not lines:
        return {}
    parts = (part.split(" ", 1) for part in lines[-1][1].split(", "))
    return {kind: int(count) for count, kind in parts}


class RunningBazel:
    """A Bazel command that was started; `wait` gives its result.

    Args:
        process: The client process, stderr joined into stdout, which is a file.
        log: That file.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def running(self) -> bool:
        """Say whether the command has not ended yet."""
        return self._process.poll() is None

    def wait(self, deadline_seconds: float = DEADLINE_SECONDS) -> BazelResult:
        """Wait for the end.

        Raises:
            AssertionError: It did not end in time; the text holds what Bazel printed so far.
        """
        try:
            exit_code = self._process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            message = f"Bazel did not end within {deadline_seconds:.0f} s; it printed:\n{self._log.read_text()}"
            raise AssertionError(message) from None
        output = self._log.read_text(errors="replace")
        return BazelResult(exit_code, output, parse_processes(output))


class Bazel:
    """One Bazel client with an output base of its own, for one workspace.

    Args:
        workspace: Root of the workspace.
        output_user_root: Own directory for the server, its output base and logs.
        flags: Added to each ``build``, ``test`` and ``run``.
        startup_flags: For the server, in front of every command.
    """

    def __init__(
        self,
        workspace: Path,
        output_user_root: Path,
        flags: tuple[str, ...] = (),
        startup_flags: tuple[str, ...] = (),
    ) -> None:
        self.workspace = workspace
        self.output_user_root = output_user_root
        self.flags = flags
        self.startup_flags = startup_flags
        self._commands = 0
        output_user_root.mkdir(parents=True, exist_ok=True)

    def start(self, command: str, *arguments: str) -> RunningBazel:
        """Start ``build`` or ``test`` with all flags and come back at once."""
        return self._start(command, *OFFLINE_FLAGS, *self.flags, *arguments)

    def run(self, command: str, *arguments: str) -> BazelResult:
        """Run ``build`` or ``test`` with all flags to its end, whatever that is."""
        return self.start(command, *arguments).wait()

    def build(self, *targets: str) -> BazelResult:
        """Build, and fail the test with Bazel's output when that does not succeed."""
        return self._succeed("build", *targets)

    def test(self, *targets: str) -> BazelResult:
        """Build and test, and fail the test with Bazel's output when that does not succeed."""
        return self._succeed("test", *targets)

    def clean(self, *, expunge: bool = False) -> None:
        """Forget all outputs; with ``expunge`` also everything the server knew and the server itself."""
        result = self._start("clean", *(["--expunge"] if expunge else [])).wait()
        assert result.exit_code == 0, result.output

    def output_file(self, path: str) -> Path:
        """Locate a built file by its path below ``bazel-bin``."""
        return self._bazel_bin() / path

    def shutdown(self) -> None:
        """End the Bazel server by its own command."""
        self._start("shutdown").wait()

    def remove(self) -> None:
        """End the server and delete its files, which Bazel makes read-only."""
        self.shutdown()
        for folder in (path for path in self.output_user_root.rglob("*") if path.is_dir() and not path.is_symlink()):
            folder.chmod(0o755)
        shutil.rmtree(self.output_user_root, ignore_errors=True)

    def _bazel_bin(self) -> Path:
        result = self._start("info", *OFFLINE_FLAGS, *self.flags, "bazel-bin").wait()
        assert result.exit_code == 0, result.output
        return Path(result.output.strip().splitlines()[-1])

    def _succeed(self, command: str, *targets: str) -> BazelResult:
        result = self.run(command, *targets)
        assert result.exit_code == 0, result.output
        return result

    def _start(self, command: str, *arguments: str) -> RunningBazel:
        self._commands += 1
        log = self.output_user_root / f"command_{self._commands:03}_{command}.log"
        startup = (f"--output_user_root={self.output_user_root}", "--max_idle_secs=600", *self.startup_flags)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["bazel", *startup, command, *arguments],
                cwd=self.workspace,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        return RunningBazel(process, log)


def remote_flags(cas_port: int, scheduler_port: int, *, instance_name: str = "main") -> tuple[str, ...]:
    """Give the flags of the contract for a cluster on loopback, and those that keep every spawn remote."""
    return (
        f"--remote_instance_name={instance_name}",
        f"--remote_cache=grpc://127.0.0.1:{cas_port}",
        f"--remote_executor=grpc://127.0.0.1:{scheduler_port}",
        "--remote_default_exec_properties=cpu_count=1",
        *REMOTE_ONLY_FLAGS,
    )
