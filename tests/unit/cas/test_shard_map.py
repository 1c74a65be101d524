"""Which environment is in charge of a key."""

from __future__ import annotations

import random

import pytest

from lathe_cas.stores.shard_map import MAX_SHARDS, ShardMap
from lathe_shared.digest import Digest

IDS = [bytes([number]) * 16 for number in range(6)]
KEYS = [Digest.of(number.to_bytes(4, "big")).key for number in range(20_000)]
EXPECTED = [0, 2, 4, 0, 4, 3, 4, 2, 2, 0, 5, 4]


def owners(ids: list[bytes]) -> list[bytes]:
    shard_map = ShardMap(ids)
    return [ids[shard_map.place(key)] for key in KEYS]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_shares_are_about_equal(count: int) -> None:
    found = owners(IDS[:count])
    for id_ in IDS[:count]:
        assert found.count(id_) == pytest.approx(len(KEYS) / count, rel=0.15)


def test_order_makes_no_difference() -> None:
    shuffled = random.Random(1).sample(IDS, len(IDS))
    assert shuffled != IDS
    assert owners(shuffled) == owners(IDS)


def test_one_that_is_added_takes_from_all_and_moves_nothing_else() -> None:
    before, after = owners(IDS[:4]), owners(IDS[:5])
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {new for _, new in moved} == {IDS[4]}
    assert {old for old, _ in moved} == set(IDS[:4])
    assert len(moved) == pytest.approx(len(KEYS) / 5, rel=0.15)


def test_the_same_tomorrow() -> None:
    """A map that changed with a version would lose what is stored."""
    shard_map = ShardMap(IDS)
    assert [shard_map.place(key) for key in KEYS[:12]] == EXPECTED


@pytest.mark.parametrize("ids", [[], [IDS[0], IDS[0]], [bytes([n]) for n in range(MAX_SHARDS + 1)]])
def test_what_cannot_be_told_apart_is_refused(ids: list[bytes]) -> None:
    with pytest.raises(ValueError, match="environments"):
        ShardMap(ids)
