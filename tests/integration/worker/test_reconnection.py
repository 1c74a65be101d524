"""How a worker comes back to a scheduler that it loses again and again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.integration.worker.fake_scheduler import WAIT_SECONDS, FakeScheduler
from tests.integration.worker.workbench import Workbench

from lathe_shared.clients.rpc_client import RpcClient
from lathe_shared.metrics import ServiceMetrics
from lathe_shared.testing.fake_clock import ImpatientClock
from lathe_shared.testing.serving import serving
from lathe_worker.sandboxes.plain_process_sandbox import PlainProcessSandbox
from lathe_worker.session_runner import RECONNECTION, STEADY_SECONDS, SessionRunner
from lathe_worker.worker_metrics import WorkerMetrics
from lathe_worker.worker_session import WorkerDescription, WorkerSession


async def test_pauses_grow_until_a_connection_has_lived_for_a_while(tmp_path: Path) -> None:
    scheduler = FakeScheduler(heartbeat_seconds=STEADY_SECONDS)
    bench = Workbench(PlainProcessSandbox(), tmp_path)
    clock = ImpatientClock()
    async with serving([scheduler]) as channel, asyncio.timeout(WAIT_SECONDS):
        runner = SessionRunner(
            WorkerSession(WorkerDescription("w", {}, 1, "")),
            RpcClient(channel, "the scheduler", clock=clock),
            bench.executor,
            WorkerMetrics(ServiceMetrics("worker", CollectorRegistry())),
            clock,
            "w",
        )
        running = asyncio.create_task(runner.run())
        for _ in range(8):
            await scheduler.hear("register")
            scheduler.hang_up()
        await scheduler.hear("register")
        while not runner.is_registered:  # noqa: ASYNC110 -- it has no event for that
            await asyncio.sleep(0.001)
        clock.advance_nowait(STEADY_SECONDS)
        scheduler.hang_up()
        await scheduler.hear("register")
        running.cancel()
        await asyncio.wait([running])
    await bench.close()

    expected = [RECONNECTION.pause_seconds(failures, 1.0) for failures in (1, 2, 3, 4, 5, 6, 7, 8, 1)]
    assert all(full / 2 <= pause <= full for pause, full in zip(clock.pauses, expected, strict=True))
