"""Action results in LMDB, in the same environment as the blobs they name."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import struct
from typing import TYPE_CHECKING, NamedTuple

import structlog
from typing_extensions import override

from lathe_cas.action_result_store import ActionResultStore, FoundActionResult, StoredActionResult
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, chunk_seed, cut, read_chunks
from lathe_cas.stores.lmdb_committer import MAX_TOUCHES
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_look_ups import EMPTY_KEYS
from lathe_cas.stores.lmdb_operations import DropDamagedActionResult, PutActionResult, RenewLeases
from lathe_cas.stores.lmdb_quick_work import INLINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    import lmdb
    from lmdb import _Database as Database

    from lathe_cas.soon import Soon
    from lathe_cas.stores.lmdb_storage import LmdbStorage
    from lathe_shared.digest import Digest

_Get: TypeAlias = "Callable[[bytes, bytes, Database], bytes]"

INLINE_REFERENCES = 500
"""Up to so many references are looked for on the event loop, which takes 0.3 ms. A result may have a million."""

_TRIES = 3
"""How often what a large result names is touched before it, until no touch step, some minutes, ends meanwhile."""

_log = structlog.get_logger(__name__)


@functools.cache
def _reference(key_bytes: int) -> struct.Struct:
    """Return the form of one reference: the blob's key and its size as ``BlobRecord`` has it."""
    return struct.Struct(f">{key_bytes}s{records.SIZE.size}s")


class _TooLargeError(Exception):
    """An action result is to be looked up in a thread."""


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


class _LookedUp(NamedTuple):
    """An action result whose references are all there.

    Attributes:
        found: What to answer.
        key: Its own.
        step: When it was used last.
        now: When it was looked up.
        used: What it names.
    """

    found: FoundActionResult
    key: bytes
    step: int
    now: int
    used: UsedBlobs


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
        self._loop = asyncio.get_running_loop()

    @override
    def get(self, instance_name: str, action_digest: Digest) -> Soon[FoundActionResult | None]:
        try:
            looked_up = self._look_up(instance_name, action_digest, inline=True)
        except _TooLargeError:
            return self._get_in_thread(instance_name, action_digest)
        return None if looked_up is None else self._noted(looked_up)

    async def _get_in_thread(self, instance_name: str, action_digest: Digest) -> FoundActionResult | None:
        looked_up, is_noted = await self._loop.run_in_executor(
            self._storage.executor, self._look_up_and_note, instance_name, action_digest
        )
        if looked_up is None:
            return None
        return looked_up.found if is_noted else await self._noted_durably(looked_up)

    def _look_up_and_note(self, instance_name: str, action_digest: Digest) -> tuple[_LookedUp | None, bool]:
        """Do all that needs no waiting for the disk; returns whether the use is noted, too. In a thread."""
        looked_up = self._look_up(instance_name, action_digest, inline=False)
        return looked_up, looked_up is not None and self._note(looked_up)

    def _look_up(self, instance_name: str, action_digest: Digest, *, inline: bool) -> _LookedUp | None:
        """Look an action result up and all that it names, in one snapshot; in any thread.

        Raises:
            _TooLargeError: It is too large to be looked up ``inline``.
        """
        digest_key = action_digest.key
        key = records.action_result_key(instance_name, digest_key)
        try:
            with self._environment.env.begin() as txn:
                fetched = self._fetch(txn, key, inline=inline)
                if fetched is None:
                    return None
                record, payload = fetched
                end = record.references * (len(digest_key) + 8)
                now = self._storage.step()
                used = self._find_references(txn, payload[:end], len(digest_key), record.step, now)
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            return None
        if used is None:
            return None
        found = FoundActionResult(payload[end:], not record.flags & records.REFERENCES_INCOMPLETE)
        return _LookedUp(found, key, record.step, now, used)

    def get_unchecked(self, instance_name: str, action_digest: Digest) -> Soon[UncheckedActionResult | None]:
        """Return an action result whether its references are there or not. Touches nothing."""
        try:
            return self._get_unchecked(instance_name, action_digest, inline=True)
        except _TooLargeError:
            return self._loop.run_in_executor(
                self._storage.executor, lambda: self._get_unchecked(instance_name, action_digest, inline=False)
            )

    def _get_unchecked(
        self, instance_name: str, action_digest: Digest, *, inline: bool
    ) -> UncheckedActionResult | None:
        digest_key = action_digest.key
        try:
            with self._environment.env.begin() as txn:
                fetched = self._fetch(txn, records.action_result_key(instance_name, digest_key), inline=inline)
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
        step = unchecked.step
        return self._noted(_LookedUp(unchecked.found, key, step, self._storage.step(), UsedBlobs([], step)))

    def _noted(self, looked_up: _LookedUp) -> Soon[FoundActionResult | None]:
        """Note that an action result and blobs that it names were used, and return it."""
        return looked_up.found if self._note(looked_up) else self._noted_durably(looked_up)

    def _note(self, looked_up: _LookedUp) -> bool:
        """Note that an action result and blobs that it names were used; False if that has to be durable.

        That is so if a lease is over or about to end, or if too much waits to be noted. The action result is noted
        first, so that it is written first and never counts as used later than its blobs. In any thread; a few blobs at
        a time, since all threads wait for that.
        """
        storage, used = self._storage, looked_up.used
        if min(looked_up.step, used.oldest_step) < storage.first_step_leased_on():
            return False
        if (used.keys or looked_up.step < looked_up.now) and not storage.touches.has_room(1 + len(used.keys)):
            return False
        if looked_up.step < looked_up.now:
            storage.touches.action_results.add(looked_up.key)
        for start in range(0, len(used.keys), MAX_TOUCHES):
            storage.touches.blobs.update(used.keys[start : start + MAX_TOUCHES])
            storage.writer.look_at_touches()
        return True

    async def _noted_durably(self, looked_up: _LookedUp) -> FoundActionResult | None:
        key = looked_up.key if looked_up.step < looked_up.now else None
        return looked_up.found if await self._storage.renew(looked_up.used.keys, key) else None

    def _fetch(
        self, txn: lmdb.Transaction[bytes], key: bytes, *, inline: bool
    ) -> tuple[records.ActionResultRecord, bytes] | None:
        """Return an action result's record and payload; None if it is not there, or was found damaged.

        Raises:
            _TooLargeError: It is too large to be looked up ``inline``.
        """
        value = txn.get(key, None, self._environment.action_results)
        if value is None:
            return None
        record = records.ActionResultRecord.unpack(value)
        if inline and (record.references > INLINE_REFERENCES or record.payload_bytes > INLINE_BYTES):
            raise _TooLargeError
        try:
            pieces = _read_payload(txn, self._environment.chunks, key, record)
        except ChunkDamagedError as error:
            self._loop.call_soon_threadsafe(self._drop_damaged, key, error)
            return None
        return record, pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _find_references(
        self, txn: lmdb.Transaction[bytes], packed: bytes, key_bytes: int, step: int, now_step: int
    ) -> UsedBlobs | None:
        """Return the references that need a touch in step ``now_step``; None if one is missing.

        Together with a touch of their action result, used last in ``step``, all need one: it may be written in the
        next step.
        """
        database = self._environment.blobs
        now = records.STEP.pack(now_step)
        oldest = records.STEP.pack(step)
        all_are_due = oldest < now
        keys: list[bytes] = []
        for references, get in _parts(txn, database, packed, _reference(key_bytes)):
            for key, size in references:
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
        if len(stored.references) <= INLINE_REFERENCES and len(stored.action_result) <= INLINE_BYTES:
            await self._storage.writer.submit(_prepare(instance_name, action_digest, stored))
            return
        operation = await self._loop.run_in_executor(
            self._storage.executor, _prepare, instance_name, action_digest, stored
        )
        if len(operation.blobs) <= MAX_TOUCHES or not await self._put_large(operation):
            await self._storage.writer.submit(operation)

    async def _put_large(self, operation: PutActionResult) -> bool:
        """Touch what an action result names in bounded transactions, and store it after them.

        It must not count as used later than what it names. So it is stored only in the touch step in which they began.

        Returns:
            Whether it is stored; not if the step ended each time.
        """
        writer = self._storage.writer
        for _ in range(_TRIES):
            step = self._storage.step()
            for start in range(0, len(operation.blobs), MAX_TOUCHES):
                await writer.submit(RenewLeases((), operation.blobs[start : start + MAX_TOUCHES]))
            if await writer.submit(dataclasses.replace(operation, blobs=(), only_in_step=step)):
                return True
        return False

    def _drop_damaged(self, key: bytes, error: ChunkDamagedError) -> None:
        self._storage.damaged_action_results += 1
        _log.error("action_result_damaged", error=str(error))
        self._storage.writer.submit_background(DropDamagedActionResult(key, error.storage_id, error.unreadable))


