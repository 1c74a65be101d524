"""What is found in leaves, told apart by its form, and as bytes that sort by storage id: owners, then chunks by number.

No entry is believed for where it stands. That a key and a value have the form of a record is enough to have them tried;
the bytes that they lead to say whether they are right.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from lathe_cas.fsck.entries import INSTANCE_BYTES, is_digest_key
from lathe_cas.fsck.index_check import ACTION_RESULT_BYTES, BLOB_BYTES
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_access_log import GROUP_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lathe_cas.fsck.external_sort import ExternalSort
    from lathe_cas.salvage.lmdb_pages import Node
    from lathe_cas.salvage.page_map import PageOfNodes

_CHUNK_MARK = b"\xff"
"""Stands where an owner has its kind, and sorts behind those."""

_PLACE = struct.Struct(">QI")
_CHUNK = struct.Struct(">I8sQI")
_VALUE_BYTES = {KIND_ACTION_RESULT: ACTION_RESULT_BYTES, KIND_BLOB: BLOB_BYTES}
_STORAGE_ID_PLACE = {KIND_ACTION_RESULT: slice(4, 12), KIND_BLOB: slice(12, 20)}
_STEP_PLACE = {KIND_ACTION_RESULT: records.ACTION_RESULT_STEP, KIND_BLOB: records.BLOB_STEP}
_HEAD_BYTES = records.STORAGE_ID.size + 1

_FORMAT_KEY, _TOTALS_KEY, _ID_KEY = b"format", b"totals", b"id"
_RECORD_DATABASES = (b"blobs", b"action_results", b"chunks")


class Owner(NamedTuple):
    """A record that says that the chunks of a storage id are its own.

    Attributes:
        kind: As in the access log.
        key: The record's key.
        value: The record.
    """

    kind: int
    key: bytes
    value: bytes

    @property
    def step(self) -> int:
        """The touch step."""
        step: int = records.STEP.unpack(self.value[_STEP_PLACE[self.kind]])[0]
        return step

    def but_for_step(self) -> tuple[int, bytes, bytes]:
        """Return what two states of the same record have in common."""
        place = _STEP_PLACE[self.kind]
        return self.kind, self.key, self.value[: place.start] + self.value[place.stop :]


class ChunkPlace(NamedTuple):
    """Where in the file the bytes of a chunk should be."""

    number: int
    checksum: bytes
    place: int
    length: int


class Found:
    """Takes the entries of leaves.

    Args:
        items: Where to write down what may be whole.

    Attributes:
        owners: How many records were found.
        chunks: How many chunks.
        malformed: Entries of the databases with records and chunks that are neither.
        newest_step: The last touch step that the access log has.
        formats: Format versions.
        id: The environment's id, if it was found.
        totals: The newest totals.
    """

    def __init__(self, items: ExternalSort) -> None:
        self.owners = 0
        self.chunks = 0
        self.malformed = 0
        self.newest_step = 0
        self.formats: set[int] = set()
        self.id: bytes | None = None
        self.totals: records.Totals | None = None
        self._items = items

    def take(self, leaf: PageOfNodes) -> None:
        """Take a leaf's entries."""
        page = leaf.page
        add = self._items.add
        for node in leaf.leaf.nodes:
            key, length = node.key, node.length
            if node.is_subtree:
                continue
            if len(key) == records.CHUNK_KEY.size and 0 < length <= records.CHUNK_BYTES:
                add(key[:8] + _CHUNK_MARK + key[8:] + _PLACE.pack(node.place, length))
                self.chunks += 1
            elif node.is_big:
                self.malformed += leaf.database in _RECORD_DATABASES
            elif length == BLOB_BYTES and is_digest_key(key):
                self._add_owner(Owner(KIND_BLOB, key, node.value(page)))
            elif length == ACTION_RESULT_BYTES and is_digest_key(key[INSTANCE_BYTES:]):
                self._add_owner(Owner(KIND_ACTION_RESULT, key, node.value(page)))
            elif leaf.database in _RECORD_DATABASES:
                self.malformed += 1
            else:
                self._take_other(node, page)

    def _add_owner(self, owner: Owner) -> None:
        storage_id = owner.value[_STORAGE_ID_PLACE[owner.kind]]
        self._items.add(storage_id + bytes((owner.kind,)) + owner.value + owner.key)
        self.owners += 1

    def _take_other(self, node: Node, page: bytes) -> None:
        if len(node.key) == GROUP_KEY.size:
            self.newest_step = max(self.newest_step, GROUP_KEY.unpack(node.key)[0])
        elif node.key == _FORMAT_KEY:
            self.formats.add(int.from_bytes(node.value(page), "big"))
        elif node.key == _ID_KEY and self.id is None:
            self.id = node.value(page)
        elif node.key == _TOTALS_KEY:
            self._take_totals(node.value(page))

    def _take_totals(self, value: bytes) -> None:
        try:
            totals = records.Totals.unpack(value)
        except struct.error:
            return
        newest = self.totals
        if newest is None or totals.next_sequence > newest.next_sequence:
            self.totals = totals


class StorageItems(NamedTuple):
    """All that was found under one storage id.

    Attributes:
        owners: Records, in no order; of those that differ in the step alone the last.
        chunks: Chunks by number, 24 bytes each; there may be several of a number.
    """

    owners: list[Owner]
    chunks: bytes

    @property
    def chunk_count(self) -> int:
        """How many chunks were found."""
        return len(self.chunks) // _CHUNK.size

    def places(self) -> Iterator[ChunkPlace]:
        """Give the chunks by number."""
        return map(ChunkPlace._make, _CHUNK.iter_unpack(self.chunks))


def by_storage_id(items: Iterator[bytes]) -> Iterator[StorageItems]:
    """Give what ``Found`` wrote down, storage id by storage id, as far as there are owners."""
    current = b""
    owners: dict[tuple[int, bytes, bytes], Owner] = {}
    chunks = bytearray()
    for item in items:
        if item[:8] != current:
            if owners:
                yield StorageItems(list(owners.values()), bytes(chunks))
            current, owners = item[:8], {}
            chunks.clear()
        kind = item[8]
        if kind == _CHUNK_MARK[0]:
            if owners:
                chunks += item[_HEAD_BYTES:]
            continue
        key_start = _HEAD_BYTES + _VALUE_BYTES[kind]
        owner = Owner(kind, item[key_start:], item[_HEAD_BYTES:key_start])
        what = owner.but_for_step()
        if what not in owners or owners[what].step < owner.step:
            owners[what] = owner
    if owners:
        yield StorageItems(list(owners.values()), bytes(chunks))
