"""ActionCache: passed on to the CAS as bytes, so that clients may name one address for everything but blobs.

Spec: REAPI, service ActionCache.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, unary
from lathe_shared.wire import scan, text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lathe_scheduler.cas import Cas
    from lathe_shared.instance_name import InstanceNames


class ActionCacheServicer(Servicer):
    """Serves ``build.bazel.remote.execution.v2.ActionCache`` in the CAS's name."""

    service_name = "build.bazel.remote.execution.v2.ActionCache"

    def __init__(self, cas: Cas, instance_names: InstanceNames) -> None:
        self._cas = cas
        self._instance_names = instance_names

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {name: unary(partial(self._forward, name)) for name in ("GetActionResult", "UpdateActionResult")}

    async def _forward(self, name: str, request: bytes, _context: RpcContext) -> bytes:
        self._instance_names.check(_instance_name(request))
        return await self._cas.forward(f"/{self.service_name}/{name}", request)


def _instance_name(request: bytes) -> str:
    """Read the field that both requests have in common; all else is the CAS's to read."""
    name = ""
    for tag, a, b in scan(request):
        if tag == 0x0A:
            name = text(request, a, b)
    return name
