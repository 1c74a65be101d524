"""Capabilities: what the CAS can do, and execution on top.

Spec: REAPI, service Capabilities, message ExecutionCapabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_protos import reapi
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, decode, unary

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lathe_scheduler.cas import Cas
    from lathe_shared.digest import DigestFunction
    from lathe_shared.instance_name import InstanceNames

MAX_PRIORITY = 2**31 - 1
MIN_PRIORITY = -(2**31)
"""All that ExecutionPolicy.priority, an int32, can carry."""

NODE_PROPERTIES = ("mtime", "unix_mode")
"""What workers set on inputs and report of outputs: the two that have fields of their own in NodeProperties."""

_PRIORITIES = reapi.PriorityCapabilities(
    priorities=[reapi.PriorityCapabilitiesPriorityRange(min_priority=MIN_PRIORITY, max_priority=MAX_PRIORITY)]
)


class CapabilitiesServicer(Servicer):
    """Serves ``build.bazel.remote.execution.v2.Capabilities``."""

    service_name = "build.bazel.remote.execution.v2.Capabilities"

    def __init__(self, cas: Cas, instance_names: InstanceNames, functions: Collection[DigestFunction]) -> None:
        self._cas = cas
        self._instance_names = instance_names
        self._functions = [reapi.DigestFunctionValue(function.value) for function in functions]

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"GetCapabilities": unary(self._get_capabilities)}

    async def _get_capabilities(self, request: bytes, _context: RpcContext) -> bytes:
        self._instance_names.check(decode(reapi.GetCapabilitiesRequest, request).instance_name)
        answer = await self._cas.forward(f"/{self.service_name}/GetCapabilities", request)
        capabilities = decode(reapi.ServerCapabilities, answer)
        # An action's blobs are in the CAS, so nothing can be executed by a function that the CAS does not offer.
        of_cas = capabilities.cache_capabilities.digest_functions
        offered = [function for function in self._functions if function in of_cas]
        capabilities.execution_capabilities = reapi.ExecutionCapabilities(
            # Bazel before version 6 reads the single field only, and knows SHA-256 only, which comes first.
            digest_function=offered[0] if offered else reapi.DigestFunctionValue(reapi.DigestFunctionValue.UNKNOWN),
            exec_enabled=True,
            execution_priority_capabilities=_PRIORITIES,
            supported_node_properties=list(NODE_PROPERTIES),
            digest_functions=offered,
        )
        return bytes(capabilities)
