"""ActionCache: results of actions, as the bytes that arrived.

Spec: REAPI, service ActionCache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_shared import cas_wire
from lathe_shared.errors import NotFoundError
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, unary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Mapping

    from lathe_cas.action_cache import ActionCache
    from lathe_cas.cas_metrics import CasCounters
    from lathe_shared.digest import Digest, DigestFunction
    from lathe_shared.instance_name import InstanceNames


class ActionCacheServicer(Servicer):
    """Serves ``build.bazel.remote.execution.v2.ActionCache``.

    What a request wants inlined stays a digest: the specification leaves that to the server, and a result that is
    returned as it was stored costs nothing to return.

    Args:
        cache: Where the results are.
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
        counters: Hits and misses.
    """

    service_name = "build.bazel.remote.execution.v2.ActionCache"

    def __init__(
        self,
        cache: ActionCache,
        instance_names: InstanceNames,
        functions: Collection[DigestFunction],
        counters: CasCounters,
    ) -> None:
        self._cache = cache
        self._instance_names = instance_names
        self._functions = functions
        self._counters = counters

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "GetActionResult": unary(self._get_action_result),
            "UpdateActionResult": unary(self._update_action_result),
        }

    def _get_action_result(self, data: bytes, _context: RpcContext) -> bytes | Awaitable[bytes]:
        request = cas_wire.read_get_action_result(data, self._functions)
        self._instance_names.check(request.instance_name)
        found = self._cache.get(request.instance_name, request.digest)
        if found is None or isinstance(found, bytes):
            return self._answer(found, request.digest)
        return self._answer_later(found, request.digest)

    async def _answer_later(self, found: Awaitable[bytes | None], digest: Digest) -> bytes:
        return self._answer(await found, digest)

    def _answer(self, found: bytes | None, digest: Digest) -> bytes:
        if found is None:
            self._counters.action_result_misses += 1
            raise NotFoundError(f"no complete action result for action {digest}")
        self._counters.action_result_hits += 1
        return found

    async def _update_action_result(self, data: bytes, _context: RpcContext) -> bytes:
        request = cas_wire.read_update_action_result(data, self._functions)
        self._instance_names.check(request.instance_name)
        await self._cache.update(request.instance_name, request.digest, request.action_result)
        return request.action_result
