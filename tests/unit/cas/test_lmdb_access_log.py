"""The access log: oldest first, in groups; eviction and the sweep over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.cas.blob_making import content
from tests.contract.cas.lmdb_store import MAP_BYTES
from tests.contract.cas.recount import recount

from lathe_cas.eviction_policy import EvictionPolicy
from lathe_cas.stores import lmdb_access_log as access_log
from lathe_cas.stores import lmdb_eviction
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_batch import WriteBatch
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_shared.digest import Digest


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[LmdbEnvironment]:
    environment = LmdbEnvironment(tmp_path, MAP_BYTES)
    yield environment
    recount(environment)
    environment.close()


class Log:
    """An environment with a clock and touches, changed one batch at a time."""

    def __init__(self, environment: LmdbEnvironment) -> None:
        self.environment = environment
        self.step = 10

    def put(self, *seeds: int) -> list[bytes]:
        keys = []
        with self.environment.env.begin(write=True) as txn:
            batch = self.batch(txn)
            for seed in seeds:
                data = content(100, seed)
                keys.append(Digest.of(data).key)
                batch.add_blob(keys[-1], 100, cut(data, chunk_seed(keys[-1])))
            batch.finish()
        return keys

    def touch(self, *keys: bytes) -> None:
        with self.environment.env.begin(write=True) as txn:
            batch = self.batch(txn)
            for key in keys:
                assert batch.touch(KIND_BLOB, key)
            batch.finish()

    def evict(self, wanted_bytes: int, max_evicted: int = 1_000) -> int:
        with self.environment.env.begin(write=True) as txn:
            batch = self.batch(txn)
            freed = lmdb_eviction.evict(batch, wanted_bytes, lmdb_eviction.EvictionEffort(max_evicted))
            batch.finish()
        return freed

    def sweep(self) -> int:
        rounds = 0
        with self.environment.env.begin(write=True) as txn:
            batch = self.batch(txn)
            after = lmdb_eviction.sweep_log(batch, b"")
            while after:
                rounds += 1
                after = lmdb_eviction.sweep_log(batch, after)
            batch.changes += 1
            batch.finish()
        return rounds

    def batch(self, txn: object) -> WriteBatch:
        return WriteBatch(self.environment, txn, self.step, EvictionPolicy(1 << 30))  # type: ignore[arg-type]  # the stub's transaction is generic

    def left(self) -> set[bytes]:
        with self.environment.read() as txn:
            return {key for key, _ in txn.cursor(self.environment.blobs)}

    def entries(self) -> int:
        return self.environment.read_totals().log_entries


@given(st.lists(st.binary(max_size=255), max_size=50))
def test_keys_of_any_length_come_back(keys: list[bytes]) -> None:
    assert access_log.decode_keys(access_log.encode_keys(keys)) == keys


def test_groups_are_read_oldest_first(environment: LmdbEnvironment) -> None:
    database = environment.access
    with environment.env.begin(write=True) as txn:
        assert access_log.first_group(txn, database) is None
        assert access_log.append_groups(txn, database, 5, KIND_BLOB, 1, [b"late"]) == 2
        assert access_log.append_groups(txn, database, 4, KIND_BLOB, 2, [b"early"]) == 3
        assert access_log.append_groups(txn, database, 5, KIND_ACTION_RESULT, 3, [b"result"]) == 4
        assert access_log.append_groups(txn, database, 4, KIND_BLOB, 4, [b"early too"]) == 5
        assert access_log.append_groups(txn, database, 4, KIND_BLOB, 5, []) == 5
        read = []
        after = b""
        while (group := access_log.first_group(txn, database, after)) is not None:
            read.append((group.step, group.kind, group.keys))
            after = group.raw_key
        assert read == [
            (4, KIND_BLOB, [b"early"]),
            (4, KIND_BLOB, [b"early too"]),
            (5, KIND_ACTION_RESULT, [b"result"]),
            (5, KIND_BLOB, [b"late"]),
        ]
        txn.abort()


def test_many_entries_make_several_groups(environment: LmdbEnvironment) -> None:
    keys = [str(number).encode() for number in range(2 * access_log.MAX_GROUP_ENTRIES + 1)]
    with environment.env.begin(write=True) as txn:
        assert access_log.append_groups(txn, environment.access, 1, KIND_BLOB, 7, keys) == 10
        group = access_log.first_group(txn, environment.access)
        assert group is not None
        assert group.keys == keys[: access_log.MAX_GROUP_ENTRIES]
        txn.abort()


def test_a_group_is_shortened_in_place_or_deleted(environment: LmdbEnvironment) -> None:
    with environment.env.begin(write=True) as txn:
        access_log.append_groups(txn, environment.access, 1, KIND_BLOB, 1, [b"a", b"b", b"c"])
        group = access_log.first_group(txn, environment.access)
        assert group is not None
        access_log.replace_group(txn, environment.access, group, [b"b"])
        assert access_log.first_group(txn, environment.access) == group._replace(keys=[b"b"])
        access_log.replace_group(txn, environment.access, group, [])
        assert access_log.first_group(txn, environment.access) is None


def test_the_oldest_are_evicted_and_only_as_many_as_needed(environment: LmdbEnvironment) -> None:
    log = Log(environment)
    old = log.put(1, 2, 3)
    log.step += 1
    new = log.put(4, 5)
    one = 322
    assert log.evict(1) == one
    assert log.left() == {*old[1:], *new}
    assert log.evict(one + 1) == 2 * one
    assert log.left() == set(new)
    assert log.evict(10**9) == 2 * one
    assert log.evict(1) == 0
    assert log.entries() == 0


def test_what_was_touched_later_is_passed_over(environment: LmdbEnvironment) -> None:
    log = Log(environment)
    keys = log.put(1, 2, 3)
    log.step += 1
    log.touch(keys[0], keys[1], keys[0])
    log.touch(keys[0])
    assert log.entries() == 5, "a blob is touched once in a step"
    log.evict(1)
    assert log.left() == {keys[0], keys[1]}
    assert log.entries() == 2, "what eviction came by is gone, stale or not"


def test_eviction_may_be_bounded(environment: LmdbEnvironment) -> None:
    log = Log(environment)
    for seed in range(10):
        log.put(seed)
    assert log.evict(10**9, max_evicted=4) == 4 * 322
    assert len(log.left()) == 6


def test_a_bounded_eviction_ends_within_a_group(environment: LmdbEnvironment) -> None:
    log = Log(environment)
    keys = log.put(*range(10))
    assert log.evict(10**9, max_evicted=4) == 4 * 322
    assert log.left() == set(keys[4:])
    assert log.entries() == 6


def test_stale_entries_cost_a_bounded_eviction_less(environment: LmdbEnvironment) -> None:
    log = Log(environment)
    keys = log.put(*range(40))
    log.step += 1
    log.touch(*keys[:36])
    assert log.evict(10**9, max_evicted=2) == 0
    assert log.entries() == 40 + 36 - 32
    assert log.evict(10**9, max_evicted=2) == 2 * 322
    assert log.left() == {*keys[:36], *keys[38:]}


def test_the_sweep_drops_stale_entries_only(environment: LmdbEnvironment) -> None:
    log = Log(environment)
    keys = log.put(1, 2, 3)
    for _ in range(5):
        log.step += 1
        log.touch(*keys[:2])
    assert log.entries() == 13
    assert log.sweep() == 6
    assert log.entries() == 3
    log.evict(1)
    assert log.left() == set(keys[:2]), "the order is as before"


def test_the_sweep_drops_duplicates(environment: LmdbEnvironment) -> None:
    log = Log(environment)
    (key,) = log.put(1)
    with environment.env.begin(write=True) as txn:
        batch = log.batch(txn)
        record = batch.blob(key)
        assert record is not None
        batch.drop_blob(key, record)
        for _ in range(2):
            batch.add_blob(key, 100, cut(content(100, 1), chunk_seed(key)))
            record = batch.blob(key)
            assert record is not None
            batch.drop_blob(key, record)
        batch.add_blob(key, 100, cut(content(100, 1), chunk_seed(key)))
        batch.finish()
    assert log.entries() == 4
    log.sweep()
    assert 1 <= log.entries() <= 2, "one in each group at most"
