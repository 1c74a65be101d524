"""What ``/status`` shows: workers, queues, and what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lathe_scheduler.task import TaskState

if TYPE_CHECKING:
    from lathe_scheduler.action_queue import ActionQueue
    from lathe_scheduler.cas import Cas
    from lathe_scheduler.task import Task
    from lathe_scheduler.worker import Worker
    from lathe_shared.clock import Clock

MAX_ACTIONS_SHOWN = 1000
"""Executing actions listed; a page is for people."""


def status_page(queue: ActionQueue, cas: Cas, clock: Clock) -> dict[str, Any]:
    """Describe a queue as something that JSON can express."""
    now = clock.monotonic()
    running = [task for task in queue.tasks.values() if task.lease is not None]
    return {
        "cas": {"available": cas.is_available},
        "actions": {
            "checking": sum(task.state is TaskState.CHECKING for task in queue.tasks.values()),
            "queued": queue.queued_count,
            "executing": queue.executing_count,
        },
        "operations": sum(1 for _ in queue.operations()),
        "workers": [_worker(worker, now) for worker in queue.workers.values()],
        "platform_queues": [
            {
                "platform": dict(platform.key.wishes()),
                "queued": len(platform),
                "workers_able": len(platform.workers),
                "workers_ready": platform.ready_count(),
            }
            for platform in queue.platform_queues.values()
        ],
        "executing": [_task(task, now) for task in running[:MAX_ACTIONS_SHOWN]],
    }


def _worker(worker: Worker, now: float) -> dict[str, Any]:
    amounts = {name: [str(amount)] for name, amount in worker.offer.amounts.items()}
    return {
        "id": worker.id,
        "state": "draining" if worker.draining and worker.connection_id else worker.state.value,
        "version": worker.version,
        "properties": amounts | {name: sorted(values) for name, values in worker.offer.values.items()},
        "slots": worker.slots,
        "slots_free": worker.free_slots,
        "amounts_free": dict(worker.free),
        "leases": len(worker.leases),
        "last_seen_seconds_ago": round(now - worker.last_seen, 1),
    }


def _task(task: Task, now: float) -> dict[str, Any]:
    return {
        "action_digest": str(task.key.digest),
        "instance_name": task.key.instance_name,
        "state": task.state.value,
        "worker": task.lease.worker.id if task.lease is not None else None,
        "operations": len(task.operations),
        "priority": task.priority,
        "seconds_since_queued": round(now - task.enqueued_at, 1),
        "lost_on": list(task.lost_on),
    }
