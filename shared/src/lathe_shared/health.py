"""The gRPC health service: whether this process, or one service in it, should be sent work.

Spec: grpc/health/v1/health.proto and gRPC's doc/health-checking.md.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_protos import health
from lathe_shared.errors import NotFoundError
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, decode, server_streaming, unary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

ServingStatus = health.HealthCheckResponseServingStatus
_UNKNOWN_SERVICE = ServingStatus(ServingStatus.SERVICE_UNKNOWN)

WHOLE_SERVER = ""
"""The name under which the state of the whole process is asked for."""


class HealthServicer(Servicer):
    """Answers for the whole server and for each service by its name.

    Everything begins as NOT_SERVING; ``lifecycle`` sets SERVING when all is up and NOT_SERVING when draining begins.

    Args:
        service_names: Services to answer for, beside the whole server.
    """

    service_name = "grpc.health.v1.Health"

    def __init__(self, service_names: Iterable[str] = ()) -> None:
        names = [WHOLE_SERVER, self.service_name, *service_names]
        self._statuses: dict[str, ServingStatus] = dict.fromkeys(names, ServingStatus(ServingStatus.NOT_SERVING))
        self._changed = asyncio.Event()

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"Check": unary(self._check), "Watch": server_streaming(self._watch, long_lived=True)}

    @property
    def is_serving(self) -> bool:
        """Whether the server as a whole is SERVING."""
        return self._statuses[WHOLE_SERVER] is ServingStatus.SERVING

    def add(self, service_name: str) -> None:
        """Answer for one more service, in the state of the whole server."""
        self.set(service_name, self._statuses[WHOLE_SERVER])

    def set(self, service_name: str, status: ServingStatus) -> None:
        """Change the state of one service, and tell those who watch."""
        self._statuses[service_name] = status
        self._notify()

    def set_all(self, status: ServingStatus) -> None:
        """Change the state of everything, and tell those who watch."""
        self._statuses = dict.fromkeys(self._statuses, status)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check(self, request: bytes, _context: RpcContext) -> bytes:
        name = decode(health.HealthCheckRequest, request).service
        status = self._statuses.get(name)
        if status is None:
            raise NotFoundError(f"no service {name[:200]!r} here")
        return bytes(health.HealthCheckResponse(status=status))

    async def _watch(self, request: bytes, _context: RpcContext) -> AsyncIterator[bytes]:
        name = decode(health.HealthCheckRequest, request).service
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(name, _UNKNOWN_SERVICE)
            if status is not last:
                yield bytes(health.HealthCheckResponse(status=status))
                last = status
            await changed.wait()
