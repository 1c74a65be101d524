"""Sorting beyond memory: any items, in any number of runs, come back in order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe_cas.fsck import external_sort
from lathe_cas.fsck.external_sort import ExternalSort


@given(st.lists(st.binary(max_size=300), max_size=60), st.integers(1, 20))
def test_items_come_back_in_order(tmp_path_factory: pytest.TempPathFactory, items: list[bytes], run_items: int) -> None:
    with ExternalSort(tmp_path_factory.getbasetemp(), run_items) as sort:
        for item in items:
            sort.add(item)
        assert list(sort.sorted()) == sorted(items)


def test_runs_are_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "READ_BYTES", 50)
    items = [bytes((seed * 7 % 251,)) * (seed % 90) for seed in range(1000)]
    with ExternalSort(tmp_path, 100) as sort:
        for item in items:
            sort.add(item)
        assert list(sort.sorted()) == sorted(items)
        assert list(tmp_path.iterdir()) == [], "the file has no name"
