from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field
from tools import config_reference

from lathe_shared.config_loading import ServiceSettings


class CasSettings(ServiceSettings):
    """Keep blobs."""

    service: ClassVar[str] = "cas"

    max_size_bytes: int = Field(default=1000, gt=0, description="what may be kept | at most")


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config_reference, "SETTINGS", {__name__: "CasSettings"})
    monkeypatch.setitem(sys.modules, __name__, sys.modules[CasSettings.__module__])
    target = tmp_path / "configuration.md"
    monkeypatch.setattr(config_reference, "TARGET", target)
    return target


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["config_reference.py", *arguments])
    return config_reference.main()


def test_what_was_written_is_current(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0

    text = target.read_text()
    assert "## lathe-cas\n\nKeep blobs.\n" in text
    assert "| `max_size_bytes` | number, more than 0 | `1000` | what may be kept \\| at most |" in text


def test_a_changed_or_absent_file_is_not_current(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--check") == 1
    run(monkeypatch)
    target.write_text(target.read_text() + "\n")

    assert run(monkeypatch, "--check") == 1
    assert "is not current" in capsys.readouterr().err
