"""CasBlobs: RemoteBlobs over gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_shared.errors import NotFoundError
from lathe_worker.remote_blobs import RemoteBlobs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lathe_shared.clients.action_cache_client import ActionCacheClient
    from lathe_shared.clients.cas_client import CasClient
    from lathe_shared.digest import Digest


class CasBlobs(RemoteBlobs):
    """The blobs and action results of Lathe's CAS.

    Args:
        cas: Reads and writes blobs, verifying what it reads.
        action_cache: Writes results.
    """

    def __init__(self, cas: CasClient, action_cache: ActionCacheClient) -> None:
        self._cas = cas
        self._action_cache = action_cache

    @override
    async def read_many(self, instance_name: str, digests: Sequence[Digest]) -> Mapping[Digest, bytes]:
        contents: dict[Digest, bytes] = {}
        for digest, found in (await self._cas.batch_read(instance_name, digests)).items():
            if isinstance(found, bytes):
                contents[digest] = found
            elif not isinstance(found, NotFoundError):
                raise found
        return contents

    @override
    async def read_tree(self, instance_name: str, root: Digest) -> Sequence[bytes]:
        try:
            return await self._cas.get_tree(instance_name, root)
        except NotFoundError:
            return []

    @override
    async def read_to_file(self, instance_name: str, digest: Digest, path: Path) -> None:
        await self._cas.read_to_file(instance_name, digest, path)

    @override
    async def upload(self, instance_name: str, blobs: Mapping[Digest, bytes | Path]) -> None:
        if blobs:
            await self._cas.upload(instance_name, blobs)

    @override
    async def update_action_result(self, instance_name: str, digest: Digest, action_result: bytes) -> None:
        await self._action_cache.update(instance_name, digest, action_result)
