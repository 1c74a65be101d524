"""How far a long work is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

BAR_COLUMNS = 24
REDRAW_SECONDS = 0.1
LINE_SECONDS = 10.0
"""Where there is no terminal: a log wants to show that the work goes on, not each percent."""

_STEPS = 1024
"""Units between two looks at the clock."""


class Progress:
    """Shows one phase after the other.

    Args:
        output: Where to.
        is_terminal: Whether a line can be drawn over.
    """

    def __init__(self, output: TextIO, *, is_terminal: bool) -> None:
        self._output = output
        self._is_terminal = is_terminal
        self._name = ""
        self._total = 0
        self._done = 0
        self._look_at = 0
        self._started = 0.0
        self._shown = 0.0

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Begin a phase, and end it with a line that stays.

        Args:
            name: What is done.
            total: Units of work; 0 if nobody knows.
        """
        self._name, self._total, self._done, self._look_at = name, total, 0, _STEPS
        self._started = self._shown = time.monotonic()
        if self._is_terminal:
            self._draw(self._started)
        yield
        seconds = time.monotonic() - self._started
        count = f"  {self._done:,}" if self._done else ""
        self._write(f"{name:<28}{count}  {seconds:.1f} s", last=True)

    @contextmanager
    def ticking(self, name: str) -> Iterator[None]:
        """Show a phase that cannot say how far it is: its time alone, from a thread."""
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(REDRAW_SECONDS):
                self._show(time.monotonic())

        with self.phase(name, 0):
            thread = threading.Thread(target=tick, daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()

    def step(self, units: int = 1) -> None:
        """Note that more is done."""
        self._done += units
        if self._done >= self._look_at:
            self._look_at = self._done + _STEPS
            self._show(time.monotonic())

    def _show(self, now: float) -> None:
        if now - self._shown < (REDRAW_SECONDS if self._is_terminal else LINE_SECONDS):
            return
        self._shown = now
        self._draw(now)

    def _draw(self, now: float) -> None:
        seconds = now - self._started
        if not self._total:
            self._write(f"{self._name:<28}  {seconds:.0f} s")
            return
        share = min(1.0, self._done / self._total)
        filled = round(share * BAR_COLUMNS)
        left = f"{seconds / share - seconds:.0f} s left" if share else ""
        bar = f"[{'#' * filled}{'.' * (BAR_COLUMNS - filled)}] " if self._is_terminal else ""
        self._write(f"{self._name:<28}  {bar}{share:4.0%}  {self._done:,} of {self._total:,}  {left}")

    def _write(self, text: str, *, last: bool = False) -> None:
        if self._is_terminal:
            self._output.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
        else:
            self._output.write(text.rstrip() + "\n")
        self._output.flush()
