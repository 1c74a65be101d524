"""Composition root: the only module that names concrete parts."""

from __future__ import annotations

import contextlib
import functools
import shutil
from typing import TYPE_CHECKING, cast

import lmdb
import structlog

from lathe_cas.action_cache import ActionCache
from lathe_cas.blob_chunking import BlobChunking
from lathe_cas.cas_metrics import CasCounters, CasMetrics, HttpCacheCounts
from lathe_cas.http_cache.opaque_values import OpaqueValues
from lathe_cas.http_cache.requests import HttpCache
from lathe_cas.servicers.action_cache import ActionCacheServicer
from lathe_cas.servicers.blob_chunking import BlobChunkingServicer
from lathe_cas.servicers.byte_stream import ByteStreamServicer
from lathe_cas.servicers.capabilities import CapabilitiesServicer
from lathe_cas.servicers.content_addressable_storage import ContentAddressableStorageServicer
from lathe_cas.status_page import combine_status_pages, status_page
from lathe_cas.stores.lmdb_action_result_store import LmdbActionResultStore
from lathe_cas.stores.lmdb_blob_store import LmdbBlobStore
from lathe_cas.stores.lmdb_environment import StorageFormatError
from lathe_cas.stores.lmdb_storage import LmdbStorage, prepare_store
from lathe_cas.stores.shard_map import ShardMap
from lathe_cas.stores.sharded_action_result_store import ShardedActionResultStore
from lathe_cas.stores.sharded_blob_store import ShardedBlobStore
from lathe_cas.stores.store_clock import StoreClock
from lathe_shared.clock import SystemClock
from lathe_shared.instance_name import InstanceNames
from lathe_shared.lifecycle import StartError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aiohttp.web import RouteDef

    from lathe_cas.action_result_store import ActionResultStore
    from lathe_cas.blob_store import BlobStore
    from lathe_cas.config import CasSettings
    from lathe_shared.lifecycle import BuildFunction, ServiceRuntime
    from lathe_shared.service_boundary import Servicer
    from lathe_shared.tls import ServerTls

_log = structlog.get_logger("lathe.cas")


def prepare(settings: CasSettings) -> BuildFunction:
    """Do what comes before several processes are started: make or check the stores, and begin their common clock.

    Raises:
        StartError: A data directory cannot be used.
    """
    newest_seconds = 0.0
    for path in settings.all_data_dirs:
        with _explained(path):
            newest_seconds = max(newest_seconds, prepare_store(path, settings.storage_options()))
    return functools.partial(build, clock=StoreClock(SystemClock(), newest_seconds))


async def build(runtime: ServiceRuntime, clock: StoreClock | None = None) -> None:
    """Put the CAS's parts onto a runtime.

    Args:
        runtime: The runtime.
        clock: The clock of all processes that share the data directories; a new one if absent.

    Raises:
        StartError: The data directory cannot be used.
    """
    settings = cast("CasSettings", runtime.settings)
    blobs, results = _open_stores(runtime, settings, clock)
    counters = CasCounters()
    CasMetrics(runtime.metrics, counters, blobs.status)
    chunking_parameters = settings.chunking_parameters()
    chunking = BlobChunking(blobs, results, chunking_parameters, counters)
    runtime.on_close(chunking.aclose)
    instance_names = InstanceNames(settings.instance_names)
    action_cache = ActionCache(results, blobs)
    functions = settings.offered_functions
    batch_bytes = settings.max_batch_total_size_bytes
    servicers: list[Servicer] = [
        ContentAddressableStorageServicer(blobs, instance_names, functions, batch_bytes, counters),
        BlobChunkingServicer(chunking, instance_names, functions),
        ByteStreamServicer(blobs, instance_names, functions, counters),
        ActionCacheServicer(action_cache, instance_names, functions, counters),
        CapabilitiesServicer(instance_names, functions, batch_bytes, settings.max_size_bytes_each, chunking_parameters),
    ]
    if settings.remote_asset:
        from lathe_cas.remote_asset.parts import remote_asset_servicers  # an HTTP client that most do without

        servicers += remote_asset_servicers(runtime, settings, blobs, action_cache, instance_names, counters)
    runtime.add_grpc_port(servicers, settings.port)
    tls = _add_tls_port(runtime, settings, servicers)
    routes: list[RouteDef] = []
    if settings.http_cache != "off":
        http_cache = HttpCache(
            blobs,
            action_cache,
            OpaqueValues(results),
            instance_names,
            functions,
            counters,
            HttpCacheCounts(runtime.metrics),
            writable=settings.http_cache == "read-write",
            max_body_bytes=min(settings.http_cache_max_body_bytes, settings.max_size_bytes_each),
        )
        runtime.on_drain(http_cache.drain)
        routes = http_cache.routes()
    runtime.add_http_port(
        lambda: status_page(settings, blobs.status(), counters, tls=None if tls is None else tls.describe()),
        routes=routes,
        combine=combine_status_pages,
    )


def _add_tls_port(runtime: ServiceRuntime, settings: CasSettings, servicers: list[Servicer]) -> ServerTls | None:
    if settings.tls_port is None:
        return None
    from lathe_cas.tls_port import open_tls  # a quarter of a second and 10 MB that a plain CAS does without

    tls = open_tls(settings)
    runtime.add_task("tls_certificate", tls.keep_current())
    runtime.add_grpc_port(servicers, settings.tls_port, name="tls", ssl=tls.context)
    return tls


def _open_stores(
    runtime: ServiceRuntime, settings: CasSettings, clock: StoreClock | None
) -> tuple[BlobStore, ActionResultStore]:
    """Open every data directory, and make one store of them."""
    blobs: list[LmdbBlobStore] = []
    results: list[LmdbActionResultStore] = []
    ids: list[bytes] = []
    for path in settings.all_data_dirs:
        with _explained(path):
            storage = LmdbStorage(path, settings.storage_options(), clock or SystemClock())
        if runtime.member is None or not runtime.member.number:
            _warn_of_small_disk(storage, path, settings)
        runtime.on_close(storage.aclose)
        # It would answer every request with an error for as long as it lives, where one that is started anew serves.
        runtime.add_task("store", storage.watch())
        blobs.append(LmdbBlobStore(storage))
        runtime.on_close(blobs[-1].aclose)
        results.append(LmdbActionResultStore(storage))
        ids.append(storage.environment.id)
    if len(ids) == 1:
        return blobs[0], results[0]
    if len(set(ids)) < len(ids):
        raise StartError("data_dirs: one of them is a copy of another; give each disk a store of its own")
    shard_map = ShardMap(ids)
    all_blobs = ShardedBlobStore(blobs, shard_map)
    return all_blobs, ShardedActionResultStore(results, shard_map, all_blobs)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what keeps a data directory from being used into what an operator is told."""
    try:
        yield
    except StorageFormatError as error:
        raise StartError(str(error)) from None
    except (OSError, lmdb.Error) as error:
        raise StartError(f"data_dir {path} cannot be used: {error}") from error


def _warn_of_small_disk(storage: LmdbStorage, path: Path, settings: CasSettings) -> None:
    limit_bytes = settings.max_size_bytes_each
    possible_bytes = shutil.disk_usage(path).free + storage.environment.file_bytes()
    if possible_bytes < limit_bytes:
        # Not refused: the disk may grow, and what does not fit is answered RESOURCE_EXHAUSTED.
        _log.warning(
            "limit_beyond_disk",
            data_dir=str(path),
            limit_bytes=limit_bytes,
            possible_bytes=possible_bytes,
            effect="the disk is full before old data goes; lower max_size_bytes",
        )
