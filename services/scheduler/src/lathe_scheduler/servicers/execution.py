"""Execution: Execute and WaitExecution.

Spec: REAPI, service Execution.
"""

from __future__ import annotations

import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_protos import reapi
from lathe_scheduler.execution_wire import read_execute_request
from lathe_scheduler.queue_events import ExecuteRequested, ListenerAdded, ListenerRemoved
from lathe_scheduler.task import ActionKey
from lathe_shared.digest import Digest, select_function
from lathe_shared.errors import NotFoundError
from lathe_shared.service_boundary import EndedBy, Rpc, RpcContext, Servicer, decode, server_streaming

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Mapping

    from lathe_scheduler.queue_runner import QueueRunner
    from lathe_shared.digest import DigestFunction
    from lathe_shared.instance_name import InstanceNames


class ExecutionServicer(Servicer):
    """Serves ``build.bazel.remote.execution.v2.Execution``."""

    service_name = "build.bazel.remote.execution.v2.Execution"

    def __init__(
        self, runner: QueueRunner, instance_names: InstanceNames, functions: Collection[DigestFunction]
    ) -> None:
        self._runner = runner
        self._instance_names = instance_names
        self._functions = functions

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"Execute": server_streaming(self._execute), "WaitExecution": server_streaming(self._wait_execution)}

    async def _execute(self, request: bytes, context: RpcContext) -> AsyncGenerator[bytes, None]:
        message = read_execute_request(request)
        instance_name = self._instance_names.check(message.instance_name)
        hash_, size_bytes = message.action_digest
        function = select_function(message.digest_function, len(hash_), self._functions, "action_digest")
        digest = Digest.parse(hash_, size_bytes, function, "action_digest")
        name = operation_name(instance_name)
        self._runner.submit(
            ExecuteRequested(
                name,
                ActionKey(instance_name, digest),
                message.skip_cache_lookup,
                message.priority,
                context.request_metadata_wire,
                message.inline_output_files,
            )
        )
        async with aclosing(self._follow(name, context, is_new=True)) as states:
            async for state in states:
                yield state

    async def _wait_execution(self, request: bytes, context: RpcContext) -> AsyncGenerator[bytes, None]:
        name = decode(reapi.WaitExecutionRequest, request).name
        if self._runner.queue.operation(name) is None:
            # Bazel then calls Execute again.
            raise NotFoundError(f"no operation {name[:300]!r}; it never was, or it was done some time ago")
        self._runner.submit(ListenerAdded(name))
        async with aclosing(self._follow(name, context, is_new=False)) as states:
            async for state in states:
                yield state

    async def _follow(self, name: str, context: RpcContext, *, is_new: bool) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._runner.follow(name, is_new=is_new)) as states:
                async for state in states:
                    yield state
        finally:
            # A deadline that passed says nothing about whether the result is still wanted: the client may wait again.
            self._runner.submit(ListenerRemoved(name, is_cancelled=context.ended_by is EndedBy.CLIENT_CANCEL))


def operation_name(instance_name: str) -> str:
    """Make a fresh name for an operation."""
    return f"{operations_prefix(instance_name)}{uuid.uuid4()}"


def operations_prefix(instance_name: str) -> str:
    """Return what the names of an instance's operations begin with."""
    return f"{instance_name}/operations/" if instance_name else "operations/"
