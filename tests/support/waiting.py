"""Wait for what happens in other processes, which have no event to wait for: look again and again, within a bound."""

from __future__ import annotations

import time
from collections.abc import Callable

# Several times what anything here needs on a loaded machine; it only ever passes when something is broken.
DEADLINE_SECONDS = 60.0
LOOK_AGAIN_SECONDS = 0.02


def eventually(condition: Callable[[], bool], what: str, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Return as soon as the condition holds.

    Args:
        condition: Looked at repeatedly; its exceptions pass through.
        what: Names what was waited for, in the error.
        deadline_seconds: After this the wait has failed.

    Raises:
        AssertionError: It never held.
    """
    end = time.monotonic() + deadline_seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"still not so after {deadline_seconds:.0f} s: {what}")
        time.sleep(LOOK_AGAIN_SECONDS)
