"""Action results in several environments, with the blobs that they name wherever those are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_cas.action_result_store import ActionResultStore, FoundActionResult, StoredActionResult
from lathe_cas.soon import settled
from lathe_cas.stores.lmdb_action_result_store import INLINE_REFERENCES, UncheckedActionResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from lathe_cas.blob_store import BlobStore
    from lathe_cas.soon import Soon
    from lathe_cas.stores.lmdb_action_result_store import LmdbActionResultStore
    from lathe_cas.stores.shard_map import ShardMap
    from lathe_shared.digest import Digest


class ShardedActionResultStore(ActionResultStore):
    """Action results in several LMDB stores.

    The blobs of one result are in as many environments, and no transaction covers them all. What is found is leased for
    minutes at least, so when the last blob has been found, the first one is still there.

    Args:
        shards: The stores.
        shard_map: Which of them an action digest belongs to.
        blobs: Where the blobs are.
    """

    def __init__(self, shards: Sequence[LmdbActionResultStore], shard_map: ShardMap, blobs: BlobStore) -> None:
        self._shards = shards
        self._map = shard_map
        self._blobs = blobs

    def _shard(self, digest: Digest) -> LmdbActionResultStore:
        return self._shards[self._map.place(digest.key)]

    @override
    def get(self, instance_name: str, action_digest: Digest) -> Soon[FoundActionResult | None]:
        shard = self._shard(action_digest)
        unchecked = shard.get_unchecked(instance_name, action_digest)
        if unchecked is None:
            return None
        if not isinstance(unchecked, UncheckedActionResult):
            return self._get_large(instance_name, action_digest, unchecked)
        missing = self._blobs.find_missing([(None, key, size_bytes) for key, size_bytes in unchecked.references])
        if not isinstance(missing, list):
            return self._get_later(missing, lambda: shard.touched(instance_name, action_digest, unchecked))
        return None if missing else shard.touched(instance_name, action_digest, unchecked)

    @staticmethod
    async def _get_later(
        missing: Awaitable[list[None]], touched: Callable[[], Soon[FoundActionResult | None]]
    ) -> FoundActionResult | None:
        return None if await missing else await settled(touched())

    async def _get_large(
        self, instance_name: str, action_digest: Digest, answer: Awaitable[UncheckedActionResult | None]
    ) -> FoundActionResult | None:
        """Look for many references beside other requests."""
        unchecked = await answer
        if unchecked is None:
            return None
        for start in range(0, len(unchecked.references), INLINE_REFERENCES):
            references = unchecked.references[start : start + INLINE_REFERENCES]
            if await settled(self._blobs.find_missing([(None, key, size_bytes) for key, size_bytes in references])):
                return None
            await asyncio.sleep(0)
        return await settled(self._shard(action_digest).touched(instance_name, action_digest, unchecked))

    @override
    async def put(self, instance_name: str, action_digest: Digest, stored: StoredActionResult) -> None:
        await self._shard(action_digest).put(instance_name, action_digest, stored)
