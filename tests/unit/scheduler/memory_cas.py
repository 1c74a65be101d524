"""A Cas in memory that counts what it is asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping

from typing_extensions import override

from lathe_scheduler.cas import Cas
from lathe_shared.digest import Digest
from lathe_shared.errors import LatheError, UnavailableError


class MemoryCas(Cas):
    def __init__(self, blobs: dict[Digest, bytes] | None = None) -> None:
        self.blobs = dict(blobs or {})
        self.results: dict[tuple[str, Digest], bytes] = {}
        self.errors: dict[Digest | str, LatheError] = {}
        """What it says of a blob, or of everything in an instance, instead of an answer."""
        self.is_away = False
        self.calls: Counter[str] = Counter()
        self.asked: Counter[Digest] = Counter()
        self.was_read: Counter[Digest] = Counter()

    @override
    async def find_missing(self, instance_name: str, digests: Collection[Digest]) -> set[Digest]:
        await self._call("find_missing")
        self.asked.update(digests)
        self._check(instance_name)
        return {digest for digest in digests if digest not in self.blobs and not digest.is_empty}

    @override
    async def read(self, instance_name: str, digests: Collection[Digest]) -> Mapping[Digest, bytes | LatheError]:
        await self._call("read")
        self.was_read.update(digests)
        self._check(instance_name)
        known = self.blobs | self.errors
        return {digest: known[digest] for digest in digests if digest in known}

    @override
    async def get_action_result(self, instance_name: str, action_digest: Digest) -> bytes | None:
        await self._call("get_action_result")
        return self.results.get((instance_name, action_digest))

    @override
    async def forward(self, method: str, request: bytes) -> bytes:
        await self._call(method)
        return b""

    @property
    @override
    def is_available(self) -> bool:
        return not self.is_away

    def _check(self, instance_name: str) -> None:
        if instance_name in self.errors:
            raise self.errors[instance_name]

    async def _call(self, name: str) -> None:
        self.calls[name] += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise UnavailableError("the CAS is away")
