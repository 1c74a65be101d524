"""The scheduler's side of one worker's stream: what is to be sent, and why it ends."""

from __future__ import annotations

import asyncio
from collections import deque

MAX_UNSENT_MESSAGES = 4096
"""Messages that may wait for a worker. One that is so far behind reads nothing: it is as good as lost, and its actions
do better elsewhere."""


class WorkerConnection:
    """Messages for one worker, in order.

    Args:
        connection_id: Number of the stream.
        worker_id: The worker's own name.

    Attributes:
        close_reason: Why the stream is to end; None while it goes on.
        error: What the stream is to end with, if anything.
    """

    def __init__(self, connection_id: int, worker_id: str) -> None:
        self.connection_id = connection_id
        self.worker_id = worker_id
        self.close_reason: str | None = None
        self.error: Exception | None = None
        self._unsent: deque[bytes] = deque()
        self._changed = asyncio.Event()

    def send(self, message: bytes) -> None:
        """Have a message sent; what comes after the end is dropped."""
        if self.close_reason is not None:
            return
        if len(self._unsent) >= MAX_UNSENT_MESSAGES:
            self.close(f"the worker has not read {MAX_UNSENT_MESSAGES} messages")
            return
        self._unsent.append(message)
        self._changed.set()

    def close(self, reason: str, error: Exception | None = None) -> None:
        """End the stream once what was sent before is written; the first reason counts."""
        if self.close_reason is None:
            self.close_reason = reason
            self.error = error
            self._changed.set()

    async def next_message(self) -> bytes | None:
        """Wait for a message to write; None when the stream is to end.

        Raises:
            Exception: What ``close`` was told to end the stream with.
        """
        while not self._unsent:
            if self.close_reason is not None:
                if self.error is not None:
                    raise self.error
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._unsent.popleft()
