"""When data has to go, and how much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(
    lease_seconds=st.integers(1, 3_000),
    used_at=st.floats(1_000_000, 1_000_900),
    waited_seconds=st.floats(0, 5_000),
)
def test_a_lease_is_never_shorter_than_it_says_and_less_than_two_steps_longer(
    lease_seconds: int, used_at: float, waited_seconds: float
) -> None:
    policy = EvictionPolicy(1_000, lease_seconds=lease_seconds, max_age_seconds=lease_seconds)
    used_step, step = int(used_at) // 300, int(used_at + waited_seconds) // 300
    is_free = used_step < policy.first_leased_step(step)
    assert is_free == (used_step < policy.first_young_step(step)), "ages are counted alike"
    if waited_seconds < lease_seconds:
        assert not is_free
    if waited_seconds >= lease_seconds + 600:
        assert is_free
    assert (policy.seconds_until_free(used_step, step) == 0) == is_free
    assert used_step < policy.first_leased_step(step + policy.seconds_until_free(used_step, step) // 300)
    assert policy.least_age_seconds(used_step, step) <= waited_seconds


def test_without_a_lease_all_may_go_and_without_an_age_nothing_has_to() -> None:
    assert POLICY.first_leased_step(5) > 0xFFFFFFFF
    assert POLICY.first_young_step(5) == 0
    assert POLICY.seconds_until_free(5, 5) == 0
    assert EvictionPolicy(1_000, lease_seconds=10_000).first_leased_step(5) == 0, "nothing is older than the clock"
