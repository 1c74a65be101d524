"""Composition root: the only module that names concrete parts."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, cast

from lathe_scheduler.action_check import ActionChecker
from lathe_scheduler.action_queue import ActionQueue
from lathe_scheduler.adapters.grpc_cas import GrpcCas
from lathe_scheduler.config import CAS_PORT, SchedulerSettings
from lathe_scheduler.input_tree import InputTrees
from lathe_scheduler.queue_runner import QueueRunner
from lathe_scheduler.scheduler_metrics import SchedulerMetrics
from lathe_scheduler.servicers.action_cache import ActionCacheServicer
from lathe_scheduler.servicers.capabilities import CapabilitiesServicer
from lathe_scheduler.servicers.execution import ExecutionServicer
from lathe_scheduler.servicers.operations import OperationsServicer
from lathe_scheduler.servicers.worker_api import WorkerApiServicer
from lathe_scheduler.status_page import status_page
from lathe_shared.clients.rpc_client import open_channel
from lathe_shared.clock import SystemClock
from lathe_shared.config_loading import parse_endpoint
from lathe_shared.digest import DigestFunction
from lathe_shared.grpc_transport import Engine
from lathe_shared.instance_name import InstanceNames

if TYPE_CHECKING:
    from lathe_shared.clock import Clock
    from lathe_shared.lifecycle import ServiceRuntime

DIGEST_FUNCTIONS = tuple(DigestFunction)
"""Actions may be named by any function that the CAS has."""

LEASE_PREFIX_BYTES = 6
"""Random bytes that tell this process's leases from those of every scheduler before it."""


async def build(runtime: ServiceRuntime) -> None:
    """Put the scheduler's parts onto a runtime."""
    await build_with(runtime, SystemClock())


async def build_with(runtime: ServiceRuntime, clock: Clock) -> QueueRunner:
    """Put the scheduler's parts onto a runtime, with a clock of one's own."""
    settings = cast("SchedulerSettings", runtime.settings)
    channel = open_channel(parse_endpoint(settings.cas_endpoint, CAS_PORT), engine=Engine(settings.grpc_engine))
    runtime.on_close(channel.close)
    cas = GrpcCas(channel, clock)
    trees = InputTrees(
        cas,
        clock,
        presence_seconds=settings.presence_seconds,
        max_directory_entries=settings.max_directory_entries,
    )
    runtime.on_close(trees.close)
    properties = settings.properties()
    checker = ActionChecker(cas, trees, properties, clock, settings.check_limits())
    queue = ActionQueue(settings.queue_settings(), secrets.token_hex(LEASE_PREFIX_BYTES), clock.monotonic())
    runner = QueueRunner(
        queue,
        checker,
        clock,
        SchedulerMetrics(runtime.metrics),
        default_action_timeout_seconds=settings.default_action_timeout_seconds,
        operation_update_interval_seconds=settings.operation_update_interval_seconds,
    )
    runner.on_missing_inputs = trees.forget
    runtime.add_task("queue_runner", runner.run())
    instance_names = InstanceNames(settings.instance_names)
    runtime.add_grpc_port(
        [
            ExecutionServicer(runner, instance_names, DIGEST_FUNCTIONS),
            OperationsServicer(runner, clock),
            ActionCacheServicer(cas, instance_names),
            CapabilitiesServicer(cas, instance_names, DIGEST_FUNCTIONS),
        ],
        settings.port,
        name="client",
    )
    runtime.add_grpc_port(
        [
            WorkerApiServicer(
                runner,
                properties,
                heartbeat_interval_seconds=settings.heartbeat_interval_seconds,
                lost_after_seconds=settings.lost_after_seconds,
            )
        ],
        settings.worker_api_port,
        name="worker_api",
    )
    runtime.add_http_port(lambda: status_page(queue, cas, clock))
    return runner
