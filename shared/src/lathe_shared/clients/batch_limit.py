"""How much a client puts into one batch: what it would by itself, or less if the CAS takes less.

Spec: REAPI, CacheCapabilities.max_batch_total_size_bytes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lathe_protos import reapi
from lathe_shared.clients.action_cache_client import GET_CAPABILITIES
from lathe_shared.errors import UnimplementedError
from lathe_shared.message_decoding import decode
from lathe_shared.wire import string_field

if TYPE_CHECKING:
    from lathe_shared.clients.rpc_client import RpcClient
    from lathe_shared.clock import Clock

REMEMBERED_SECONDS = 60.0
"""How long an answer is believed: a CAS that was started again with another setting is followed after that."""

MAX_INSTANCES = 64
"""Instance names whose answers are remembered; a scheduler for any instance name has them from its clients."""


class BatchLimit:
    """Asks the CAS how large batches may be.

    Args:
        rpc: The connection to the CAS.
        clock: What the age of an answer is measured by.
        own_bytes: What a batch holds if the CAS takes that much, or does not say.
    """

    def __init__(self, rpc: RpcClient, clock: Clock, own_bytes: int) -> None:
        self._rpc = rpc
        self._clock = clock
        self._own_bytes = own_bytes
        self._known: dict[str, tuple[float, int]] = {}
        self._questions: dict[str, asyncio.Task[int]] = {}

    async def get(self, instance_name: str) -> int:
        """Return how many bytes of blobs one batch may hold; who asks at the same time shares one question.

        Cancellation: the question goes on, for others may wait for it.

        Raises:
            LatheError: The CAS answered with an error, or stayed away.
        """
        known = self._known.get(instance_name)
        if known is not None and self._clock.monotonic() < known[0] + REMEMBERED_SECONDS:
            return known[1]
        question = self._questions.get(instance_name)
        if question is None:
            question = asyncio.create_task(self._ask(instance_name))
            self._questions[instance_name] = question
            # An asker that was cancelled leaves nobody to look at a failure.
            question.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(question)

    async def _ask(self, instance_name: str) -> int:
        try:
            answer = await self._rpc.unary(GET_CAPABILITIES, string_field(1, instance_name))
            told = decode(reapi.ServerCapabilities, answer).cache_capabilities.max_batch_total_size_bytes
        except UnimplementedError:
            told = 0
        finally:
            del self._questions[instance_name]
        limit = min(told, self._own_bytes) if told > 0 else self._own_bytes
        if len(self._known) >= MAX_INSTANCES:
            self._known.clear()
        self._known[instance_name] = (self._clock.monotonic(), limit)
        return limit
