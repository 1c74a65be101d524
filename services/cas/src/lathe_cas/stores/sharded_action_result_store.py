"""Action results in several environments, with the blobs that they name wherever those are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_cas.action_result_store import ActionResultStore, FoundActionResult, StoredActionResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_cas.blob_store import BlobStore
    from lathe_cas.stores.lmdb_action_result_store import LmdbActionResultStore
    from lathe_cas.stores.shard_map import ShardMap
    from lathe_shared.digest import Digest


class ShardedActionResultStore(ActionResultStore):
    """Action results in several LMDB stores.

    The blobs of one result are in as many environments, and no transaction covers them all. What is found is touched,
    and what was touched is not evicted, so when the last blob has been found, the first one is still there.

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
    def get(self, instance_name: str, action_digest: Digest) -> FoundActionResult | None:
        shard = self._shard(action_digest)
        unchecked = shard.get_unchecked(instance_name, action_digest)
        if unchecked is None:
            return None
        if self._blobs.find_missing([(None, key, size_bytes) for key, size_bytes in unchecked.references]):
            return None
        if unchecked.needs_touch and not shard.touch(instance_name, action_digest):
            return None
        return unchecked.found

    @override
    async def put(self, instance_name: str, action_digest: Digest, stored: StoredActionResult) -> None:
        await self._shard(action_digest).put(instance_name, action_digest, stored)
