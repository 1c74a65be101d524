"""The worker's settings."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from lathe_shared.config_loading import NestedSettings, Port, ServiceSettings, endpoint_validator
from lathe_worker.action_executor import ExecutionSettings
from lathe_worker.sandbox import ResourceLimits
from lathe_worker.sandboxes.bubblewrap_arguments import DEFAULT_READABLE_PATHS, ProcView

CAS_PORT = 50051
"""Where the CAS listens if nothing else is said."""

WORKER_API_PORT = 50061
"""Where the scheduler listens for workers if nothing else is said."""

DEFAULT_ACTION_ID = 64321
"""User and group that actions run as under a worker that is root: a number that no distribution gives to anyone, above
Debian's static ids and below ``nobody``, so that it owns nothing on the machine."""


class CommandProperty(NestedSettings):
    """A property whose values a command prints, one a line, when the worker starts."""

    command: str = Field(min_length=1, description="run by /bin/sh -c")


class WorkerSettings(ServiceSettings):
    """All that the worker can be told; see each description."""

    service: ClassVar[str] = "worker"

    http_port: Port = Field(default=50083, description="port of /metrics, /healthz and /status")
    scheduler_endpoint: Annotated[str, endpoint_validator(WORKER_API_PORT)] = Field(
        default=f"127.0.0.1:{WORKER_API_PORT}", description="the scheduler's worker port, as host or host:port"
    )
    cas_endpoint: Annotated[str, endpoint_validator(CAS_PORT)] = Field(
        default=f"127.0.0.1:{CAS_PORT}", description="the CAS, as host or host:port"
    )
    data_dir: Path = Field(
        default=Path("~/.cache/lathe/worker"), description="input cache and running actions; one worker each"
    )
    data_dir_shared: bool = Field(
        default=False,
        description="workers of this machine share data_dir: each takes a numbered directory in it that no other has",
    )
    worker_name: str = Field(default="", description="name in results and logs; the machine's host name if empty")
    slots: int = Field(default=0, ge=0, description="actions at once; 0 means as many as the machine has processors")
    properties: dict[str, str | list[str] | CommandProperty] = Field(
        default={},
        description=(
            'platform properties that this worker offers: a value, several, or {command = "…"} whose output lines are '
            "the values; cpu_count is the machine's unless given here"
        ),
    )
    max_cache_size_bytes: int = Field(default=10 << 30, ge=0, description="bound on the input cache")
    sandbox: Literal["bubblewrap", "none"] = Field(
        default="bubblewrap",
        description="what keeps actions from the machine; none lets them do whatever the worker may do",
    )
    sandbox_proc: Literal["auto", "fresh", "shared", "none"] = Field(
        default="auto",
        description=(
            "/proc inside the sandbox: fresh; shared: the worker's own, read-only, which shows actions the command "
            "lines of other processes; none; auto: shared only where a fresh one cannot be had, as in most containers"
        ),
    )
    action_uid: int = Field(
        default=DEFAULT_ACTION_ID, ge=1, description="user that actions run as if the worker is root; nobody's"
    )
    action_gid: int = Field(default=DEFAULT_ACTION_ID, ge=1, description="group likewise")
    readable_paths: list[str] = Field(
        default=list(DEFAULT_READABLE_PATHS), description="what actions may read of the machine, absent paths left out"
    )
    network: Literal["none", "on_request", "always"] = Field(
        default="none", description="who may use the network: nobody, actions with the property network=on, all"
    )
    max_output_bytes: int = Field(
        default=64 << 20, ge=4096, description="bound on standard output and on standard error; more kills the action"
    )
    max_file_size_bytes: int = Field(default=0, ge=0, description="largest file that an action may write; 0: any")
    max_open_files: int = Field(default=0, ge=0, description="open files of one process; 0: the worker's own limit")
    max_processes: int = Field(
        default=0, ge=0, description="processes of the actions' user on this machine; 0: the worker's own limit"
    )
    max_address_space_bytes: int = Field(default=0, ge=0, description="address space of one process; 0: any")

    @field_validator("readable_paths")
    @classmethod
    def _check_readable_paths(cls, paths: list[str]) -> list[str]:
        for path in paths:
            if not path.startswith("/") or path == "/":
                raise ValueError(f"{path!r} is not an absolute path below /")
        return paths

    @property
    def name(self) -> str:
        """What the worker is called in results."""
        return self.worker_name or socket.gethostname()

    @property
    def proc_choices(self) -> tuple[ProcView, ...]:
        """What may be at an action's ``/proc``, the best first."""
        if self.sandbox_proc == "auto":
            return tuple(ProcView)
        return (ProcView[self.sandbox_proc.upper()],)

    def execution(self) -> ExecutionSettings:
        """Return what the executor needs to know."""
        limits = ResourceLimits(
            max_file_size_bytes=self.max_file_size_bytes,
            max_open_files=self.max_open_files,
            max_processes=self.max_processes,
            max_address_space_bytes=self.max_address_space_bytes,
        )
        return ExecutionSettings(self.name, self.max_output_bytes, limits, self.network)