def _parts(
    txn: lmdb.Transaction[bytes], database: Database, packed: bytes, reference: struct.Struct
) -> Iterable[tuple[Iterable[tuple[bytes, bytes]], _Get]]:
    """Give references, as keys and sizes, each part with what looks its records up.

    Each call of LMDB lets go of the GIL. In a thread beside a busy event loop a call for each would take it a
    millisecond or more to get that back: 96 s were measured for 100,000. So many are looked up in one call.
    """
    if len(packed) <= INLINE_REFERENCES * reference.size:
        return ((reference.iter_unpack(packed), txn.get),)
    return _large_parts(txn, database, packed, reference)


def _large_parts(
    txn: lmdb.Transaction[bytes], database: Database, packed: bytes, reference: struct.Struct
) -> Iterator[tuple[Iterable[tuple[bytes, bytes]], _Get]]:
    cursor = txn.cursor(database)
    part_bytes = MAX_TOUCHES * reference.size
    for start in range(0, len(packed), part_bytes):
        references = list(reference.iter_unpack(packed[start : start + part_bytes]))
        found = dict(cursor.getmulti([key for key, _ in references]))
        yield references, functools.partial(_get_found, found)


def _get_found(found: dict[bytes, bytes], key: bytes, default: bytes, _database: Database) -> bytes:
    return found.get(key, default)


def _prepare(instance_name: str, action_digest: Digest, stored: StoredActionResult) -> PutActionResult:
    """Put an action result and what it names into the form in which it is stored; in any thread."""
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
    blobs = [key for key, _ in stored.references]
    return PutActionResult(key, len(payload), cut(payload, seed), blobs, len(references), flags)


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
