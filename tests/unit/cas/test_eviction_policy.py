"""When data has to go, and how much."""

from __future__ import annotations

import pytest

from lathe_cas.eviction_policy import EvictionPolicy

POLICY = EvictionPolicy(1_000)


@pytest.mark.parametrize(
    ("used_bytes", "evicting", "expected"),
    [
        (0, False, 0), (900, False, 0), (950, False, 0), (951, False, 51), (1_000, False, 100), (2_000, False, 1_100),
        (0, True, 0), (899, True, 0), (900, True, 0), (901, True, 1), (950, True, 50), (1_000, True, 100),
    ],
)  # fmt: skip
def test_background_eviction_runs_from_the_high_watermark_to_the_low_one(
    used_bytes: int, evicting: bool, expected: int
) -> None:
    assert POLICY.excess_in_background(used_bytes, evicting=evicting) == expected


@pytest.mark.parametrize(
    ("used_bytes", "incoming_bytes", "expected"),
    [(0, 0, 0), (0, 1_000, 0), (0, 1_001, 1), (999, 1, 0), (1_000, 1, 1), (1_000, 500, 500), (1_500, 0, 500)],
)
def test_a_writer_gets_room_up_to_the_limit(used_bytes: int, incoming_bytes: int, expected: int) -> None:
    assert POLICY.excess_for(used_bytes, incoming_bytes) == expected


def test_a_run_of_eviction_ends() -> None:
    used_bytes, evicting, steps = 1_000, False, 0
    while excess := POLICY.excess_in_background(used_bytes, evicting=evicting):
        used_bytes -= min(excess, 30)
        evicting = True
        steps += 1
    assert (used_bytes, steps) == (900, 4)
    assert POLICY.excess_in_background(used_bytes, evicting=False) == 0


def test_the_ratios_can_be_chosen() -> None:
    policy = EvictionPolicy(1_000, high_ratio=0.5, low_ratio=0.25)
    assert policy.excess_in_background(500, evicting=False) == 0
    assert policy.excess_in_background(501, evicting=False) == 251
