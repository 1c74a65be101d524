"""ExecutedActionMetadata: when each part of an action's life was, where it was, and what it used.

Spec: REAPI, ExecutedActionMetadata.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from lathe_protos import reapi, worker_v1
from lathe_shared.status_details import pack_any

if TYPE_CHECKING:
    from lathe_worker.sandbox import ResourceUsage, SandboxResult


def begun(worker_name: str, queued_at: datetime.datetime, now: datetime.datetime) -> reapi.ExecutedActionMetadata:
    """Return the metadata of an action that this worker has just taken."""
    return reapi.ExecutedActionMetadata(worker=worker_name, queued_timestamp=queued_at, worker_start_timestamp=now)


def add_execution(metadata: reapi.ExecutedActionMetadata, result: SandboxResult) -> None:
    """Add what is known when the command has ended."""
    metadata.virtual_execution_duration = datetime.timedelta(seconds=result.wall_seconds)
    metadata.auxiliary_metadata.append(pack_any(_usage_message(result.usage)))


def _usage_message(usage: ResourceUsage) -> worker_v1.ResourceUsage:
    return worker_v1.ResourceUsage(
        user_time=datetime.timedelta(seconds=usage.user_seconds),
        system_time=datetime.timedelta(seconds=usage.system_seconds),
        max_resident_bytes=usage.max_resident_bytes,
        minor_page_faults=usage.minor_page_faults,
        major_page_faults=usage.major_page_faults,
        blocks_read=usage.blocks_read,
        blocks_written=usage.blocks_written,
        voluntary_context_switches=usage.voluntary_context_switches,
        involuntary_context_switches=usage.involuntary_context_switches,
    )
