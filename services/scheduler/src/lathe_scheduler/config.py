"""The scheduler's settings."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from lathe_scheduler.action_check import CheckLimits
from lathe_scheduler.platform_key import PlatformOffer, PlatformProperties, PropertyKind
from lathe_scheduler.queue_settings import QueueSettings
from lathe_shared.config_loading import InstanceNameList, Port, ServiceSettings, endpoint_validator
from lathe_shared.errors import InvalidArgumentError

CAS_PORT = 50051
"""Where the CAS listens if nothing else is said."""


class SchedulerSettings(ServiceSettings):
    """All that the scheduler can be told; see each description."""

    service: ClassVar[str] = "scheduler"

    port: Port = Field(default=50052, description="port for clients: Execution, Operations, ActionCache, Capabilities")
    worker_api_port: Port = Field(default=50061, description="port for workers; clients have no business there")
    http_port: Port = Field(default=50082, description="port of /metrics, /healthz and /status")
    cas_endpoint: Annotated[str, endpoint_validator(CAS_PORT)] = Field(
        default=f"127.0.0.1:{CAS_PORT}", description="the CAS, as host or host:port"
    )
    instance_names: InstanceNameList = Field(default=[], description="instance names to answer for; none means any")
    platform_properties: dict[str, PropertyKind] = Field(
        default={"cpu_count": PropertyKind.MINIMUM},
        description=(
            "platform properties that actions may have, each with its kind: minimum (an amount that the worker must "
            "have free), exact (one of the worker's values), priority (workers with the value are taken first), ignore"
        ),
    )
    configured_platforms: list[dict[str, str | list[str]]] = Field(
        default=[],
        description=(
            "properties of workers that may come later, a table each: actions that fit one of them wait for it "
            "instead of failing"
        ),
    )
    heartbeat_interval_seconds: float = Field(default=5.0, gt=0, description="how often workers report")
    lost_after_seconds: float = Field(
        default=15.0, gt=0, description="silence after which a worker is lost and its actions are queued again"
    )
    worker_reconnect_grace_seconds: float = Field(
        default=2.0, ge=0, description="how long a worker whose connection broke keeps its actions"
    )
    worker_memory_seconds: float = Field(
        default=300.0, ge=0, description="how long actions wait for workers that were seen and are gone"
    )
    unmatched_timeout_seconds: float = Field(
        default=5.0, ge=0, description="how long an action waits if no worker, present or configured, could run it"
    )
    start_grace_seconds: float = Field(
        default=10.0,
        ge=0,
        description="how long after a start actions wait for the first worker, before that timeout counts",
    )
    abandoned_grace_seconds: float = Field(
        default=10.0, ge=0, description="how long an execution outlives the last client that lost its connection"
    )
    completed_retention_seconds: float = Field(
        default=60.0, ge=0, description="how long the outcome of an execution can be asked for"
    )
    max_completed_operations: int = Field(default=100_000, ge=1, description="how many such outcomes are kept at most")
    max_completed_bytes: int = Field(
        default=256 << 20, ge=0, description="how many bytes of results such outcomes may hold"
    )
    max_attempts: int = Field(
        default=3, ge=1, description="how often an action that began may be lost with its worker before it is given up"
    )
    priority_ageing_seconds: float = Field(
        default=60.0, ge=0, description="waiting time that makes up for one step of priority"
    )
    reservation_after_seconds: float = Field(
        default=5.0,
        ge=0,
        description="how long an action may be passed over by smaller ones before a worker is kept free for it",
    )
    operation_update_interval_seconds: float = Field(
        default=30.0, gt=0, description="how often clients hear of an execution that does not change"
    )
    max_action_timeout_seconds: float = Field(
        default=24 * 3600.0, gt=0, description="longest timeout that an action may ask for"
    )
    default_action_timeout_seconds: float = Field(
        default=0.0, ge=0, description="timeout of actions that ask for none; 0 means that they may run for ever"
    )
    max_concurrent_checks: int = Field(
        default=64, ge=1, description="actions whose inputs are looked for at the same time"
    )
    presence_seconds: float = Field(
        default=60.0, ge=0, description="how long an input that was found in the CAS is believed to be there"
    )
    max_directory_entries: int = Field(
        default=500_000, ge=1, description="files and directories of input trees that are remembered; 300 bytes each"
    )

    @model_validator(mode="after")
    def _check_together(self) -> SchedulerSettings:
        if self.lost_after_seconds < 2 * self.heartbeat_interval_seconds:
            raise ValueError(
                f"lost_after_seconds ({self.lost_after_seconds:g}) must be at least twice heartbeat_interval_seconds "
                f"({self.heartbeat_interval_seconds:g}), else one late heartbeat loses a worker"
            )
        try:
            self.queue_settings()
        except InvalidArgumentError as error:
            raise ValueError(f"configured_platforms: {error.reason}") from None
        return self

    def properties(self) -> PlatformProperties:
        """Return the known platform properties."""
        return PlatformProperties(self.platform_properties)

    def queue_settings(self) -> QueueSettings:
        """Return what the queue needs to know.

        Raises:
            InvalidArgumentError: A configured platform has a ``minimum`` property that is no number.
        """
        return QueueSettings(
            lost_after_seconds=self.lost_after_seconds,
            worker_reconnect_grace_seconds=self.worker_reconnect_grace_seconds,
            worker_memory_seconds=self.worker_memory_seconds,
            unmatched_timeout_seconds=self.unmatched_timeout_seconds,
            start_grace_seconds=self.start_grace_seconds,
            abandoned_grace_seconds=self.abandoned_grace_seconds,
            completed_retention_seconds=self.completed_retention_seconds,
            max_completed_operations=self.max_completed_operations,
            max_completed_bytes=self.max_completed_bytes,
            max_attempts=self.max_attempts,
            priority_ageing_seconds=self.priority_ageing_seconds,
            reservation_after_seconds=self.reservation_after_seconds,
            configured_platforms=[self._offer(platform) for platform in self.configured_platforms],
        )

    def check_limits(self) -> CheckLimits:
        """Return the bounds of what is checked before an action is queued."""
        return CheckLimits(
            max_action_timeout_seconds=self.max_action_timeout_seconds,
            max_concurrent_checks=self.max_concurrent_checks,
        )

    def _offer(self, platform: dict[str, str | list[str]]) -> PlatformOffer:
        pairs = [
            (name, value)
            for name, values in platform.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        return self.properties().offer(pairs, "configured_platforms")
