"""The whole of it: look for what there is, see whether it is whole, and write it into a new store.

What leaves hold goes through one sorted temporary file, so memory does not grow with the number of blobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import lmdb

from lathe_cas.fsck.external_sort import ExternalSort
from lathe_cas.fsck.store_access import held_alone
from lathe_cas.salvage.entries import Found
from lathe_cas.salvage.new_store import new_store
from lathe_cas.salvage.outcome import Outcome
from lathe_cas.salvage.page_file import PageFile
from lathe_cas.salvage.page_map import PageMap
from lathe_cas.salvage.rescue import Rescue
from lathe_cas.stores.lmdb_records import FORMAT_VERSION, PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from lathe_cas.fsck.progress import Progress


class CannotSalvageError(Exception):
    """There is nothing to salvage, or nowhere to put it; the message says why."""


@dataclass(frozen=True, slots=True)
class SalvageOptions:
    """What to salvage, and where to.

    Attributes:
        path: The store's folder. Nothing in it is changed, but that ``lock.mdb`` is made if it is absent.
        target: The new store's folder: empty, or absent.
        limit_bytes: The limit of the store, for the size of the map.
        temp_dir: Where temporary files go: about 130 bytes for each blob and action result, 34 for each chunk.
        step: The current touch step.
    """

    path: Path
    target: Path
    limit_bytes: int
    temp_dir: Path
    step: int


def salvage(options: SalvageOptions, progress: Progress) -> Outcome:
    """Write all that is whole of a store into a new one.

    Raises:
        CannotSalvageError: There is no store, it is of another format, the target is not empty, or it cannot be
            written.
        StoreInUseError: A process has the store open.
        OSError: A folder or a file cannot be opened, made or written.
    """
    file_path = options.path / "data.mdb"
    if not file_path.exists():
        raise CannotSalvageError(f"{options.path} holds no store: there is no data.mdb")
    if options.target.exists() and any(options.target.iterdir()):
        raise CannotSalvageError(f"{options.target} is not empty: name a new folder, or remove what is in it")
    with held_alone(options.path), PageFile(file_path) as file, ExternalSort(options.temp_dir) as items:
        page_map = PageMap(file, progress)
        found = _look(page_map, items)
        if found.formats and FORMAT_VERSION not in found.formats:
            raise CannotSalvageError(
                f"{options.path} holds a store of format {max(found.formats)}, and this version of lathe-cas knows "
                f"format {FORMAT_VERSION} only"
            )
        if not found.owners and not found.formats:
            raise CannotSalvageError(f"no page of {PAGE_BYTES} bytes in {file_path} is one that lathe-cas wrote")
        return _write(options, file, page_map, found, items, progress)


def _look(page_map: PageMap, items: ExternalSort) -> Found:
    found = Found(items)
    for leaf in page_map.reached_leaves():
        found.take(leaf)
    if not (page_map.trees_are_whole and page_map.is_newest):
        for leaf in page_map.lost_leaves():
            found.take(leaf)
    return found


def _write(
    options: SalvageOptions,
    file: PageFile,
    page_map: PageMap,
    found: Found,
    items: ExternalSort,
    progress: Progress,
) -> Outcome:
    limit_bytes = max(options.limit_bytes, file.size_bytes)
    # The machine's clock may have been ahead once; the access log then goes by that.
    last_step = max(options.step, found.newest_step)
    try:
        with (
            ExternalSort(options.temp_dir) as lost,
            new_store(options.target, limit_bytes, found.id) as store,
            progress.phase("chunks", found.chunks),
        ):
            losses = Rescue(file, store, last_step, lost, progress).run(items.sorted())
    except lmdb.Error as error:
        raise CannotSalvageError(f"{options.target} cannot be written: {error}") from error
    return Outcome(
        saved=store.totals,
        counted=found.totals,
        losses=losses,
        malformed_records=found.malformed,
        malformed_pages=page_map.malformed_pages,
        malformed_nodes=page_map.malformed_nodes,
        unreadable_pages=file.unreadable_pages,
        trees_are_whole=page_map.trees_are_whole,
        state_is_known=page_map.is_newest and (page_map.trees_are_whole or page_map.free_is_known),
        has_id=bool(found.id),
    )
