"""Action results in LMDB, in the same environment as the blobs they name."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, NamedTuple

import structlog
from typing_extensions import override

from lathe_cas.action_result_store import ActionResultStore, FoundActionResult, StoredActionResult
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, chunk_seed, cut, read_chunks
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_look_ups import EMPTY_KEYS
from lathe_cas.stores.lmdb_operations import DropDamagedActionResult, PutActionResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lmdb
    from lmdb import _Database as Database

    from lathe_cas.soon import Soon
    from lathe_cas.stores.lmdb_storage import LmdbStorage
    from lathe_shared.digest import Digest

_log = structlog.get_logger(__name__)


@functools.cache
def _reference(key_bytes: int) -> struct.Struct:
    """Return the form of one reference: the blob's key and its size as ``BlobRecord`` has it."""
    return struct.Struct(f">{key_bytes}s{records.SIZE.size}s")


class UncheckedActionResult(NamedTuple):
    """An action result whose references have still to be looked for.

    Attributes:
        found: What to answer if they are all there.
        references: Their keys and sizes.
        step: When it was used last.
    """

    found: FoundActionResult
    references: list[tuple[bytes, int]]
    step: int


class UsedBlobs(NamedTuple):
    """Blobs that an action result names, all of them there.

    Attributes:
        keys: Those that need a touch.
        oldest_step: When the one of them was used last that is unused for longest, or their action result was.
    """

    keys: list[bytes]
    oldest_step: int


class LmdbActionResultStore(ActionResultStore):
    """Action results in one LMDB environment.

    Args:
        storage: The environment, which holds the blobs, too.
    """

    def __init__(self, storage: LmdbStorage) -> None:
        self._storage = storage
        self._environment = storage.environment

    @override
    def get(self, instance_name: str, action_digest: Digest) -> Soon[FoundActionResult | None]:
        digest_key = action_digest.key
        key = records.action_result_key(instance_name, digest_key)
        try:
            with self._environment.env.begin() as txn:
                fetched = self._fetch(txn, key)
                if fetched is None:
                    return None
                record, payload = fetched
                end = record.references * (len(digest_key) + 8)
                used = self._find_references(txn, payload[:end], len(digest_key), record.step)
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            return None
        if used is None:
            return None
        found = FoundActionResult(payload[end:], not record.flags & records.REFERENCES_INCOMPLETE)
        return self._noted(found, key, record.step, used)

    def get_unchecked(self, instance_name: str, action_digest: Digest) -> UncheckedActionResult | None:
        """Return an action result whether its references are there or not. Touches nothing."""
        digest_key = action_digest.key
        try:
            with self._environment.env.begin() as txn:
                fetched = self._fetch(txn, records.action_result_key(instance_name, digest_key))
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            return None
        if fetched is None:
            return None
        record, payload = fetched
        end = record.references * (len(digest_key) + 8)
        references = [
            (key, records.SIZE.unpack(size)[0]) for key, size in _reference(len(digest_key)).iter_unpack(payload[:end])
        ]
        found = FoundActionResult(payload[end:], not record.flags & records.REFERENCES_INCOMPLETE)
        return UncheckedActionResult(found, references, record.step)

    def touched(
        self, instance_name: str, action_digest: Digest, unchecked: UncheckedActionResult
    ) -> Soon[FoundActionResult | None]:
        """Return what ``get_unchecked`` has found and note that it was used; None if it is gone by now."""
        key = records.action_result_key(instance_name, action_digest.key)
        return self._noted(unchecked.found, key, unchecked.step, UsedBlobs([], unchecked.step))

    def _noted(
        self, found: FoundActionResult, key: bytes, step: int, used: UsedBlobs
    ) -> Soon[FoundActionResult | None]:
        """Note that an action result and blobs that it names were used, and return it.

        The action result is noted first, so that it is written first and never counts as used later than its blobs.
        """
        storage = self._storage
        is_due = step < storage.step()
        if min(step, used.oldest_step) < storage.first_step_leased_on():
            return self._noted_durably(found, key if is_due else None, used.keys)
        if is_due:
            storage.touches.action_results.add(key)
        if used.keys:
            storage.touches.blobs.update(used.keys)
            storage.writer.look_at_touches()
        return found

    async def _noted_durably(
        self, found: FoundActionResult, key: bytes | None, blobs: Sequence[bytes]
    ) -> FoundActionResult | None:
        return found if await self._storage.renew(blobs, key) else None

    def _fetch(self, txn: lmdb.Transaction[bytes], key: bytes) -> tuple[records.ActionResultRecord, bytes] | None:
        """Return an action result's record and payload; None if it is not there, or was found damaged."""
        value = txn.get(key, None, self._environment.action_results)
        if value is None:
            return None
        record = records.ActionResultRecord.unpack(value)
        try:
            pieces = _read_payload(txn, self._environment.chunks, key, record)
        except ChunkDamagedError as error:
            self._drop_damaged(key, error)
            return None
        return record, pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _find_references(
        self, txn: lmdb.Transaction[bytes], packed: bytes, key_bytes: int, step: int
    ) -> UsedBlobs | None:
        """Return the references that need a touch; None if one is missing.

        Together with a touch of their action result, used last in ``step``, all need one: it may be written in the
        next step.
        """
        database = self._environment.blobs
        now = records.STEP.pack(self._storage.step())
        oldest = records.STEP.pack(step)
        all_are_due = oldest < now
        get = txn.get
        keys: list[bytes] = []
        for key, size in _reference(key_bytes).iter_unpack(packed):
            value = get(key, b"", database)
            if value[:12] == size + now and not all_are_due:
                continue
            if value[:8] != size:
                return None
            touched = value[8:12]
            if all_are_due or touched < now:
                keys.append(key)
                oldest = min(oldest, touched)
        return UsedBlobs(keys, records.STEP.unpack(oldest)[0])

    @override
    async def put(self, instance_name: str, action_digest: Digest, stored: StoredActionResult) -> None:
        digest_key = action_digest.key
        pack = _reference(len(digest_key)).pack
        references = [
            pack(key, records.SIZE.pack(size_bytes))
            for key, size_bytes in stored.references
            if size_bytes or key not in EMPTY_KEYS
        ]
        # The ActionResult of a successful action without outputs is no bytes at all; it then has no chunks either.
        payload = b"".join((*references, stored.action_result))
        key = records.action_result_key(instance_name, digest_key)
        flags = 0 if stored.expanded else records.REFERENCES_INCOMPLETE
        seed = chunk_seed(records.action_result_identity(key, len(payload), len(references), flags))
        await self._storage.writer.submit(
            PutActionResult(
                key, len(payload), cut(payload, seed), [key for key, _ in stored.references], len(references), flags
            )
        )

    def _drop_damaged(self, key: bytes, error: ChunkDamagedError) -> None:
        self._storage.damaged_action_results += 1
        _log.error("action_result_damaged", error=str(error))
        self._storage.writer.submit_background(DropDamagedActionResult(key, error.storage_id, error.unreadable))


def _read_payload(
    txn: lmdb.Transaction[bytes], database: Database, key: bytes, record: records.ActionResultRecord
) -> list[bytes]:
    """Copy the chunks of an action result out, and verify them and the record with them.

    Raises:
        ChunkDamagedError: A chunk is absent or damaged, or the record is.
    """
    if record.chunks != records.chunk_count(record.payload_bytes):
        raise ChunkDamagedError(record.storage_id, 0, f"{record.payload_bytes} bytes in {record.chunks} chunks")
    seed = chunk_seed(record.identity(key))
    return read_chunks(txn, database, record.storage_id, seed, 0, record.chunks)
