"""Look-ups that meet an eviction of the same key: whoever acts second sees the first, in every order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from tests.contract.cas.blob_making import content, missing, put
from tests.contract.cas.lmdb_store import STEP_SECONDS, LmdbStore
from typing_extensions import override

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_operations import NewBlob, PutBlobs
from lathe_shared.digest import Digest
from lathe_shared.errors import LatheError, ResourceExhaustedError, UnavailableError

LIMIT_BYTES = 100_000
LEASE_SECONDS = 3_000
SIZE_BYTES = 60_000
ACTION = Digest.of(b"action")


class WatchedSet(set[bytes]):
    """Lets the other side act once, just after this one has looked."""

    def __init__(self, keys: Iterable[bytes], after_look: Callable[[], None]) -> None:
        super().__init__(keys)
        self._after_look = [after_look]

    @override
    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self._act()
        return found

    @override
    def isdisjoint(self, keys: Iterable[Any]) -> bool:
        found = super().isdisjoint(keys)
        self._act()
        return found

    def _act(self) -> None:
        if self._after_look:
            self._after_look.pop()()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbStore]:
    store = LmdbStore(tmp_path / "store", LIMIT_BYTES, lease_seconds=LEASE_SECONDS)
    await store.open()
    yield store
    await store.recount()
    await store.close()


async def put_old(store: LmdbStore) -> Digest:
    """Put a blob and an action result that names it, and let their leases end."""
    (old,) = await put(store.blobs, content(SIZE_BYTES))
    await store.results.put("main", ACTION, StoredActionResult(b"result", [(old.key, old.size_bytes)]))
    store.now += LEASE_SECONDS + 2 * STEP_SECONDS
    return old


def is_found(store: LmdbStore, digest: Digest, look: str) -> bool:
    if look == "find":
        return not missing(store.blobs, digest)
    if look == "size":
        return store.blobs.find_sizes([digest.key]) == [digest.size_bytes]
    return store.results.get("main", ACTION) is not None


@pytest.mark.parametrize("look", ["find", "size", "result"])
async def test_the_writer_sees_whoever_did_not_see_it(store: LmdbStore, look: str) -> None:
    """The writer comes to a key just when a look-up has found that it is not being evicted."""
    old = await put_old(store)
    touches = store.storage.touches
    kind, key = KIND_BLOB, old.key
    if look == "result":
        kind, key = KIND_ACTION_RESULT, records.action_result_key("main", ACTION.key)
    may_go: list[bool] = []
    touches.doomed = WatchedSet((), lambda: may_go.append(touches.may_be_evicted(kind, key)))
    assert is_found(store, old, look)
    assert may_go == [False]


async def test_the_writer_sees_what_an_action_result_names(store: LmdbStore) -> None:
    old = await put_old(store)
    touches = store.storage.touches
    may_go: list[bool] = []
    touches.doomed = WatchedSet((), lambda: may_go.append(touches.may_be_evicted(KIND_BLOB, old.key)))
    assert store.results._touch_all(None, [old.key])
    assert may_go == [False]


@pytest.mark.parametrize("look", ["find", "size"])
async def test_whoever_looks_sees_the_writer_that_did_not_see_them(store: LmdbStore, look: str) -> None:
    """A look-up comes to a key just when the writer has found that it is not touched."""
    old = await put_old(store)
    touches = store.storage.touches
    found: list[bool] = []
    touches.blobs = WatchedSet((), lambda: found.append(is_found(store, old, look)))
    assert touches.may_be_evicted(KIND_BLOB, old.key)
    assert found == [False]
    touches.forgive({old.key})


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (lmdb.DiskError("no room"), ResourceExhaustedError),
        (lmdb.CorruptedError("a page that makes no sense"), UnavailableError),
    ],
)
async def test_what_a_failed_transaction_would_have_evicted_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: lmdb.Error, told: type[LatheError]
) -> None:
    """And is forgiven before the next transaction, not by the event loop at any time during that."""
    store = LmdbStore(tmp_path / "store", LIMIT_BYTES, lease_seconds=LEASE_SECONDS)
    await store.open()
    old = await put_old(store)
    touches = store.storage.touches
    doomed: list[set[bytes]] = []

    def fail(batch: WriteBatch, *_: object) -> None:
        doomed.append(batch.doomed & touches.doomed)
        raise failure

    committer = store.storage.committer
    await store.storage.writer.aclose()
    data = content(SIZE_BYTES, 1)
    with monkeypatch.context() as patch:
        patch.setattr(WriteBatch, "drop_blob", fail)
        key = Digest.of(data).key
        (outcome,) = committer.commit([PutBlobs([NewBlob(key, SIZE_BYTES, cut(data, chunk_seed(key)))])])
    assert isinstance(outcome.error, told)
    assert doomed
    assert all(old.key in keys for keys in doomed)
    assert not touches.doomed
    assert not committer.take_doomed(), "nothing is left for the event loop"
    assert missing(store.blobs, old) == []
    await store.close()
