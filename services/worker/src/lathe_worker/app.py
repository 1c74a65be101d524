"""Composition root: the only module that names concrete parts."""

from __future__ import annotations

import asyncio
import os
import pwd
import resource
import secrets
from typing import TYPE_CHECKING, Any, cast

import structlog

import lathe_worker
from lathe_shared.clients.action_cache_client import ActionCacheClient
from lathe_shared.clients.cas_client import CasClient
from lathe_shared.clients.rpc_client import RetryPolicy, RpcClient, open_channel
from lathe_shared.clock import SystemClock
from lathe_shared.config_loading import parse_endpoint
from lathe_shared.grpc_transport import Engine
from lathe_shared.lifecycle import StartError
from lathe_worker.action_executor import ActionExecutor, ExecutionParts
from lathe_worker.cas_blobs import CasBlobs
from lathe_worker.child_process import become_subreaper
from lathe_worker.config import CAS_PORT, WORKER_API_PORT, CommandProperty, WorkerSettings
from lathe_worker.data_directory import DataDirectory, DataDirectoryError, take_data_directory
from lathe_worker.directory_loader import DirectoryLoader
from lathe_worker.file_cache import FileCache
from lathe_worker.machine import PropertyError, cpu_count, property_values
from lathe_worker.output_collector import OutputCollector
from lathe_worker.private_mount import make_reachable
from lathe_worker.sandbox import ActionUser, Sandbox, SandboxUnavailableError
from lathe_worker.sandboxes.bubblewrap_arguments import host_view
from lathe_worker.sandboxes.bubblewrap_sandbox import BubblewrapSandbox
from lathe_worker.sandboxes.plain_process_sandbox import PlainProcessSandbox
from lathe_worker.session_runner import SessionRunner
from lathe_worker.work_directory import WorkDirectories
from lathe_worker.worker_metrics import WorkerMetrics
from lathe_worker.worker_session import WorkerDescription, WorkerSession

if TYPE_CHECKING:
    from lathe_shared.lifecycle import ServiceRuntime

CAS_PATIENCE = RetryPolicy(attempts=60)
"""How long an action waits for a CAS that is away, for its inputs or with its outputs: some two minutes. Another worker
would find it away just the same, and what has run would run again; so giving up early only uses up the action's
attempts. A client that does not want to wait cancels, which ends the wait."""

_log = structlog.get_logger("lathe.worker")


async def build(runtime: ServiceRuntime) -> None:
    """Put the worker's parts onto a runtime."""
    settings = cast("WorkerSettings", runtime.settings)
    try:
        data = take_data_directory(settings.data_dir, shared=settings.data_dir_shared)
        runtime.on_close(data.close)
        sandbox = _sandbox(settings, data)
        work = WorkDirectories(data.work, sandbox.action_user)
        await asyncio.to_thread(work.purge)
        runtime.on_close(work.close)
        level = await _probe(sandbox, work)
        description = await _description(settings)
    except (DataDirectoryError, SandboxUnavailableError, PropertyError) as error:
        raise StartError(str(error)) from error
    engine = Engine(settings.grpc_engine)
    cas_channel = open_channel(parse_endpoint(settings.cas_endpoint, CAS_PORT), engine=engine)
    runtime.on_close(cas_channel.close)
    blobs = CasBlobs(CasClient(cas_channel, retry=CAS_PATIENCE), ActionCacheClient(cas_channel, retry=CAS_PATIENCE))
    cache = FileCache(data.cache, settings.max_cache_size_bytes, blobs)
    await asyncio.to_thread(cache.open)
    runtime.on_close(cache.close)
    clock = SystemClock()
    executor = ActionExecutor(
        settings.execution(),
        ExecutionParts(
            sandbox=sandbox,
            blobs=blobs,
            cache=cache,
            directories=DirectoryLoader(blobs),
            collector=OutputCollector(blobs, sandbox.seen_root),
            work=work,
            clock=clock,
        ),
    )
    metrics = WorkerMetrics(runtime.metrics)
    metrics.watch_cache(cache)
    scheduler_channel = open_channel(parse_endpoint(settings.scheduler_endpoint, WORKER_API_PORT), engine=engine)
    runtime.on_close(scheduler_channel.close)
    session = WorkerSession(description)
    runner = SessionRunner(
        session, RpcClient(scheduler_channel, "the scheduler"), executor, metrics, clock, settings.name
    )
    runtime.add_task("session", runner.run())
    runtime.on_drain(runner.drain)
    runtime.add_http_port(
        lambda: _status(settings, level, description, session, runner, cache, data),
        is_healthy=lambda: runner.is_registered,
    )


def _sandbox(settings: WorkerSettings, data: DataDirectory) -> Sandbox:
    """Make the sandbox; must run before the process has a second thread (see ``make_reachable``)."""
    # Never a core dump: neither of an action, into its outputs, nor of a worker that holds their inputs.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o022)
    if settings.sandbox == "none":
        return PlainProcessSandbox()
    if not become_subreaper():
        _log.warning("no_subreaper", effect="the resource usage of actions is unknown")
    view = host_view(settings.readable_paths, [settings.data_dir])
    if os.geteuid() != 0:
        return BubblewrapSandbox(view, proc=settings.proc_choices)
    user = ActionUser(settings.action_uid, settings.action_gid)
    try:
        name = pwd.getpwuid(user.uid).pw_name
        _log.warning("action_uid_is_a_real_user", uid=user.uid, name=name, effect="actions may do what that user may")
    except KeyError:
        pass
    return BubblewrapSandbox(
        view, action_user=user, reachable=make_reachable(data.work, user), proc=settings.proc_choices
    )


async def _probe(sandbox: Sandbox, work: WorkDirectories) -> str:
    scratch = work.make()
    try:
        level = await sandbox.probe(scratch.path)
    finally:
        work.discard(scratch)
    _log.info("sandbox_ready", protection=level)
    return level


async def _description(settings: WorkerSettings) -> WorkerDescription:
    count = cpu_count()
    properties: dict[str, list[str]] = {"cpu_count": [str(count)]}
    for name, value in settings.properties.items():
        if isinstance(value, CommandProperty):
            try:
                properties[name] = await property_values(value.command)
            except PropertyError as error:
                raise PropertyError(f"properties.{name}: {error}") from error
        else:
            properties[name] = [value] if isinstance(value, str) else value
    worker_id = f"{settings.name}-{secrets.token_hex(4)}"
    return WorkerDescription(worker_id, properties, settings.slots or count, lathe_worker.__version__)


def _status(
    settings: WorkerSettings,
    level: str,
    description: WorkerDescription,
    session: WorkerSession,
    runner: SessionRunner,
    cache: FileCache,
    data: DataDirectory,
) -> dict[str, Any]:
    return {
        "service": "worker",
        "version": description.version,
        "worker_id": description.worker_id,
        "name": settings.name,
        "data_dir": str(data.path),
        "sandbox": level,
        "scheduler": {"endpoint": settings.scheduler_endpoint, "registered": runner.is_registered},
        "draining": session.is_draining,
        "properties": description.properties,
        "slots": description.slots,
        "running": runner.running(),
        "undelivered_results": session.undelivered,
        "cache": {
            "files": len(cache),
            "size_bytes": cache.size_bytes,
            "max_size_bytes": settings.max_cache_size_bytes,
            "hits": cache.counters.hits,
            "downloads": cache.counters.downloads,
            "evictions": cache.counters.evictions,
        },
    }
