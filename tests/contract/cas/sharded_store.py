"""Three LMDB stores in folders of their own, and the stores that are made of them."""

from __future__ import annotations

from pathlib import Path

from tests.contract.cas.lmdb_store import LmdbStore

from lathe_cas.stores.shard_map import ShardMap
from lathe_cas.stores.sharded_action_result_store import ShardedActionResultStore
from lathe_cas.stores.sharded_blob_store import ShardedBlobStore

SHARDS = 3


class ShardedStore:
    """Opened by ``open``, on the event loop that uses it."""

    def __init__(self, path: Path, *, lease_seconds: int = 0) -> None:
        self.shards = [LmdbStore(path / str(number), lease_seconds=lease_seconds) for number in range(SHARDS)]
        self.shard_map: ShardMap
        self.blobs: ShardedBlobStore
        self.results: ShardedActionResultStore

    async def open(self) -> None:
        for shard in self.shards:
            await shard.open()
        self.shard_map = ShardMap([shard.storage.environment.id for shard in self.shards])
        self.blobs = ShardedBlobStore([shard.blobs for shard in self.shards], self.shard_map)
        self.results = ShardedActionResultStore([shard.results for shard in self.shards], self.shard_map, self.blobs)

    async def close(self) -> None:
        for shard in self.shards:
            await shard.close()

    async def reopen(self) -> None:
        await self.close()
        # As an operator may write them down in another order.
        self.shards.reverse()
        await self.open()

    async def recount(self) -> None:
        for shard in self.shards:
            await shard.recount()
