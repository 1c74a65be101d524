"""One set of fixtures for every implementation of the ports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.contract.cas.lmdb_store import LmdbStore
from tests.contract.cas.memory_stores import MemoryActionResultStore, MemoryBlobStore
from tests.contract.cas.sharded_store import ShardedStore

from lathe_cas.action_result_store import ActionResultStore
from lathe_cas.blob_store import BlobStore


class Stores:
    """A blob store with its action result store, and how to close and open them again."""

    def __init__(self, lmdb: LmdbStore | ShardedStore | None) -> None:
        self.lmdb = lmdb
        self.memory = MemoryBlobStore()
        self.memory_results = MemoryActionResultStore(self.memory)

    @property
    def blobs(self) -> BlobStore:
        return self.memory if self.lmdb is None else self.lmdb.blobs

    @property
    def results(self) -> ActionResultStore:
        return self.memory_results if self.lmdb is None else self.lmdb.results

    async def reopen(self) -> None:
        if self.lmdb is not None:
            await self.lmdb.reopen()


in_memory = pytest.mark.parametrize("stores", ["memory"], indirect=True)
"""For tests of what lies above the ports: that every store does the same with it is what the other tests show."""


@pytest.fixture
async def lmdb(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    """An LMDB store, recounted at the end of each test."""
    store = LmdbStore(tmp_path / "store")
    await store.open()
    yield store
    await store.recount()
    await store.close()


@pytest.fixture(params=["memory", "lmdb", "lmdb, compressing", "sharded"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    """Each implementation in turn; those on LMDB are recounted at the end of each test."""
    if request.param == "memory":
        yield Stores(None)
        return
    store = (
        ShardedStore(tmp_path / "store")
        if request.param == "sharded"
        else LmdbStore(tmp_path / "store", compress_stored=request.param == "lmdb, compressing")
    )
    await store.open()
    yield Stores(store)
    await store.recount()
    await store.close()


@pytest.fixture
def blobs(stores: Stores) -> BlobStore:
    """The blob store alone, for tests that never close it."""
    return stores.blobs
