"""An LMDB store in a folder, with a clock that stands still until it is moved."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from tests.contract.cas.recount import Recount, recount

from lathe_cas.eviction_policy import EvictionPolicy
from lathe_cas.stores.lmdb_action_result_store import LmdbActionResultStore
from lathe_cas.stores.lmdb_blob_store import LmdbBlobStore
from lathe_cas.stores.lmdb_operations import Nothing
from lathe_cas.stores.lmdb_storage import LmdbOptions, LmdbStorage

STEP_SECONDS = 300
UPLOAD_MAX_AGE_SECONDS = 86_400
MAP_BYTES = 1 << 30


class LmdbStore:
    """Both LMDB stores over one environment. Opened by ``open``, on the event loop that uses it."""

    def __init__(self, path: Path, limit_bytes: int = 1 << 30, *, compress_stored: bool = False) -> None:
        self.path = path
        self.now = 1_700_000_000.0
        self.options = LmdbOptions(
            policy=EvictionPolicy(limit_bytes),
            touch_step_seconds=STEP_SECONDS,
            upload_max_age_seconds=UPLOAD_MAX_AGE_SECONDS,
            threads=2,
            map_size_bytes=MAP_BYTES,
            compress_stored=compress_stored,
        )
        self.storage: LmdbStorage
        self.blobs: LmdbBlobStore
        self.results: LmdbActionResultStore

    async def open(self) -> None:
        self.storage = LmdbStorage(self.path, self.options, lambda: self.now)
        self.blobs = LmdbBlobStore(self.storage)
        self.results = LmdbActionResultStore(self.storage)

    async def close(self) -> None:
        await self.blobs.aclose()
        await self.storage.aclose()

    async def reopen(self, limit_bytes: int | None = None) -> None:
        await self.close()
        if limit_bytes is not None:
            self.options = dataclasses.replace(self.options, policy=EvictionPolicy(limit_bytes))
        await self.open()

    def configure_compression(self, *, on: bool) -> None:
        """Have what is written from the next opening on compressed, or not."""
        self.options = dataclasses.replace(self.options, compress_stored=on)

    async def settle(self) -> None:
        """Wait until all that was begun is done: background work, touches, upkeep."""
        await asyncio.sleep(0)
        await self.storage.writer.submit(Nothing())
        while self.storage.touches or self.storage.committer.has_pressing_upkeep:
            await self.storage.writer.submit(Nothing())
        # What says that nothing is left may have been said by a batch of upkeep alone that is not committed yet.
        await self.storage.writer.submit(Nothing())

    async def recount(self) -> Recount:
        await self.settle()
        return recount(self.storage.environment)
