"""Operations: look at executions, wait for them, cancel them.

Spec: google/longrunning/operations.proto; REAPI, Execution.Execute on CancelOperation.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from betterproto.lib.google.protobuf import Empty
from typing_extensions import override

from lathe_protos import longrunning
from lathe_scheduler.operation_messages import operation_message, stage_name
from lathe_scheduler.queue_events import OperationCancelled, OperationDeleted
from lathe_shared.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, decode, unary
from lathe_shared.wire import message_field, string_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lathe_scheduler.operation import Operation
    from lathe_scheduler.queue_runner import QueueRunner
    from lathe_shared.clock import Clock

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
"""Operations in one page: done ones may carry results, and a page must stay below 4 MB as a rule."""

MAX_PAGE_BYTES = 3_000_000
"""Where a page ends early: below the 4 MB that gRPC clients accept by default."""


class OperationsServicer(Servicer):
    """Serves ``google.longrunning.Operations``."""

    service_name = "google.longrunning.Operations"

    def __init__(self, runner: QueueRunner, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "GetOperation": unary(self._get),
            "ListOperations": unary(self._list),
            "CancelOperation": unary(self._cancel),
            "DeleteOperation": unary(self._delete),
            "WaitOperation": unary(self._wait),
        }

    def _get(self, request: bytes, _context: RpcContext) -> bytes:
        return operation_message(self._known(decode(longrunning.GetOperationRequest, request).name))

    def _list(self, request: bytes, _context: RpcContext) -> bytes:
        """List operations in the order of their creation.

        ``name`` is a prefix (``main/operations``), ``filter`` is empty or ``stage=QUEUED`` and the like, and a page
        token is the name of the last operation of the page before.
        """
        message = decode(longrunning.ListOperationsRequest, request)
        stage = _parse_filter(message.filter)
        if message.page_size < 0:
            raise InvalidArgumentError("page_size", f"{message.page_size} is negative")
        limit = min(message.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        token = message.page_token
        if token and self._runner.queue.operation(token) is None:
            raise InvalidArgumentError("page_token", "the list has moved on; begin again")
        parts: list[bytes] = []
        size = 0
        last = ""
        skipping = bool(token)
        for operation in self._runner.queue.operations():
            if skipping:
                skipping = operation.name != token
                continue
            if not operation.name.startswith(message.name) or (stage and stage_name(operation) != stage):
                continue
            item = message_field(1, operation_message(operation))
            if len(parts) == limit or (parts and size + len(item) > MAX_PAGE_BYTES):
                parts.append(string_field(2, last))
                break
            parts.append(item)
            size += len(item)
            last = operation.name
        return b"".join(parts)

    def _cancel(self, request: bytes, _context: RpcContext) -> bytes:
        operation = self._known(decode(longrunning.CancelOperationRequest, request).name)
        self._runner.submit(OperationCancelled(operation.name))
        return bytes(Empty())

    def _delete(self, request: bytes, _context: RpcContext) -> bytes:
        operation = self._known(decode(longrunning.DeleteOperationRequest, request).name)
        if not operation.is_done:
            raise FailedPreconditionError(f"operation {operation.name!r} is not done; CancelOperation ends it")
        self._runner.submit(OperationDeleted(operation.name))
        return bytes(Empty())

    async def _wait(self, request: bytes, _context: RpcContext) -> bytes:
        """Wait for the end of an operation, for the time that the client gives, and answer with its state then."""
        message = decode(longrunning.WaitOperationRequest, request)
        operation = self._known(message.name)
        seconds = message.timeout.total_seconds()
        if seconds < 0:
            raise InvalidArgumentError("timeout", f"{seconds:g} seconds is negative")
        waits = [asyncio.ensure_future(self._runner.wait_until_done(operation.name))]
        if seconds:
            waits.append(asyncio.ensure_future(self._clock.sleep(seconds)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return operation_message(operation)

    def _known(self, name: str) -> Operation:
        operation = self._runner.queue.operation(name)
        if operation is None:
            raise NotFoundError(f"no operation {name[:300]!r}; it never was, or it was done some time ago")
        return operation


def _parse_filter(text: str) -> str:
    if not text:
        return ""
    key, _, value = text.partition("=")
    if key.strip() != "stage" or not value.strip():
        raise InvalidArgumentError("filter", f"{text[:200]!r} is not understood; stage=QUEUED and the like are")
    return value.strip().strip('"').upper()
