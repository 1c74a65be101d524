"""The compose stack as an operator runs it: containers of a real engine, by either docker-compose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.service_process import Metrics
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
COMPOSE_FOLDER = ROOT / "compose"
PROJECT = "lathe_test"

V1 = ("docker-compose",)
V2 = ("docker", "compose")

# As compose/docker-compose.yml publishes them.
CAS_PORT = 50051
CAS_TLS_PORT = 50071
CAS_HTTP_PORT = 50061
SCHEDULER_PORT = 50052
# Inside the containers.
SCHEDULER_HTTP_PORT = 50082
WORKER_HTTP_PORT = 50083

# What the issue promises from `up -d` to all healthy.
HEALTHY_SECONDS = 60.0
COMMAND_SECONDS = 600.0
SETUP_COMMAND = "apt-get update && apt-get install -y --no-install-recommends g++"

SERVICES = ("lathe_cas", "lathe_scheduler", "lathe_worker")


def docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the engine's client; its output is text.

    Raises:
        AssertionError: It failed, and ``check`` says that it must not.
    """
    return run("docker", *arguments, check=check)


def run(
    *command: str, check: bool = True, cwd: Path = ROOT, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Raises:
        AssertionError: It failed, and ``check`` says that it must not; the text holds what it wrote.
    """
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if check and result.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
        )
    return result


def inspect(container: str) -> dict[str, Any]:
    """Give all that the engine knows of a container."""
    found: dict[str, Any] = json.loads(docker("inspect", container).stdout)[0]
    return found


class ComposeStack:
    """One project of the compose file.

    Args:
        compose: ``V1`` or ``V2``.
        lathe_dir: What LATHE_DIR is to be.
        files: Compose files beside the first, by name.

    Attributes:
        has_fresh_proc: Whether the files let actions have a /proc of their own.
    """

    def __init__(self, compose: tuple[str, ...], lathe_dir: Path, files: tuple[str, ...] = ()) -> None:
        self.lathe_dir = lathe_dir
        self.has_fresh_proc = "fresh-proc.yml" in files
        chosen = [f"--file={name}" for name in ("docker-compose.yml", *files)] if files else []
        self._compose = [*compose, *chosen]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("LATHE_", "COMPOSE_"))}
        self._environ = {
            **clean,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "LATHE_DIR": str(lathe_dir),
            "ADDITIONAL_SETUP_WORKER_CMD": SETUP_COMMAND,
        }

    @property
    def authority(self) -> Path:
        """Locate the certificate that TLS clients must trust."""
        return self.lathe_dir / "compose/tls/ca.crt"

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of docker-compose in the compose folder."""
        return run(*self._compose, *arguments, check=check, cwd=COMPOSE_FOLDER, environ=self._environ)

    def up(self, *, workers: int = 1) -> None:
        """Start all, or scale what runs, and wait until all are healthy."""
        self.compose("up", "-d", "--scale", f"lathe_worker={workers}")
        self.wait_healthy(workers=workers)

    def down(self, *arguments: str) -> None:
        """Stop and remove all containers."""
        self.compose("down", *arguments)

    def discard(self) -> None:
        """Remove all, data too, however the test went."""
        self.compose("down", "--volumes", "--timeout=2", check=False)
        shutil.rmtree(self.lathe_dir, ignore_errors=True)

    def wait_healthy(self, *, workers: int = 1) -> None:
        """Wait until every service is healthy and the scheduler knows exactly so many workers."""
        expected = len(SERVICES) - 1 + workers

        def healthy() -> bool:
            states = [inspect(name)["State"] for service in SERVICES for name in self.containers(service)]
            well = [state for state in states if state["Running"] and state["Health"]["Status"] == "healthy"]
            return len(well) == len(states) == expected and self._workers_known() == workers

        eventually(healthy, "all containers are healthy and all workers known", HEALTHY_SECONDS)

    def containers(self, service: str) -> list[str]:
        """List the running containers of a service."""
        return self._list("ps", "-q", f"--filter=label=com.docker.compose.service={service}")

    def remains(self) -> list[str]:
        """List all that the engine has of the project: containers, running or not, networks and volumes."""
        return [*self._list("ps", "-aq"), *self._list("network", "ls", "-q"), *self._list("volume", "ls", "-q")]

    def kill(self, container: str) -> None:
        """End a container's first process from outside, as the kernel would, and wait until the engine restarted it."""
        before = inspect(container)
        os.kill(before["State"]["Pid"], signal.SIGKILL)

        def restarted() -> bool:
            after = inspect(container)
            return bool(after["RestartCount"] > before["RestartCount"] and after["State"]["Running"])

        eventually(restarted, f"the engine has started {before['Name']} again")

    def execute(self, container: str, *command: str, check: bool = True) -> str:
        """Run a command inside a container; return its output."""
        return docker("exec", container, *command, check=check).stdout

    def scheduler_metrics(self) -> Metrics:
        """Look at the scheduler's metrics, which are not published."""
        return Metrics(self.read("lathe_scheduler", SCHEDULER_HTTP_PORT, "/metrics"))

    def status(self, service: str, port: int) -> dict[str, Any]:
        """Read /status of a service's first container."""
        status: dict[str, Any] = json.loads(self.read(service, port, "/status"))
        return status

    def read(self, service: str, port: int, path: str) -> str:
        """Read from a port inside a service's first container, which this machine reaches over the engine's bridge."""
        networks = inspect(self.containers(service)[0])["NetworkSettings"]["Networks"]
        address = next(network["IPAddress"] for network in networks.values())
        return get(f"http://{address}:{port}{path}")

    def logs(self) -> str:
        """Give what the containers wrote."""
        return self.compose("logs", "--no-color", "--tail=60", check=False).stdout

    def _workers_known(self) -> float:
        try:
            return self.scheduler_metrics().total("lathe_scheduler_workers")
        except (OSError, IndexError):
            return -1

    def _list(self, *command: str) -> list[str]:
        return docker(*command, f"--filter=label=com.docker.compose.project={PROJECT}").stdout.split()


def get(url: str) -> str:
    """Fetch a URL of this machine, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5.0) as answer:
        text: str = answer.read().decode()
    return text
