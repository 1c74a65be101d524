"""Which blobs are there, and how large they are; being asked about counts as being used.

Nothing about blobs is remembered in the process. Several processes may serve one environment, and what LMDB says is
true at once for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import BlobNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_cas.soon import Soon
    from lathe_cas.stores.lmdb_storage import LmdbStorage

T = TypeVar("T")

EMPTY_KEYS = frozenset(Digest.of(b"", function).key for function in DigestFunction)


class LmdbLookUps:
    """Look-ups in one store.

    Each answers at once, unless leases are over that have to be renewed before anybody hears of what has them.

    Args:
        storage: The environment with its writer.
    """

    def __init__(self, storage: LmdbStorage) -> None:
        self._storage = storage
        self._environment = storage.environment
        self._fresh = records.FreshRecords(storage.step(), storage.first_step_leased_on())

    def find_missing(self, wanted: Sequence[tuple[T, bytes, int]]) -> Soon[list[T]]:
        """Return the tokens of what is missing; see ``BlobStore``."""
        over: list[bytes] = []
        missing = self.missing_now(wanted, over)
        return self._find_renewed(wanted, missing, over) if over else missing

    async def _find_renewed(
        self, wanted: Sequence[tuple[T, bytes, int]], missing: list[T], over: list[bytes]
    ) -> list[T]:
        """Renew leases, and look again if something went before that could be done."""
        return missing if await self._storage.renew(over) else self.missing_now(wanted, [])

    def missing_now(self, wanted: Sequence[tuple[T, bytes, int]], over: list[bytes]) -> list[T]:
        """Return the tokens of what is missing, and add to ``over`` the keys of what is there and to be renewed."""
        try:
            return self._look_up(wanted, over)
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            over.clear()
            return [item[0] for item in wanted if self._is_lost(item, over)]

    def _is_lost(self, item: tuple[T, bytes, int], over: list[bytes]) -> bool:
        """Look one blob up, apart from others; what LMDB cannot look up is not there."""
        try:
            return bool(self._look_up((item,), over))
        except PAGE_ERRORS:
            return True

    def _look_up(self, wanted: Sequence[tuple[T, bytes, int]], over: list[bytes]) -> list[T]:
        missing: list[T] = []
        database = self._environment.blobs
        fresh = self._fresh_records()
        with self._environment.env.begin() as txn:
            get = txn.get
            for token, key, size_bytes in wanted:
                value = get(key, b"", database)
                # The way of nearly all look-ups: the blob is there and was used a moment ago.
                if value[:12] != fresh[size_bytes] and not self._is_there(key, size_bytes, value, over):
                    missing.append(token)
        self._storage.writer.look_at_touches()
        return missing

    def has(self, digest: Digest) -> bool:
        """Tell whether a blob is there, without that counting as its use."""
        try:
            self.record(digest)
        except BlobNotFoundError:
            return False
        return True

    def _fresh_records(self) -> records.FreshRecords:
        step = self._storage.step()
        if self._fresh.step != step:
            self._fresh = records.FreshRecords(step, self._storage.first_step_leased_on())
        return self._fresh

    def _is_there(self, key: bytes, size_bytes: int, value: bytes, over: list[bytes]) -> bool:
        """Tell whether a record, or none, is that of a blob with this size, and note its use."""
        if value[records.BLOB_SIZE] != records.SIZE.pack(size_bytes):
            return not size_bytes and key in EMPTY_KEYS
        self.note_use(key, value[records.BLOB_STEP], over)
        return True

    def note_use(self, key: bytes, step_bytes: bytes, over: list[bytes] | None) -> None:
        """Touch a blob if that is due; add its key to ``over`` instead where that would be too late."""
        fresh = self._fresh_records()
        if step_bytes >= fresh.step_bytes:
            return
        touches = self._storage.touches
        if over is not None and (step_bytes < fresh.leased_on_bytes or not touches.has_room()):
            over.append(key)
        else:
            touches.blobs.add(key)

    def find_sizes(self, keys: Sequence[bytes]) -> Soon[list[int | None]]:
        """Return the sizes of blobs, None for what is missing; see ``BlobStore``."""
        over: list[bytes] = []
        sizes = self._find_sizes(keys, over)
        return self._find_renewed_sizes(keys, sizes, over) if over else sizes

    async def _find_renewed_sizes(
        self, keys: Sequence[bytes], sizes: list[int | None], over: list[bytes]
    ) -> list[int | None]:
        return sizes if await self._storage.renew(over) else self._find_sizes(keys, [])

    def _find_sizes(self, keys: Sequence[bytes], over: list[bytes]) -> list[int | None]:
        try:
            return self._look_up_sizes(keys, over)
        except PAGE_ERRORS as error:
            self._storage.note_index_damage(error)
            # What LMDB cannot look up is not there; others are looked up apart from it.
            if len(keys) == 1:
                return [None]
            over.clear()
            return [self._find_sizes([key], over)[0] for key in keys]

    def _look_up_sizes(self, keys: Sequence[bytes], over: list[bytes]) -> list[int | None]:
        sizes: list[int | None] = []
        with self._environment.env.begin() as txn:
            for key in keys:
                value = txn.get(key, b"", self._environment.blobs)
                size_bytes = int.from_bytes(value[records.BLOB_SIZE], "big")
                sizes.append(size_bytes if self._is_there(key, size_bytes, value, over) else None)
        self._storage.writer.look_at_touches()
        return sizes

    def record(self, digest: Digest) -> records.BlobRecord:
        """Look a blob's record up, without that counting as its use.

        Raises:
            BlobNotFoundError: It is not there, or LMDB cannot look it up.
        """
        with self._environment.read() as txn:
            try:
                value = txn.get(digest.key, b"", self._environment.blobs)
            except PAGE_ERRORS as error:
                self._storage.note_index_damage(error)
                raise BlobNotFoundError(digest) from error
        if value[records.BLOB_SIZE] != records.SIZE.pack(digest.size_bytes):
            raise BlobNotFoundError(digest)
        return records.BlobRecord.unpack(value)
