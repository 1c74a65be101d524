"""The content addressable storage as worker tests need it: in memory, counting what it is asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_protos import reapi
from lathe_shared.digest import Digest
from lathe_shared.errors import BlobNotFoundError, LatheError
from lathe_worker.remote_blobs import RemoteBlobs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class MemoryBlobs(RemoteBlobs):
    """Blobs and action results in dictionaries.

    Attributes:
        blobs: What is stored.
        results: The action cache, by instance name and digest.
        reads: How often each blob was asked for.
        gate: Reads wait for it if there is one.
        failure: Raised by every call if set.
    """

    def __init__(self, blobs: Mapping[Digest, bytes] | None = None) -> None:
        self.blobs: dict[Digest, bytes] = dict(blobs or {})
        self.results: dict[tuple[str, Digest], bytes] = {}
        self.reads: Counter[Digest] = Counter()
        self.read_calls = 0
        self.tree_calls = 0
        self.gate: asyncio.Event | None = None
        self.failure: LatheError | None = None

    async def _begin(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure

    @override
    async def read_many(self, instance_name: str, digests: Sequence[Digest]) -> Mapping[Digest, bytes]:
        self.read_calls += 1
        self.reads.update(digests)
        await self._begin()
        return {digest: self.blobs[digest] for digest in digests if digest in self.blobs}

    @override
    async def read_tree(self, instance_name: str, root: Digest) -> Sequence[bytes]:
        self.tree_calls += 1
        await self._begin()
        found: dict[Digest, bytes] = {}
        waiting = [root]
        while waiting:
            digest = waiting.pop()
            if digest in self.blobs and digest not in found:
                found[digest] = self.blobs[digest]
                children = reapi.Directory().parse(found[digest]).directories
                waiting += [Digest.from_message(child.digest, root.function) for child in children]
        return list(found.values())

    @override
    async def read_to_file(self, instance_name: str, digest: Digest, path: Path) -> None:
        self.reads[digest] += 1
        await self._begin()
        if digest not in self.blobs:
            raise BlobNotFoundError(digest)
        await asyncio.to_thread(path.write_bytes, self.blobs[digest])

    @override
    async def upload(self, instance_name: str, blobs: Mapping[Digest, bytes | Path]) -> None:
        await self._begin()
        for digest, source in blobs.items():
            data = source.read_bytes() if isinstance(source, Path) else source
            assert Digest.of(data, digest.function) == digest
            self.blobs[digest] = data

    @override
    async def update_action_result(self, instance_name: str, digest: Digest, action_result: bytes) -> None:
        await self._begin()
        self.results[instance_name, digest] = action_result
