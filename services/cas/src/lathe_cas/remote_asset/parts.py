"""What the Remote Asset API is made of: the composition root's part that is loaded only where it is configured."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from lathe_cas.remote_asset.archive import ArchiveLimits
from lathe_cas.remote_asset.host_patterns import HostPatterns
from lathe_cas.remote_asset.origin import Origin
from lathe_cas.remote_asset.remote_assets import FetchOptions, RemoteAssets
from lathe_cas.servicers.remote_asset import FetchServicer, PushServicer
from lathe_shared.clock import SystemClock
from lathe_shared.lifecycle import StartError

if TYPE_CHECKING:
    from pathlib import Path

    from lathe_cas.action_cache import ActionCache
    from lathe_cas.blob_store import BlobStore
    from lathe_cas.cas_metrics import CasCounters
    from lathe_cas.config import CasSettings
    from lathe_shared.instance_name import InstanceNames
    from lathe_shared.lifecycle import ServiceRuntime
    from lathe_shared.service_boundary import Servicer


def remote_asset_servicers(
    runtime: ServiceRuntime,
    settings: CasSettings,
    blobs: BlobStore,
    cache: ActionCache,
    instance_names: InstanceNames,
    counters: CasCounters,
) -> list[Servicer]:
    """Make the servicers of Fetch and Push, and have the runtime close what they use.

    Raises:
        StartError: ``remote_asset_authorities`` cannot be read.
    """
    options = FetchOptions(
        spool_directory=settings.all_data_dirs[0],
        timeout_seconds=settings.remote_asset_timeout_seconds,
        max_age_seconds=settings.remote_asset_max_age_seconds,
        limits=ArchiveLimits(settings.remote_asset_max_entries, settings.remote_asset_max_unpacked_bytes),
    )
    tls = _tls(settings.remote_asset_authorities)
    origin = Origin(HostPatterns(settings.remote_asset_hosts), settings.remote_asset_max_bytes, tls)
    assets = RemoteAssets(blobs, cache, origin, options, SystemClock().wall_seconds, counters)
    runtime.on_close(assets.aclose)
    functions = settings.offered_functions
    return [
        FetchServicer(assets, instance_names, functions),
        PushServicer(assets, instance_names, functions, allowed=settings.remote_asset_push),
    ]


def _tls(authorities: Path | None) -> ssl.SSLContext | None:
    if authorities is None:
        return None
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(authorities)
    except OSError as error:
        raise StartError(f"remote_asset_authorities {authorities} cannot be used: {error}") from None
    return context
