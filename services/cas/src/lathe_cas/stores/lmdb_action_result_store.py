"""Action results in LMDB, in the same environment as the blobs they name."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, NamedTuple

import structlog
from typing_extensions import override

from lathe_cas.action_result_store import ActionResultStore, FoundActionResult, StoredActionResult
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_blob_store import EMPTY_KEYS
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, chunk_seed, cut, read_chunks
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_operations import DropDamagedActionResult, PutActionResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lmdb
    from lmdb import _Database as Database

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
        needs_touch: Whether ``touch`` is due if they are.
    """

    found: FoundActionResult
    references: list[tuple[bytes, int]]
    needs_touch: bool


class LmdbActionResultStore(ActionResultStore):
    """Action results in one LMDB environment.

    Args:
        storage: The environment, which holds the blobs, too.
    """

    def __init__(self, storage: LmdbStorage) -> None:
        self._storage = storage
        self._environment = storage.environment

    @override
    def get(self, instance_name: str, action_digest: Digest) -> FoundActionResult | None:
        try:
            return self._get(instance_name, action_digest)
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            return None

    def _get(self, instance_name: str, action_digest: Digest) -> FoundActionResult | None:
        digest_key = action_digest.key
        key = records.action_result_key(instance_name, digest_key)
        with self._environment.env.begin() as txn:
            fetched = self._fetch(txn, key)
            if fetched is None:
                return None
            record, payload = fetched
            end = record.references * (len(digest_key) + 8)
            is_due = record.step < self._storage.step()
            touched = self._find_references(txn, payload[:end], len(digest_key), all_are_due=is_due)
        if touched is None or not self._touch_all(key if is_due else None, touched):
            return None
        return FoundActionResult(payload[end:], not record.flags & records.REFERENCES_INCOMPLETE)

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
        return UncheckedActionResult(found, references, record.step < self._storage.step())

    def touch(self, instance_name: str, action_digest: Digest) -> bool:
        """Note that an action result was used; False if it is being evicted at this moment."""
        return self._touch_all(records.action_result_key(instance_name, action_digest.key), ())

    def _touch_all(self, key: bytes | None, blobs: Sequence[bytes]) -> bool:
        """Note that blobs were used, and an action result if given; False if one is being evicted at this moment.

        The action result is noted first, so that it is written first and never counts as used later than its blobs.
        """
        touches = self._storage.touches
        doomed = touches.doomed
        if key is not None:
            touches.action_results.add(key)
            if key in doomed:
                return False
        if not blobs:
            return True
        touches.blobs.update(blobs)
        self._storage.writer.look_at_touches()
        return doomed.isdisjoint(blobs)

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
        self, txn: lmdb.Transaction[bytes], packed: bytes, key_bytes: int, *, all_are_due: bool
    ) -> list[bytes] | None:
        """Return the references that need a touch; None if one is missing.

        Together with a touch of their action result all need one: it may be written in the next step.
        """
        database = self._environment.blobs
        step = records.STEP.pack(self._storage.step())
        get = txn.get
        touched: list[bytes] = []
        for key, size in _reference(key_bytes).iter_unpack(packed):
            value = get(key, b"", database)
            if value[:12] == size + step and not all_are_due:
                continue
            if value[:8] != size:
                return None
            if all_are_due or value[8:12] < step:
                touched.append(key)
        return touched

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
