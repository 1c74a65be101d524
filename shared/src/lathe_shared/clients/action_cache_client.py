"""The action cache, and the CAS's capabilities, as the services in front of it see them.

Spec: REAPI, ActionCache and Capabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_protos import reapi
from lathe_shared.clients.rpc_client import RetryPolicy, RpcClient
from lathe_shared.errors import NotFoundError
from lathe_shared.message_decoding import decode
from lathe_shared.wire import message_field, string_field, varint_field

if TYPE_CHECKING:
    from lathe_shared.clock import Clock
    from lathe_shared.digest import Digest
    from lathe_shared.grpc_transport import GrpcChannel

GET_ACTION_RESULT = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult"
UPDATE_ACTION_RESULT = "/build.bazel.remote.execution.v2.ActionCache/UpdateActionResult"
GET_CAPABILITIES = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities"


class ActionCacheClient:
    """Reads and writes action results, as the bytes that they are.

    Args:
        channel: The connection to the CAS.
        retry: How calls are tried again while the CAS is away.
        clock: What pauses between tries are measured by.
    """

    def __init__(self, channel: GrpcChannel, *, retry: RetryPolicy | None = None, clock: Clock | None = None) -> None:
        self._rpc = RpcClient(channel, "the action cache", retry=retry, clock=clock)

    async def get(self, instance_name: str, action_digest: Digest) -> bytes | None:
        """Return the serialized ActionResult; None if there is none that is complete.

        Raises:
            LatheError: The CAS answered with another error, or stayed away.
        """
        request = (
            string_field(1, instance_name)
            + message_field(2, action_digest.wire)
            + varint_field(6, action_digest.function)
        )
        try:
            return await self.forward_get(request)
        except NotFoundError:
            return None

    async def update(self, instance_name: str, action_digest: Digest, action_result: bytes) -> None:
        """Store the serialized ActionResult of an action.

        Raises:
            LatheError: The CAS answered with an error, or stayed away.
        """
        request = (
            string_field(1, instance_name)
            + message_field(2, action_digest.wire)
            + message_field(3, action_result)
            + varint_field(5, action_digest.function)
        )
        await self.forward_update(request)

    async def forward_get(self, request: bytes) -> bytes:
        """Pass on a serialized GetActionResultRequest as it is.

        Raises:
            NotFoundError: There is no complete result.
            LatheError: The CAS answered with another error, or stayed away.
        """
        return await self._rpc.unary(GET_ACTION_RESULT, request)

    async def forward_update(self, request: bytes) -> bytes:
        """Pass on a serialized UpdateActionResultRequest as it is.

        Raises:
            LatheError: The CAS answered with an error, or stayed away.
        """
        return await self._rpc.unary(UPDATE_ACTION_RESULT, request)

    async def capabilities(self, instance_name: str) -> reapi.ServerCapabilities:
        """Return what the CAS advertises.

        Raises:
            LatheError: The CAS answered with an error, or stayed away.
        """
        return decode(reapi.ServerCapabilities, await self._rpc.unary(GET_CAPABILITIES, string_field(1, instance_name)))
