"""Ask for many things at once that are wanted one by one.

A thousand Execute calls that arrive together want the same toolchain directories. Whatever is asked for within one turn
of the event loop goes into one request, and what is under way already is not asked for again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Batch(Generic[Key, Value]):
    """Keys that go into one request, and whoever waits for its answer."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.weight = 0
        self.answer: asyncio.Future[dict[Key, Value]] = asyncio.get_running_loop().create_future()
        # An asker that was cancelled leaves nobody to look at a failure.
        self.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())


class Batcher(Generic[Key, Value]):
    """Gathers keys into requests.

    Args:
        fetch: Asks for many keys; leaves out of its answer what there is nothing to say about.
        max_weight: What one request may weigh; a heavier key goes alone.
        weigh: Weight of one key.
        max_in_flight: Requests under way at once; others wait.
    """

    def __init__(
        self,
        fetch: Callable[[Collection[Key]], Awaitable[dict[Key, Value]]],
        *,
        max_weight: int,
        weigh: Callable[[Key], int],
        max_in_flight: int,
    ) -> None:
        self._fetch = fetch
        self._max_weight = max_weight
        self._weigh = weigh
        self._slots = asyncio.Semaphore(max_in_flight)
        self._open: _Batch[Key, Value] | None = None
        self._under_way: dict[Key, _Batch[Key, Value]] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def get(self, keys: Iterable[Key]) -> dict[Key, Value]:
        """Return what ``fetch`` says about each key.

        Cancellation: requests go on, for others may wait for them.

        Raises:
            Exception: Whatever ``fetch`` raised for a batch that holds one of the keys.
        """
        wanted = set(keys)
        batches = {self._batch_of(key) for key in wanted}
        found: dict[Key, Value] = {}
        for batch in batches:
            answer = await asyncio.shield(batch.answer)
            found.update((key, answer[key]) for key in wanted.intersection(batch.keys) if key in answer)
        return found

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _batch_of(self, key: Key) -> _Batch[Key, Value]:
        batch = self._under_way.get(key)
        if batch is not None:
            return batch
        weight = self._weigh(key)
        batch = self._open
        if batch is None or batch.weight + weight > self._max_weight:
            batch = self._open = _Batch()
            task = asyncio.create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        batch.keys.append(key)
        batch.weight += weight
        self._under_way[key] = batch
        return batch

    async def _run(self, batch: _Batch[Key, Value]) -> None:
        try:
            async with self._slots:
                if self._open is batch:
                    self._open = None
                answer = await self._fetch(batch.keys)
            batch.answer.set_result(answer)
        except asyncio.CancelledError:
            batch.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 -- handed to those who asked
            batch.answer.set_exception(error)
        finally:
            for key in batch.keys:
                del self._under_way[key]
