"""A whole Lathe as real processes on loopback: one CAS, one scheduler, any number of workers."""

from __future__ import annotations

from pathlib import Path

from tests.support.bazel import remote_flags
from tests.support.service_process import HOST, ServiceProcess, free_ports
from tests.support.waiting import eventually


class Cluster:
    """The processes, their ports and their directories.

    Args:
        root: Directory for data and logs.
        workers: How many workers there can be; `start` starts all.
        worker_flags: More configuration of each worker.
        cas_flags: More configuration of the CAS.
    """

    def __init__(
        self, root: Path, *, workers: int = 1, worker_flags: tuple[str, ...] = (), cas_flags: tuple[str, ...] = ()
    ) -> None:
        self.root = root
        (root / "logs").mkdir(parents=True)
        self._worker_flags = worker_flags
        self.cas_port, self.scheduler_port, self._worker_api_port, cas_http, scheduler_http = free_ports(5)
        self.cas = self._service(
            "cas", "lathe-cas", cas_http, f"--port={self.cas_port}", f"--data-dir={self.cas_data}", *cas_flags
        )
        self.scheduler = self._service(
            "scheduler",
            "lathe-scheduler",
            scheduler_http,
            f"--port={self.scheduler_port}",
            f"--worker-api-port={self._worker_api_port}",
            f"--cas-endpoint={HOST}:{self.cas_port}",
        )
        self.workers = [self._worker(index) for index in range(workers)]

    @property
    def services(self) -> list[ServiceProcess]:
        """List all processes, those that others need first."""
        return [self.cas, self.scheduler, *self.workers]

    @property
    def bazel_flags(self) -> tuple[str, ...]:
        """Give the flags with which Bazel uses this cluster and nothing else."""
        return remote_flags(self.cas_port, self.scheduler_port)

    @property
    def cas_data(self) -> Path:
        """Locate the data directory of the CAS."""
        return self.root / "cas"

    def worker_data(self, index: int) -> Path:
        """Locate the data directory of a worker."""
        return self.root / f"worker-{index}"

    def start(self) -> None:
        """Start all and wait until actions can run."""
        for service in self.services:
            service.start()
        self.wait_ready()

    def add_worker(self) -> ServiceProcess:
        """Start one more worker and wait until the scheduler knows it."""
        worker = self._worker(len(self.workers))
        self.workers.append(worker)
        worker.start()
        self.wait_ready()
        return worker

    def remove_worker(self, worker: ServiceProcess) -> None:
        """Stop a worker for good."""
        self.workers.remove(worker)
        worker.stop()
        self.wait_for_workers(len(self.workers))

    def wait_ready(self) -> None:
        """Wait until all are healthy and the scheduler knows all workers."""
        for service in self.services:
            service.wait_healthy()
        self.wait_for_workers(len(self.workers))

    def wait_for_workers(self, count: int) -> None:
        """Wait until the scheduler has exactly so many workers."""
        eventually(
            lambda: self.scheduler.metrics().total("lathe_scheduler_workers") == count,
            f"the scheduler has {count} workers",
        )

    def stop(self) -> dict[str, int]:
        """Stop all by SIGTERM, those first that need others; return the exit codes."""
        return {service.name: service.stop() for service in reversed(self.services)}

    def discard(self) -> None:
        """End whatever still runs."""
        for service in reversed(self.services):
            service.discard()

    def actions_dispatched(self) -> float:
        """Count the actions that the scheduler has ever given to a worker."""
        return self.scheduler.metrics().total("lathe_scheduler_actions_dispatched_total")

    def actions_started(self) -> float:
        """Count the actions that the workers have started since they were started themselves."""
        return sum(worker.metrics().total("lathe_worker_actions_started_total") for worker in self.workers)

    def _worker(self, index: int) -> ServiceProcess:
        return self._service(
            f"worker-{index}",
            "lathe-worker",
            free_ports(1)[0],
            f"--scheduler-endpoint={HOST}:{self._worker_api_port}",
            f"--cas-endpoint={HOST}:{self.cas_port}",
            f"--data-dir={self.worker_data(index)}",
            *self._worker_flags,
        )

    def _service(self, name: str, program: str, http_port: int, *flags: str) -> ServiceProcess:
        common = [f"--host={HOST}", f"--http-port={http_port}", "--log-level=info"]
        return ServiceProcess(name, program, [*common, *flags], http_port, self.root / "logs" / f"{name}.log")
