"""How far it is: drawn over on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest

from lathe_cas.fsck import progress as module
from lathe_cas.fsck.progress import Progress


@pytest.fixture(autouse=True)
def _redraw_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)


def shown(*, is_terminal: bool) -> str:
    output = io.StringIO()
    progress = Progress(output, is_terminal=is_terminal)
    with progress.phase("blobs", 4096):
        for _ in range(2048):
            progress.step()
    return output.getvalue()


def test_a_terminal_gets_a_bar_that_is_drawn_over() -> None:
    text = shown(is_terminal=True)
    assert "\r" in text
    assert "[############............]  50%  2,048 of 4,096" in text
    assert text.count("\n") == 1, "the line that stays"


def test_a_log_gets_lines_without_control_characters() -> None:
    text = shown(is_terminal=False)
    assert " 50%  2,048 of 4,096" in text
    assert text.replace("\n", "").isprintable()
    assert "[" not in text


def test_work_that_cannot_be_counted_shows_its_time() -> None:
    output = io.StringIO()
    with Progress(output, is_terminal=False).ticking("pages"):
        pass
    assert output.getvalue().splitlines()[-1].startswith("pages")
