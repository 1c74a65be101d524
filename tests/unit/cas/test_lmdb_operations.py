"""Operations one by one: who may write to an upload, and how what was dropped is freed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.contract.cas.blob_making import content
from tests.contract.cas.lmdb_store import MAP_BYTES
from tests.contract.cas.recount import recount

from lathe_cas.eviction_policy import EvictionPolicy
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_committer import LmdbCommitter
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_cas.stores.lmdb_operations import (
    DropDamagedActionResult,
    DropDamagedBlob,
    DropUpload,
    NewBlob,
    Operation,
    PublishUpload,
    PutActionResult,
    PutBlob,
    RemoveBlobs,
    StageUpload,
)
from lathe_shared.digest import Digest
from lathe_shared.errors import AbortedError

CHUNK = 65_520
DATA = content(3 * CHUNK)
KEY = Digest.of(DATA).key
SEED = chunk_seed(KEY)
RESULT_SEED = chunk_seed(records.action_result_identity(b"result", 6, 0, 0))
UPLOAD = records.upload_key("main", "upload", KEY, len(DATA))


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[LmdbEnvironment]:
    environment = LmdbEnvironment(tmp_path, MAP_BYTES)
    yield environment
    recount(environment)
    environment.close()


class Sessions:
    """Sessions of several processes, which know nothing of each other but what is in the environment."""

    def __init__(self, environment: LmdbEnvironment) -> None:
        self.environment = environment
        self.committer = LmdbCommitter(environment, EvictionPolicy(1 << 30), Touches(lambda: 1), lambda: 1.0, 86_400)

    def stage(self, owner: int, takes_over: int | None, start: int, end: int, *, restart: bool = False) -> StageUpload:
        chunks = cut(DATA[start:end], SEED, start // CHUNK)
        return StageUpload(UPLOAD, owner, takes_over, restart, start, end, 0, chunks, 1)

    def error_of(self, operation: StageUpload | PublishUpload | DropUpload) -> BaseException | None:
        (outcome,) = self.committer.commit([operation])
        return outcome.error

    def committed_bytes(self) -> int | None:
        with self.environment.read() as txn:
            value = txn.get(UPLOAD, db=self.environment.uploads)
        return None if value is None else records.UploadRecord.unpack(value).committed_bytes


def test_a_session_goes_on_with_its_own_upload(environment: LmdbEnvironment) -> None:
    sessions = Sessions(environment)
    assert sessions.error_of(sessions.stage(1, None, 0, CHUNK)) is None
    assert sessions.error_of(sessions.stage(1, None, CHUNK, 2 * CHUNK)) is None
    assert sessions.error_of(PublishUpload(KEY, len(DATA), sessions.stage(1, None, 2 * CHUNK, 3 * CHUNK))) is None
    assert sessions.committed_bytes() is None
    assert environment.read_totals().blob_bytes == len(DATA)


def test_whoever_lost_an_upload_cannot_write_to_it(environment: LmdbEnvironment) -> None:
    sessions = Sessions(environment)
    assert sessions.error_of(sessions.stage(1, None, 0, CHUNK)) is None
    assert sessions.error_of(sessions.stage(2, 1, CHUNK, 2 * CHUNK)) is None
    late = sessions.stage(1, None, 2 * CHUNK, 3 * CHUNK)
    for operation in (late, PublishUpload(KEY, len(DATA), late)):
        error = sessions.error_of(operation)
        assert isinstance(error, AbortedError)
        assert "took this upload over" in str(error)
    assert sessions.error_of(DropUpload(UPLOAD, (1, None))) is None
    assert sessions.committed_bytes() == 2 * CHUNK
    assert sessions.error_of(DropUpload(UPLOAD, (2, 1))) is None
    assert sessions.committed_bytes() is None


def test_a_session_that_found_no_upload_cannot_write_to_one_that_came_later(environment: LmdbEnvironment) -> None:
    sessions = Sessions(environment)
    assert sessions.error_of(sessions.stage(1, None, 0, CHUNK)) is None
    assert isinstance(sessions.error_of(sessions.stage(2, None, 0, CHUNK)), AbortedError)
    assert sessions.committed_bytes() == CHUNK


@pytest.mark.parametrize("start", [0, 2 * CHUNK])
def test_a_session_must_go_on_where_the_upload_ends(environment: LmdbEnvironment, start: int) -> None:
    sessions = Sessions(environment)
    assert sessions.error_of(sessions.stage(1, None, 0, CHUNK)) is None
    error = sessions.error_of(sessions.stage(2, 1, start, start + CHUNK))
    assert isinstance(error, AbortedError)
    assert "QueryWriteStatus" in str(error)
    assert sessions.committed_bytes() == CHUNK


def test_an_upload_that_was_cleared_away_cannot_go_on(environment: LmdbEnvironment) -> None:
    sessions = Sessions(environment)
    assert sessions.error_of(sessions.stage(1, None, 0, CHUNK)) is None
    assert sessions.error_of(DropUpload(UPLOAD, (1,))) is None
    assert isinstance(sessions.error_of(sessions.stage(1, None, CHUNK, 2 * CHUNK)), AbortedError)
    assert sessions.error_of(sessions.stage(3, 1, 0, CHUNK, restart=True)) is None, "but it can begin anew"


def test_a_restart_takes_the_old_chunks_place(environment: LmdbEnvironment) -> None:
    sessions = Sessions(environment)
    assert sessions.error_of(sessions.stage(1, None, 0, 2 * CHUNK)) is None
    assert sessions.error_of(sessions.stage(2, 1, 0, CHUNK, restart=True)) is None
    assert sessions.committed_bytes() == CHUNK
    recount(environment)


def test_a_large_blob_becomes_garbage_that_is_freed_in_steps(environment: LmdbEnvironment) -> None:
    data = content(100 * CHUNK + 5)
    with environment.env.begin(write=True) as txn:
        batch = WriteBatch(environment, txn, 1, EvictionPolicy(1 << 30))
        batch.add_blob(Digest.of(data).key, len(data), cut(data, chunk_seed(Digest.of(data).key)))
        batch.finish()
    disk_bytes = environment.read_totals().stored_bytes
    freed: list[int] = []
    for step in range(4):
        with environment.env.begin(write=True) as txn:
            batch = WriteBatch(environment, txn, 1, EvictionPolicy(1 << 30))
            if step == 0:
                record = batch.blob(Digest.of(data).key)
                assert record is not None
                batch.drop_blob(Digest.of(data).key, record)
                assert batch.totals.garbage_bytes == disk_bytes
            freed.append(batch.free_garbage(30))
            batch.changes += 1
            batch.finish()
        totals = recount(environment).totals
        assert totals.garbage_bytes == disk_bytes - sum(freed)
    assert sum(freed) == disk_bytes
    assert [round(part / disk_bytes, 1) for part in freed] == [0.3, 0.3, 0.3, 0.1]


def test_room_is_made_by_freeing_garbage_too(environment: LmdbEnvironment) -> None:
    """What waits to be freed counts until it is, so a writer frees it rather than let the file grow."""
    data = content(100 * CHUNK)
    policy = EvictionPolicy(110 * 65_600)
    with environment.env.begin(write=True) as txn:
        batch = WriteBatch(environment, txn, 1, policy)
        batch.add_blob(Digest.of(data).key, len(data), cut(data, chunk_seed(Digest.of(data).key)))
        batch.finish()
    with environment.env.begin(write=True) as txn:
        batch = WriteBatch(environment, txn, 1, policy)
        batch.reserve(50 * CHUNK)
        assert batch.totals.blobs == 0, "evicted"
        assert batch.totals.used_bytes + 50 * CHUNK <= policy.limit_bytes
        assert batch.totals.garbage_bytes > 0, "no more than was needed"
        batch.finish()
    recount(environment)


def test_only_the_damaged_bytes_are_dropped_not_what_was_written_anew(environment: LmdbEnvironment) -> None:
    committer = Sessions(environment).committer
    put: Operation[Any] = PutBlob(NewBlob(KEY, len(DATA), cut(DATA, SEED)))
    put_result: Operation[Any] = PutActionResult(b"result", 6, cut(b"result", RESULT_SEED), [], 0)
    committer.commit([put, put_result])
    damaged_ids = storage_ids(environment)
    committer.commit([RemoveBlobs([(KEY, len(DATA))]), put, put_result])
    blob_id, result_id = damaged_ids
    drops = damaged(blob_id, result_id)
    assert [outcome.result for outcome in committer.commit(drops)] == [False, False]
    blob_id, result_id = storage_ids(environment)
    drops = damaged(blob_id, result_id)
    assert [outcome.result for outcome in committer.commit(drops)] == [True, True]
    assert [outcome.result for outcome in committer.commit(drops)] == [False, False]
    assert environment.read_totals().kept_bytes == 0


def storage_ids(environment: LmdbEnvironment) -> tuple[int, int]:
    with environment.read() as txn:
        blob = txn.get(KEY, db=environment.blobs)
        result = txn.get(b"result", db=environment.action_results)
    assert blob is not None
    assert result is not None
    return records.BlobRecord.unpack(blob).storage_id, records.ActionResultRecord.unpack(result).storage_id


def damaged(blob_id: int, result_id: int) -> list[Operation[Any]]:
    return [DropDamagedBlob(KEY, blob_id), DropDamagedActionResult(b"result", result_id)]
