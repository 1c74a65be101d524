"""What trials have in common: measurements with servers of their own that take minutes.

They run only when ``--rows`` names them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from tools.bench.processes import cas_command

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tools.bench.processes import Cores


class Outcome(ABC):
    """What a trial found.

    Attributes:
        name: Of the trial.
    """

    name: str

    @abstractmethod
    def figures(self) -> dict[str, object]:
        """Return everything, for the JSON file."""

    @abstractmethod
    def text(self) -> str:
        """Return what people want to know, in one or a few lines."""


class Trial(Protocol):
    """A trial: runs in a folder of its own, in little time if ``quick``."""

    def __call__(self, folder: Path, cores: Cores, *, quick: bool) -> Outcome:
        """Run it."""


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the upper end of durations, by share, in milliseconds."""
    return {str(share): round(percentile(seconds, share) * 1e3, 2) for share in (0.5, 0.9, 0.99, 1.0)}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of all is not above."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


def lease_free_cas(data_dir: Path, limit_bytes: int) -> list[str]:
    """Return the command of a CAS all of whose data may go: what is measured is what happens to that."""
    return cas_command(data_dir, limit_bytes, "--lease-seconds=0")
