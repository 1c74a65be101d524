"""A scheduler that does what a test tells it, over real gRPC."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Mapping
from typing import Any

import betterproto
from typing_extensions import override

from lathe_protos import reapi, worker_v1
from lathe_shared.digest import Digest
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, bidirectional

WAIT_SECONDS = 30.0


class FakeScheduler(Servicer):
    """Accepts every worker, acknowledges heartbeats, and hands the rest to the test.

    Attributes:
        heard: What workers said, heartbeats left out.
        connections: How often one connected.
    """

    service_name = "lathe.worker.v1.WorkerApi"

    def __init__(self, heartbeat_seconds: float = 0.2) -> None:
        self.heard: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.heartbeats = 0
        self.connections = 0
        self._heartbeat_seconds = heartbeat_seconds
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"Connect": bidirectional(self._connect, long_lived=True)}

    def say(self, **fields: Any) -> None:
        self._outgoing.put_nowait(bytes(worker_v1.SchedulerMessage(**fields)))

    def hang_up(self) -> None:
        self._outgoing.put_nowait(None)

    def start(self, lease_id: str, action_digest: Digest, blobs: Mapping[Digest, bytes]) -> None:
        action = blobs[action_digest]
        command = Digest.from_message(reapi.Action().parse(action).command_digest)
        self.say(
            start_action=worker_v1.StartAction(
                lease_id=lease_id,
                instance_name="main",
                action_digest=action_digest.to_message(),
                action=action,
                command=blobs[command],
            )
        )

    async def hear(self, expected: str) -> Any:
        """Wait for the next message and check what it is."""
        async with asyncio.timeout(WAIT_SECONDS):
            name, message = await self.heard.get()
        assert name == expected, message
        return message

    async def hear_until(self, expected: str) -> Any:
        """Wait for a message of a kind, whatever comes before it."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                name, message = await self.heard.get()
                if name == expected:
                    return message

    async def _connect(self, requests: AsyncIterator[bytes], _context: RpcContext) -> AsyncIterator[bytes]:
        self.connections += 1
        self._outgoing = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests, self._outgoing))
        try:
            while (message := await self._outgoing.get()) is not None:
                yield message
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[bytes], outgoing: asyncio.Queue[bytes | None]) -> None:
        async for data in requests:
            name, message = betterproto.which_one_of(worker_v1.WorkerMessage().parse(data), "message")
            if name == "heartbeat":
                self.heartbeats += 1
                self.say(heartbeat_ack=worker_v1.HeartbeatAck())
                continue
            if name == "register":
                interval = datetime.timedelta(seconds=self._heartbeat_seconds)
                self.say(registered=worker_v1.Registered(heartbeat_interval=interval, lost_after=interval * 50))
            self.heard.put_nowait((name, message))
        outgoing.put_nowait(None)
