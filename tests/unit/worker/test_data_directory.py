"""One directory, one worker; and several workers that share one above theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lathe_worker.data_directory import DataDirectoryError, DataDirectoryInUseError, take_data_directory


def test_a_directory_belongs_to_one_worker(tmp_path: Path) -> None:
    first = take_data_directory(tmp_path / "data", shared=False)
    assert first.path == tmp_path / "data"
    with pytest.raises(DataDirectoryInUseError, match="in use by another worker"):
        take_data_directory(tmp_path / "data", shared=False)
    first.close()
    take_data_directory(tmp_path / "data", shared=False).close()


def test_workers_that_share_take_the_first_that_is_free(tmp_path: Path) -> None:
    workers = [take_data_directory(tmp_path / "data", shared=True) for _ in range(3)]
    assert [worker.path.name for worker in workers] == ["1", "2", "3"]
    workers[1].close()
    again = take_data_directory(tmp_path / "data", shared=True)
    assert again.path == workers[1].path, "a warm cache is found again"
    for worker in (workers[0], again, workers[2]):
        worker.close()


def test_what_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataDirectoryError, match="cannot be used"):
        take_data_directory(tmp_path / "file", shared=True)
