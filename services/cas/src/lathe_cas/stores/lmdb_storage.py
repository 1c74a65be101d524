"""Everything that the LMDB stores share: one environment with its writer, its threads and its touches."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from lathe_cas.compression.zstd_encoder import DEFAULT_LEVEL, ZstdEncoder
from lathe_cas.stores import lmdb_access_log as access_log
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_committer import MAX_TOUCHES, LmdbCommitter
from lathe_cas.stores.lmdb_environment import LmdbEnvironment, map_size_for
from lathe_cas.stores.lmdb_operations import RenewLeases
from lathe_cas.stores.lmdb_writer import LmdbWriter
from lathe_cas.stores.store_clock import StoreClock
from lathe_shared.errors import LatheError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import lmdb

    from lathe_cas.eviction_policy import EvictionPolicy
    from lathe_shared.clock import Clock

UPLOAD_MAX_AGE_SECONDS = 24 * 3600
"""Unfinished uploads that got nothing for a day are forgotten: far longer than any client tries to resume."""


_log = structlog.get_logger(__name__)


class StoreGivenUpError(Exception):
    """LMDB does nothing more with an environment in this process."""


@dataclass(frozen=True, slots=True)
class LmdbOptions:
    """How an LMDB store behaves.

    Attributes:
        policy: The size limit, and how long what was used is kept.
        upload_max_age_seconds: When an unfinished upload counts as abandoned.
        threads: Threads that hash and that read large blobs; None means two more than there are processors.
        compress_stored: Whether what clients send uncompressed is compressed where that is worth it.
        zstd_level: Level of what the store compresses itself.
        map_size_bytes: Address space; None means far more than the limit needs. Tests make it small.
    """

    policy: EvictionPolicy
    upload_max_age_seconds: int = UPLOAD_MAX_AGE_SECONDS
    threads: int | None = None
    map_size_bytes: int | None = None
    compress_stored: bool = False
    zstd_level: int = DEFAULT_LEVEL


class LmdbStorage:
    """An open environment that is ready to be written. Made on the event loop that uses it, after the last fork.

    Args:
        path: The folder of the environment.
        options: How it behaves.
        clock: The machine's clocks, or the clock of all processes that share the environment.

    Attributes:
        seconds: The store's clock.
        damaged_blobs: Blobs that were found damaged, and dropped.
        damaged_action_results: Action results likewise.

    Raises:
        StorageFormatError: The folder holds a store of another format.
    """

    def __init__(self, path: Path, options: LmdbOptions, clock: Clock | StoreClock) -> None:
        self.damaged_blobs = 0
        self.damaged_action_results = 0
        self._index_is_damaged = False
        self.options = options
        self.environment = LmdbEnvironment(path, _map_size(path, options))
        if not isinstance(clock, StoreClock):
            clock = StoreClock(clock, newest_seconds(self.environment, options))
        self.seconds = clock.seconds
        self.touches = Touches(self.step)
        self.committer = LmdbCommitter(
            self.environment, options.policy, self.touches, self.seconds, options.upload_max_age_seconds
        )
        self.executor = ThreadPoolExecutor(
            options.threads or (os.cpu_count() or 1) + 2, thread_name_prefix="lathe-cas-io"
        )
        self.writer = LmdbWriter(self.committer, self.touches)
        self.encoder = ZstdEncoder(options.zstd_level)

    def note_index_damage(self, error: lmdb.Error) -> None:
        """Log that LMDB came upon a damaged page of an index; once, since every look-up that goes there will."""
        if not self._index_is_damaged:
            self._index_is_damaged = True
            _log.error(
                "index_damaged", error=str(error), effect="what lies there counts as missing; run lathe-cas fsck"
            )

    def step(self) -> int:
        """Return the current touch step."""
        return int(self.seconds()) // self.options.policy.touch_step_seconds

    def first_step_leased_on(self) -> int:
        """Return the first touch step whose leases last for another step at least."""
        return self.options.policy.first_step_leased_on(self.step())

    async def renew(self, blobs: Sequence[bytes], action_result: bytes | None = None) -> bool:
        """Note that things are used now whose lease is over or about to end; returns when that is durable.

        Until then any process that shares the environment may be evicting them, so nobody should be told before that
        they are there. If it cannot be made durable, for want of disk space, they are noted as other uses are, as long
        as not too many wait, since a store that can still be read should be.

        Args:
            blobs: Keys of blobs.
            action_result: Key of an action result that names them, which is noted with the first of them.

        Returns:
            Whether all of them were there.
        """
        results = () if action_result is None else (action_result,)
        all_are_there = True
        try:
            # In slices, so that no transaction becomes so long that others notice.
            for start in range(0, max(1, len(blobs)), MAX_TOUCHES):
                first = () if start else results
                all_are_there &= await self.writer.submit(RenewLeases(first, blobs[start : start + MAX_TOUCHES]))
        except LatheError as error:
            _log.warning("leases_not_renewed", error=str(error), blobs=len(blobs))
            if self.touches.has_room(len(results) + len(blobs)):
                self.touches.action_results.update(results)
                self.touches.blobs.update(blobs)
        return all_are_there

    async def watch(self) -> None:
        """Wait until only another process can go on with the environment, if ever.

        Raises:
            StoreGivenUpError: That is so.
        """
        await self.writer.given_up
        raise StoreGivenUpError(f"{self.environment.path}: LMDB could not write a meta page and has given the file up")

    async def aclose(self) -> None:
        """Finish what was begun and close the files."""
        await asyncio.to_thread(self.executor.shutdown)
        await self.writer.aclose()
        self.environment.close()


def newest_seconds(environment: LmdbEnvironment, options: LmdbOptions) -> float:
    """Return the latest time that a store has seen, by its log: the beginning of a touch step, 0 if it is new."""
    with environment.read() as txn:
        return access_log.newest_step(txn, environment.access) * options.policy.touch_step_seconds


def prepare_store(path: Path, options: LmdbOptions) -> float:
    """Make a store or check that it can be opened, and close it again: for who will fork processes that open it.

    Returns:
        ``newest_seconds``.

    Raises:
        StorageFormatError: The folder holds a store of another format.
    """
    environment = LmdbEnvironment(path, _map_size(path, options))
    try:
        return newest_seconds(environment, options)
    finally:
        environment.close()


def _map_size(path: Path, options: LmdbOptions) -> int:
    return options.map_size_bytes or map_size_for(options.policy.limit_bytes, path)
