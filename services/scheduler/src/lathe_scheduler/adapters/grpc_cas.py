"""The CAS over gRPC."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_scheduler.cas import Cas
from lathe_shared.clients.action_cache_client import ActionCacheClient
from lathe_shared.clients.cas_client import CasClient
from lathe_shared.clients.rpc_client import RpcClient
from lathe_shared.errors import LatheError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from lathe_shared.clock import Clock
    from lathe_shared.digest import Digest
    from lathe_shared.grpc_transport import GrpcChannel


class GrpcCas(Cas):
    """Asks a CAS service; tries again for some seconds while it is away.

    Args:
        channel: The connection to the CAS; closing it is its owner's business.
        clock: What pauses are measured by.
    """

    def __init__(self, channel: GrpcChannel, clock: Clock) -> None:
        self._blobs = CasClient(channel, clock=clock)
        self._results = ActionCacheClient(channel, clock=clock)
        self._rpc = RpcClient(channel, "the CAS", clock=clock)
        self._is_available = True

    @override
    async def find_missing(self, instance_name: str, digests: Collection[Digest]) -> set[Digest]:
        with self._noting():
            return await self._blobs.find_missing(instance_name, digests)

    @override
    async def read(self, instance_name: str, digests: Collection[Digest]) -> Mapping[Digest, bytes | LatheError]:
        with self._noting():
            found = await self._blobs.batch_read(instance_name, digests)
        return {digest: blob for digest, blob in found.items() if not isinstance(blob, NotFoundError)}

    @override
    async def get_action_result(self, instance_name: str, action_digest: Digest) -> bytes | None:
        with self._noting():
            return await self._results.get(instance_name, action_digest)

    @override
    async def forward(self, method: str, request: bytes) -> bytes:
        with self._noting():
            return await self._rpc.unary(method, request)

    @property
    @override
    def is_available(self) -> bool:
        return self._is_available

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note whether the service was reached."""
        try:
            yield
        except UnavailableError:
            self._is_available = False
            raise
        except LatheError:
            self._is_available = True
            raise
        self._is_available = True
