"""Eviction by the access log, and the sweep that keeps the log short."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_cas.stores import lmdb_access_log as access_log
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT

if TYPE_CHECKING:
    from lathe_cas.stores.lmdb_batch import WriteBatch


_LOOKS_PER_EVICTION = 16
"""A stale entry costs one look-up, in pages that its neighbours need too. What goes costs some 20 us with its share of
the commit, since its record lies in a page of its own that has to be written."""


class EvictionEffort:
    """What may still be spent on eviction: a bound for a transaction's length, however small what goes is.

    Args:
        max_evicted: How many things may go, if no entry is stale; of those that are, sixteen count as one.
    """

    def __init__(self, max_evicted: int) -> None:
        self._max_looks = max_evicted * _LOOKS_PER_EVICTION
        self._looks = 0

    @property
    def is_spent(self) -> bool:
        """Whether nothing more may be looked at."""
        return self._looks >= self._max_looks

    @property
    def evicted(self) -> int:
        """How many evictions that was worth so far."""
        return self._looks // _LOOKS_PER_EVICTION

    def spend(self, *, evicted: bool) -> None:
        """Count an entry that was looked at."""
        self._looks += _LOOKS_PER_EVICTION if evicted else 1


def evict(batch: WriteBatch, wanted_bytes: int, effort: EvictionEffort, before_step: int | None = None) -> int:
    """Drop the least recently used until ``wanted_bytes`` on disk are free, or nothing is left that may go.

    What the batch itself has written is not in the log until ``flush_log``.

    Args:
        batch: The transaction to do it in.
        wanted_bytes: Bytes on disk to free.
        effort: What may be spent on it; it ends earlier if that is spent.
        before_step: Only what was used before this step goes; the first leased one if absent.

    Returns:
        Bytes on disk that were freed or became garbage.
    """
    if before_step is None:
        before_step = batch.policy.first_leased_step(batch.step)
    freed = 0
    while freed < wanted_bytes and not effort.is_spent:
        group = access_log.first_group(batch.txn, batch.environment.access)
        if group is None or group.step >= before_step:
            break
        looked_at = 0
        for key in group.keys:
            if freed >= wanted_bytes or effort.is_spent:
                break
            freed_here = _evict_one(batch, group, key)
            effort.spend(evicted=freed_here > 0)
            freed += freed_here
            looked_at += 1
        access_log.replace_group(batch.txn, batch.environment.access, group, group.keys[looked_at:])
        batch.totals.log_entries -= looked_at
    return freed


def _evict_one(batch: WriteBatch, group: access_log.Group, key: bytes) -> int:
    """Drop what a log entry stands for, if the entry is live; return its bytes on disk, zero if the entry is stale."""
    database, place = batch.index_of(group.kind)
    value = batch.txn.get(key, db=database)
    if value is None or value[place] != records.STEP.pack(group.step):
        return 0
    report = batch.report
    report.note_evicted_age(batch.policy.least_age_seconds(group.step, batch.step))
    if group.kind == KIND_ACTION_RESULT:
        result = records.ActionResultRecord.unpack(value)
        batch.drop_action_result(key, result, is_cold=True)
        report.evicted_action_results += 1
        return result.disk_bytes
    blob = records.BlobRecord.unpack(value)
    batch.drop_blob(key, blob, is_cold=True)
    report.evicted_blobs += 1
    report.evicted_bytes += blob.size_bytes
    return blob.disk_bytes


def sweep_log(batch: WriteBatch, after: bytes) -> bytes:
    """Drop the stale entries of one group of the access log.

    Args:
        batch: The transaction to do it in.
        after: The key at which the last sweep ended; empty at the beginning.

    Returns:
        The key to go on behind; empty if the end was reached.
    """
    group = access_log.first_group(batch.txn, batch.environment.access, after)
    if group is None:
        return b""
    database, place = batch.index_of(group.kind)
    step = records.STEP.pack(group.step)
    kept = [
        key
        for key in dict.fromkeys(group.keys)
        if (value := batch.txn.get(key, db=database)) is not None and value[place] == step
    ]
    if len(kept) < len(group.keys):
        access_log.replace_group(batch.txn, batch.environment.access, group, kept)
        batch.totals.log_entries -= len(group.keys) - len(kept)
    return group.raw_key
