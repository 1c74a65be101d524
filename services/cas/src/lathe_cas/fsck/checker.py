"""The whole check, pass by pass, and the repair after it.

Each pass goes through its databases once, in their own order. What one pass has to tell the next goes through sorted
temporary files, so memory does not grow with the store.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lmdb
import lmdb.verify

from lathe_cas.fsck.chunk_check import ChunkCheck
from lathe_cas.fsck.external_sort import ExternalSort
from lathe_cas.fsck.findings import Findings, Problem
from lathe_cas.fsck.index_check import IndexCheck
from lathe_cas.fsck.repairs import CORRECTED_TOTALS, Repair, Repairs
from lathe_cas.fsck.store_access import opened_alone, opened_for_reading
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_environment import StorageFormatError

if TYPE_CHECKING:
    from pathlib import Path

    from lathe_cas.fsck.progress import Progress
    from lathe_cas.stores.lmdb_environment import LmdbEnvironment

_COUNTER_LIMIT = 1 << 63
"""A counter beyond this is damage."""


class CannotCheckError(Exception):
    """There is nothing that could be checked; the message says why."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What to check, and how.

    Attributes:
        path: The store's folder.
        limit_bytes: Its limit, for the size of the map.
        temp_dir: Where temporary files go: about 130 bytes for each blob and action result.
        repair: Whether to drop what is bad.
        digests: Whether to hash every blob.
        step: The current touch step.
    """

    path: Path
    limit_bytes: int
    temp_dir: Path
    repair: bool
    digests: bool
    step: int


def check_store(options: CheckOptions, progress: Progress) -> Findings:
    """Check a store, and repair it if that is wanted.

    Raises:
        StoreInUseError: It is to be repaired, and a process has it open.
        CannotCheckError: It cannot be opened, and its pages do not say why.
        OSError: A file cannot be read or written.
    """
    findings = Findings()
    if not (options.path / "data.mdb").exists():
        raise CannotCheckError(f"{options.path} holds no store: there is no data.mdb")
    opened = opened_alone if options.repair else opened_for_reading
    try:
        with opened(options.path, options.limit_bytes) as environment:
            _check(environment, options, findings, progress)
    except (lmdb.Error, StorageFormatError) as error:
        if not findings.problems[Problem.PAGES]:
            _check_pages(options.path, findings, progress)
        if not findings.problems[Problem.PAGES]:
            raise CannotCheckError(str(error)) from error
    return findings


def _check(environment: LmdbEnvironment, options: CheckOptions, findings: Findings, progress: Progress) -> None:
    with Repairs(options.temp_dir) as repairs:
        # One snapshot for all: a service beside this may write, but reuses no page that is seen here.
        with environment.env.begin(buffers=True) as txn:
            _check_pages(options.path, findings, progress)
            if findings.problems[Problem.PAGES]:
                return
            counted = _check_entries(txn, environment, options, findings, repairs, progress)
            stored = _stored_totals(txn, environment)
            if stored != counted:
                findings.add(Problem.TOTALS, _difference(stored, counted))
        if options.repair and findings.problems.total():
            Repair(environment, options.step, counted.next_sequence, findings, progress).run(repairs)
            _correct_totals(environment, options, counted, findings, progress)


def _check_pages(path: Path, findings: Findings, progress: Progress) -> None:
    """Check the B-trees as such, by reading the file without LMDB, which a damaged page could bring down."""
    problems: list[str] = []
    with progress.ticking("pages of the file"):
        try:
            problems = lmdb.verify.verify(str(path))  # type: ignore[no-untyped-call]
        except (lmdb.verify.VerifyError, OSError) as error:
            # The file could be opened, so what cannot be read is a part of the disk.
            problems = [str(error)]
    for problem in problems:
        findings.add(Problem.PAGES, problem)


def _check_entries(
    txn: lmdb.Transaction[memoryview],
    environment: LmdbEnvironment,
    options: CheckOptions,
    findings: Findings,
    repairs: Repairs,
    progress: Progress,
    *,
    chunks: bool = True,
) -> records.Totals:
    """Check what is in the databases, and return the totals that there should be."""
    index = IndexCheck(txn, environment, findings, repairs, progress)
    with ExternalSort(options.temp_dir) as owners:
        with ExternalSort(options.temp_dir) as entries:
            index.read_log(entries)
            index.check(entries.sorted(), owners)
        totals = index.totals
        if chunks:
            check = ChunkCheck(txn, environment, findings, repairs, progress, digests=options.digests)
            check.run(owners.sorted())
            totals.next_storage_id = max(totals.next_storage_id, check.next_storage_id)
    stored = _stored_totals(txn, environment)
    if stored is not None:
        # The counters may be ahead of what is there; they must not be behind.
        if totals.next_storage_id <= stored.next_storage_id < _COUNTER_LIMIT:
            totals.next_storage_id = stored.next_storage_id
        if totals.next_sequence <= stored.next_sequence < _COUNTER_LIMIT:
            totals.next_sequence = stored.next_sequence
    return totals


def _stored_totals(txn: lmdb.Transaction[memoryview], environment: LmdbEnvironment) -> records.Totals | None:
    with contextlib.suppress(StorageFormatError, struct.error):
        return environment.totals_in(txn)
    return None


def _difference(stored: records.Totals | None, counted: records.Totals) -> str:
    if stored is None:
        return "there are none"
    names = type(counted).__slots__
    different = [name for name in names if getattr(stored, name) != getattr(counted, name)]
    return ", ".join(f"{name} {getattr(stored, name)} instead of {getattr(counted, name)}" for name in different)


def _correct_totals(
    environment: LmdbEnvironment, options: CheckOptions, before: records.Totals, findings: Findings, progress: Progress
) -> None:
    """Count what is left after the repair."""
    with Repairs(options.temp_dir) as rest, environment.env.begin(buffers=True) as txn:
        left = Findings()
        totals = _check_entries(txn, environment, options, left, rest, progress, chunks=False)
    totals.next_storage_id = max(totals.next_storage_id, before.next_storage_id)
    with environment.env.begin(write=True) as write:
        environment.put_totals(write, totals)
    findings.repairs[CORRECTED_TOTALS] += 1
