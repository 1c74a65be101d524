"""What a client tells of the calls that it has made."""

from __future__ import annotations

import json
from typing import NamedTuple


class Timing(NamedTuple):
    """One run of a client.

    Attributes:
        calls: Calls made, all of them answered with OK.
        seconds: From the first one's beginning to the last one's end.
    """

    calls: int
    seconds: float

    @property
    def calls_per_second(self) -> float:
        """The rate."""
        return self.calls / self.seconds

    def to_json(self) -> str:
        """Write it for ``from_json``, in another process."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Timing:
        """Read what ``to_json`` wrote."""
        return cls(**json.loads(text))
