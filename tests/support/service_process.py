"""One service of Lathe as a real process: started, asked, stopped, killed."""

from __future__ import annotations

import http.client
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tests.support.waiting import eventually
from tools.run_service import TETHER

HOST = "127.0.0.1"
# Below this is where other programs' fixed ports crowd.
LOWEST_PORT = 20_000
# A service that drains gets this long; the tests leave nothing running that would need it.
STOP_SECONDS = 30.0


def free_ports(count: int) -> list[int]:
    """Find distinct ports on loopback that are free, and stay so while a service is down.

    Ports that the kernel gives for port 0 come from the range that outgoing connections take theirs from: between a
    stop and a start one of those could sit on the service's port, or a client that tries to reconnect could even
    connect to itself. So these are from below that range.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = random.sample(range(LOWEST_PORT, first_ephemeral), k=first_ephemeral - LOWEST_PORT)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class Metrics:
    """The samples of one look at /metrics.

    Args:
        text: In Prometheus' text format.
    """

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Add up the samples of this name that have these labels; 0 when there is none yet."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and all(sample.labels.get(label) == value for label, value in labels.items())
        )


class ServiceProcess:
    """A service process that can be started again with the same ports and data.

    Args:
        name: For logs and errors.
        program: Console script, e.g. ``lathe-cas``.
        flags: All of its configuration.
        http_port: Where its /healthz and /metrics are.
        log: File that collects what it writes, over all starts.
    """

    def __init__(self, name: str, program: str, flags: list[str], http_port: int, log: Path) -> None:
        self.name = name
        self.http_port = http_port
        self.log = log
        self.command = [str(Path(sys.executable).parent / program), *flags]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Give the process id of the running service."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process; `wait_healthy` says when it can be used."""
        assert self._process is None, f"{self.name} runs already"
        environ = {key: value for key, value in os.environ.items() if not key.startswith("LATHE_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                # Tied to the test run: a run that is killed leaves no service behind.
                [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                process_group=0,
            )

    def wait_healthy(self) -> None:
        """Wait until /healthz answers 200.

        Raises:
            AssertionError: The process ended instead, or time passed; the text holds its log.
        """

        def healthy() -> bool:
            assert self._process is not None
            code = self._process.poll()
            assert code is None, f"{self.name} ended with {code}:\n{self.log.read_text()}"
            return self._get("/healthz")[0] == http.client.OK

        eventually(healthy, f"{self.name} is healthy")

    def stop(self) -> int:
        """End the process by SIGTERM and return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"{self.name} did not stop:\n{self.log.read_text()[-20_000:]}") from None
        finally:
            self._process = None

    def kill(self) -> None:
        """End the process by SIGKILL, and with it all that it started, as a power cut would."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def discard(self) -> None:
        """End the process if it runs, at the end of a test, however that went."""
        if self._process is not None:
            self.kill()

    def metrics(self) -> Metrics:
        """Look at /metrics."""
        status, body = self._get("/metrics")
        assert status == http.client.OK, f"{self.name} /metrics answered {status}"
        return Metrics(body)

    def _get(self, path: str) -> tuple[int, str]:
        """Ask the HTTP port; status 0 when nobody answers."""
        connection = http.client.HTTPConnection(HOST, self.http_port, timeout=5.0)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()
