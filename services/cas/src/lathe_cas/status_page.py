"""What ``/status`` shows: how full the store is, and what it did."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import lathe_cas

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_cas.blob_store import StoreStatus
    from lathe_cas.cas_metrics import CasCounters
    from lathe_cas.config import CasSettings


def status_page(
    settings: CasSettings, status: StoreStatus, counters: CasCounters, *, tls: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describe the CAS as something that JSON can express.

    Args:
        settings: What it was told.
        status: How full the store is.
        counters: What was done.
        tls: What the TLS port shows; None where there is none.
    """
    store = asdict(status)
    counts = store.pop("counters")
    return {
        "service": "cas",
        "version": lathe_cas.__version__,
        "processes": settings.processes,
        "instance_names": settings.instance_names or "any",
        "data_dirs": [str(path) for path in settings.all_data_dirs],
        "tls": tls,
        "http_cache": settings.http_cache,
        "store": store | {"full_percent": round(100 * status.stored_bytes / status.limit_bytes, 1)},
        "limits": {
            "max_size_bytes": settings.max_size_bytes,
            "lease_seconds": settings.lease_seconds,
            "max_age_seconds": settings.max_age_seconds,
            "high_watermark": settings.high_watermark,
            "low_watermark": settings.low_watermark,
            "max_batch_total_size_bytes": settings.max_batch_total_size_bytes,
            "upload_max_age_seconds": settings.upload_max_age_seconds,
        },
        "since_start": asdict(counters) | counts,
    }


def combine_status_pages(pages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make one page of those of several processes, which differ in what they did.

    Counts are added up. Of the ages of what was evicted it shows the least: the worst retention that any of them gave.
    """
    page = dict(pages[0])
    page["answering_processes"] = len(pages)
    counts = [each["since_start"] for each in pages]
    page["since_start"] = {name: sum(each[name] for each in counts) for name in counts[0]}
    ages = ("oldest_evicted_age_seconds", "least_evicted_age_seconds")
    page["store"] = page["store"] | {
        name: min((each["store"][name] for each in pages if each["store"][name] is not None), default=None)
        for name in ages
    }
    return page
