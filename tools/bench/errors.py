"""What keeps a benchmark from being run."""

from __future__ import annotations


class BenchError(Exception):
    """A measurement cannot be made, or what it measured was wrong; the message is all that the user is shown."""
