"""An LMDB store in a folder, with clocks that stand still until they are moved."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

from tests.contract.cas.recount import Recount, recount
from typing_extensions import override

from lathe_cas.eviction_policy import EvictionPolicy
from lathe_cas.stores.lmdb_action_result_store import LmdbActionResultStore
from lathe_cas.stores.lmdb_blob_store import LmdbBlobStore
from lathe_cas.stores.lmdb_operations import Nothing
from lathe_cas.stores.lmdb_storage import LmdbOptions, LmdbStorage
from lathe_shared.clock import Clock

STEP_SECONDS = 300
UPLOAD_MAX_AGE_SECONDS = 86_400
MAP_BYTES = 1 << 30
THREADS = 2


class LmdbStore:
    """Both LMDB stores over one environment. Opened by ``open``, on the event loop that uses it.

    Attributes:
        now: The time, which passes for both clocks.
        wall_error_seconds: By how much the wall clock is wrong.
        damaged_ids: Storage ids that a test has damaged; their chunks may be left over.
    """

    def __init__(
        self, path: Path, limit_bytes: int = 1 << 30, *, lease_seconds: int = 0, compress_stored: bool = False
    ) -> None:
        self.path = path
        self.now = 1_700_000_000.0
        self.wall_error_seconds = 0.0
        self.damaged_ids: set[int] = set()
        self.options = LmdbOptions(
            policy=EvictionPolicy(limit_bytes, lease_seconds=lease_seconds, touch_step_seconds=STEP_SECONDS),
            upload_max_age_seconds=UPLOAD_MAX_AGE_SECONDS,
            threads=THREADS,
            map_size_bytes=MAP_BYTES,
            compress_stored=compress_stored,
        )
        self.storage: LmdbStorage
        self.blobs: LmdbBlobStore
        self.results: LmdbActionResultStore

    def wall_seconds(self) -> float:
        return self.now + self.wall_error_seconds

    async def open(self) -> None:
        self.storage = LmdbStorage(self.path, self.options, _Clock(self))
        self.blobs = LmdbBlobStore(self.storage)
        self.results = LmdbActionResultStore(self.storage)

    async def close(self) -> None:
        await self.blobs.aclose()
        await self.storage.aclose()

    def set_policy(self, **changes: Any) -> None:
        """Change fields of the eviction policy, from the next ``open`` on."""
        self.options = dataclasses.replace(self.options, policy=dataclasses.replace(self.options.policy, **changes))

    async def reopen(self, limit_bytes: int | None = None) -> None:
        await self.close()
        if limit_bytes is not None:
            self.set_policy(limit_bytes=limit_bytes)
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

    async def settle_threads(self) -> None:
        """Wait until all that was left to threads is done, such as a segment that a read fetches in advance."""
        all_are_free = threading.Barrier(THREADS)
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(loop.run_in_executor(self.storage.executor, all_are_free.wait, 30) for _ in range(THREADS))
        )

    async def recount(self) -> Recount:
        await self.settle()
        return recount(self.storage.environment, self.damaged_ids)


class _Clock(Clock):
    """A store's two clocks."""

    def __init__(self, store: LmdbStore) -> None:
        self._store = store

    @override
    def wall_seconds(self) -> float:
        return self._store.wall_seconds()

    @override
    def monotonic(self) -> float:
        return self._store.now - 1_000_000_000

    @override
    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError
