"""WorkerApi: one stream per worker, on a port of its own.

Spec: lathe/worker/v1/worker.proto.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog
from typing_extensions import override

from lathe_scheduler.queue_events import WorkerHeartbeat
from lathe_scheduler.worker_connection import WorkerConnection
from lathe_scheduler.worker_messages import (
    HEARTBEAT_ACK,
    PROTOCOL_VERSION,
    parse_registration,
    read_registration,
    refused,
    registered,
    worker_event,
)
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, bidirectional

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from lathe_protos import worker_v1
    from lathe_scheduler.platform_key import PlatformProperties
    from lathe_scheduler.queue_runner import QueueRunner

REGISTER_SECONDS = 30.0
"""How long a stream may be open without its first message: no worker takes that long, and idle streams cost memory."""

_log = structlog.get_logger("lathe.scheduler")


class WorkerApiServicer(Servicer):
    """Serves ``lathe.worker.v1.WorkerApi``."""

    service_name = "lathe.worker.v1.WorkerApi"

    def __init__(
        self,
        runner: QueueRunner,
        properties: PlatformProperties,
        *,
        heartbeat_interval_seconds: float,
        lost_after_seconds: float,
    ) -> None:
        self._runner = runner
        self._properties = properties
        self._registered = registered(heartbeat_interval_seconds, lost_after_seconds)

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"Connect": bidirectional(self._connect, long_lived=True)}

    async def _connect(self, requests: AsyncIterator[bytes], context: RpcContext) -> AsyncIterator[bytes]:
        register = await self._receive_registration(requests)
        if register.protocol_version != PROTOCOL_VERSION:
            reason = f"this scheduler speaks version {PROTOCOL_VERSION}, the worker {register.protocol_version}"
            _log.warning("worker_refused", worker_id=register.worker_id[:100], peer=context.peer, reason=reason)
            yield refused(reason)
            return
        event = parse_registration(register, self._runner.new_connection_id(), self._properties)
        connection = WorkerConnection(event.connection_id, event.worker_id)
        connection.send(self._registered)
        self._runner.connect(connection, event)
        reader = asyncio.create_task(self._receive(requests, connection))
        try:
            while (message := await connection.next_message()) is not None:
                yield message
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader
            self._runner.disconnect(connection)

    async def _receive_registration(self, requests: AsyncIterator[bytes]) -> worker_v1.Register:
        try:
            async with asyncio.timeout(REGISTER_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            raise InvalidArgumentError("message", f"no registration within {REGISTER_SECONDS:g} seconds") from None
        return read_registration(first or b"")

    async def _receive(self, requests: AsyncIterator[bytes], connection: WorkerConnection) -> None:
        """Take in a worker's messages until its stream ends or breaks the rules."""
        try:
            async for data in requests:
                self._take(data, connection)
        except InvalidArgumentError as error:
            _log.warning("worker_broke_protocol", worker_id=connection.worker_id, reason=error.message)
            connection.close(error.message, error)
        except Exception as error:  # noqa: BLE001 -- raised again by the stream's own task, where the boundary answers it
            connection.close("error", error)
        else:
            connection.close("the worker closed its stream")

    def _take(self, data: bytes, connection: WorkerConnection) -> None:
        event = worker_event(connection.worker_id, connection.connection_id, data)
        if event is None:
            return
        if isinstance(event, WorkerHeartbeat):
            connection.send(HEARTBEAT_ACK)
        self._runner.submit(event)
