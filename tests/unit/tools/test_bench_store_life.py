"""The trials of a store's life: what they send, and what they make of what they measured."""

from __future__ import annotations

import itertools
import json

import pytest
from tools.bench.ageing_client import LARGEST_BYTES, check_all_stored, make_aged_blobs, make_sizes, round_of_sizes
from tools.bench.errors import BenchError
from tools.bench.large_traffic import LargeTrafficOutcome
from tools.bench.processes import resident_bytes
from tools.bench.store_life import AgeingOutcome, Start, StartOutcome
from tools.bench.trials import percentile

from lathe_protos import google, reapi
from lathe_shared.digest import Digest


def test_sizes_are_those_of_builds() -> None:
    sizes = sorted(round_of_sizes(5 << 30, LARGEST_BYTES)[:50_000])
    assert 3_800 < sizes[25_000] < 4_400
    assert 92_000 < sizes[45_000] < 112_000
    assert sizes[-1] == LARGEST_BYTES
    assert sizes[0] == 17


def test_rounds_have_the_same_sizes_in_another_order() -> None:
    expected = round_of_sizes(10 << 20, 1 << 20)
    sizes = make_sizes(10 << 20, 1 << 20)
    first, second = (list(itertools.islice(sizes, len(expected))) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second


def test_blobs_are_all_different_and_are_what_they_say() -> None:
    blobs = list(itertools.islice(make_aged_blobs("salt", 1 << 20, 1 << 16), 200))
    assert len({blob.digest for blob in blobs}) == 200
    assert all(Digest.of(blob.data) == blob.digest for blob in blobs)
    assert max(len(blob.data) for blob in blobs) <= 1 << 16


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.5, 5), (0.9, 9), (0.99, 10), (1.0, 10), (0.01, 1), (0.51, 6)]
)
def test_percentiles(share: float, expected: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], share) == expected


def test_a_batch_in_which_one_was_refused_is_no_measurement() -> None:
    digest = Digest.of(b"x").to_message()
    stored = reapi.BatchUpdateBlobsResponseResponse(digest=digest)
    refused = reapi.BatchUpdateBlobsResponseResponse(digest=digest, status=google.rpc.Status(code=8, message="full"))
    check_all_stored(bytes(reapi.BatchUpdateBlobsResponse(responses=[stored, stored])), 2)
    for responses, count in (([stored], 2), ([stored, refused], 2)):
        with pytest.raises(BenchError, match="were not stored"):
            check_all_stored(bytes(reapi.BatchUpdateBlobsResponse(responses=responses)), count)


def test_resident_memory_is_read_from_the_kernels_text() -> None:
    assert resident_bytes("Name:\tlathe-cas\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\nThreads:\t5\n") == 200 * 1024


def test_outcomes_are_told_to_people_and_to_programs() -> None:
    ageing = AgeingOutcome(10**6, [1.0, 2.0, 4.0], [0.5, 1.0, 1.5], 1_100_000, [0.001] * 99 + [0.5], [0.0002])
    assert (ageing.last_to_first, ageing.file_to_limit) == (0.5, 1.1)
    assert "last to first full one 0.50, processor time 1.50; file 1.100 of the limit" in ageing.text()
    assert "p50 1.0 ms, p99 1.0 ms, of an idle server 0.2 and 0.2 ms" in ageing.text()
    start = StartOutcome(5, Start(0.5, 10**7, 10**7), Start(0.75, 2 * 10**7, 3 * 10**7))
    assert "start, 5 blobs: ready in 0.75 s, with none 0.50 s; 20 MB resident" in start.text()
    assert "+20.0 MB after" in start.text()
    traffic = LargeTrafficOutcome(10**6, 200.0, 300.0, [0.001] * 98 + [0.002, 0.5], [0.0002])
    assert "written 200 MB/s, read 300 MB/s" in traffic.text()
    assert "p50 1.0 ms, p99 2.0 ms, longest 500.0 ms, of an idle server 0.2, 0.2 and 0.2 ms" in traffic.text()
    for outcome in (ageing, start, traffic):
        assert json.loads(json.dumps(outcome.figures())) == outcome.figures()
