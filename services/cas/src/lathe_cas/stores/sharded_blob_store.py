"""One blob store made of several, each in charge of a share of the keys."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import override

from lathe_cas.blob_store import BlobStore, StoreStatus, UnnamedUpload, Upload, UploadName, UploadStatus
from lathe_cas.soon import Soon, settled
from lathe_shared.digest import Digest
from lathe_shared.errors import LatheError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from lathe_cas.stores.shard_map import ShardMap
    from lathe_shared.compressor import Compressor
    from lathe_shared.digest import DigestFunction

T = TypeVar("T")
R = TypeVar("R")


class ShardedBlobStore(BlobStore):
    """Blobs in several stores.

    Args:
        shards: The stores.
        shard_map: Which of them a blob belongs to.
    """

    def __init__(self, shards: Sequence[BlobStore], shard_map: ShardMap) -> None:
        self._shards = shards
        self._map = shard_map
        self._next_shard = 0

    def _shard(self, digest: Digest) -> BlobStore:
        return self._shards[self._map.place(digest.key)]

    @override
    def find_missing(self, wanted: Sequence[tuple[T, bytes, int]]) -> Soon[list[T]]:
        shares = self._share_out(key for _, key, _ in wanted)
        return _joined(
            [
                shard.find_missing([(number, *wanted[number][1:]) for number in share])
                for shard, share in zip(self._shards, shares, strict=True)
                if share
            ],
            lambda missing: [wanted[number][0] for number in sorted(itertools.chain(*missing))],
        )

    @override
    def find_sizes(self, keys: Sequence[bytes]) -> Soon[list[int | None]]:
        shares = self._share_out(keys)

        def join(answers: list[list[int | None]]) -> list[int | None]:
            sizes: list[int | None] = [None] * len(keys)
            for share, answer in zip(shares, answers, strict=True):
                for number, size_bytes in zip(share, answer, strict=True):
                    sizes[number] = size_bytes
            return sizes

        return _joined(
            [
                shard.find_sizes([keys[number] for number in share])
                for shard, share in zip(self._shards, shares, strict=True)
            ],
            join,
        )

    def _share_out(self, keys: Iterable[bytes]) -> list[list[int]]:
        """Return for each shard the numbers of the keys that it is in charge of."""
        shares: list[list[int]] = [[] for _ in self._shards]
        for number, key in enumerate(keys):
            shares[self._map.place(key)].append(number)
        return shares

    async def _divide(
        self, items: Sequence[T], keys: Iterable[bytes], ask: Callable[[BlobStore, list[T]], Awaitable[list[R]]]
    ) -> list[R]:
        """Ask every shard about its share, all at the same time; return the answers in the items' order."""
        shares = [(shard, share) for shard, share in zip(self._shards, self._share_out(keys), strict=True) if share]
        answers = await asyncio.gather(*(ask(shard, [items[number] for number in share]) for shard, share in shares))
        by_number = {
            number: answer
            for (_, share), answered in zip(shares, answers, strict=True)
            for number, answer in zip(share, answered, strict=True)
        }
        return [by_number[number] for number in range(len(items))]

    @override
    async def put_many(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        return await self._divide(
            blobs, (digest.key for digest, _ in blobs), lambda shard, share: shard.put_many(share)
        )

    @override
    async def put_many_zstd(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        keys = (digest.key for digest, _ in blobs)
        return await self._divide(blobs, keys, lambda shard, share: shard.put_many_zstd(share))

    @override
    async def read_many(self, digests: Sequence[Digest]) -> list[bytes | None]:
        keys = (digest.key for digest in digests)
        return await self._divide(digests, keys, lambda shard, share: shard.read_many(share))

    @override
    async def read_many_as_stored(self, digests: Sequence[Digest]) -> list[tuple[Compressor, bytes] | None]:
        keys = (digest.key for digest in digests)
        return await self._divide(digests, keys, lambda shard, share: shard.read_many_as_stored(share))

    @override
    def read_at_once(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> bytes | None:
        return self._shard(digest).read_at_once(digest, offset_bytes, limit_bytes)

    @override
    def read(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
        return self._shard(digest).read(digest, offset_bytes, limit_bytes)

    @override
    def read_zstd(self, digest: Digest, offset_bytes: int = 0) -> AsyncIterator[bytes]:
        return self._shard(digest).read_zstd(digest, offset_bytes)

    @override
    async def open_upload(self, name: UploadName, *, restart: bool = False) -> Upload:
        return await self._shard(name.digest).open_upload(name, restart=restart)

    @override
    async def put_upload(self, name: UploadName, data: memoryview) -> None:
        await self._shard(name.digest).put_upload(name, data)

    @override
    def put_at_once(self, name: UploadName, data: memoryview) -> asyncio.Future[None] | None:
        return self._shard(name.digest).put_at_once(name, data)

    @override
    async def open_unnamed_upload(self, function: DigestFunction, expected_hash: str | None = None) -> UnnamedUpload:
        if expected_hash is not None:
            return await self._shard(Digest(expected_hash, 0, function)).open_unnamed_upload(function, expected_hash)
        here = self._shards[self._next_shard]
        self._next_shard = (self._next_shard + 1) % len(self._shards)
        return _MovedUpload(here, await here.open_unnamed_upload(function), self._shard)

    @override
    async def upload_status(self, name: UploadName) -> UploadStatus:
        return await self._shard(name.digest).upload_status(name)

    @override
    async def remove(self, digests: Sequence[Digest]) -> int:
        shares = self._share_out(digest.key for digest in digests)
        removed = await asyncio.gather(
            *(
                shard.remove([digests[number] for number in share])
                for shard, share in zip(self._shards, shares, strict=True)
            )
        )
        return sum(removed)

    @override
    def status(self) -> StoreStatus:
        statuses = [shard.status() for shard in self._shards]
        counters: Counter[str] = Counter()
        for status in statuses:
            counters.update(status.counters)
        return StoreStatus(
            blobs=sum(status.blobs for status in statuses),
            blob_bytes=sum(status.blob_bytes for status in statuses),
            stored_bytes=sum(status.stored_bytes for status in statuses),
            staged_bytes=sum(status.staged_bytes for status in statuses),
            garbage_bytes=sum(status.garbage_bytes for status in statuses),
            action_results=sum(status.action_results for status in statuses),
            limit_bytes=sum(status.limit_bytes for status in statuses),
            file_bytes=sum(status.file_bytes for status in statuses),
            oldest_evicted_age_seconds=_least(status.oldest_evicted_age_seconds for status in statuses),
            least_evicted_age_seconds=_least(status.least_evicted_age_seconds for status in statuses),
            counters=counters,
        )


def _joined(answers: Sequence[Soon[T]], join: Callable[[list[T]], R]) -> Soon[R]:
    """Put the shards' answers together: at once, if all of them are there."""
    there = [answer for answer in answers if not isinstance(answer, Awaitable)]
    return join(there) if len(there) == len(answers) else _joined_later(answers, join)


async def _joined_later(answers: Sequence[Soon[T]], join: Callable[[list[T]], R]) -> R:
    return join(await asyncio.gather(*(settled(answer) for answer in answers)))


def _least(ages_seconds: Iterable[int | None]) -> int | None:
    return min((age for age in ages_seconds if age is not None), default=None)


class _MovedUpload(UnnamedUpload):
    """An upload whose shard is known when its hash is: it arrives in one of them and is moved if that was wrong.

    Args:
        here: The shard that it arrives in.
        upload: The upload there.
        shard: Tells the right one.
    """

    def __init__(self, here: BlobStore, upload: UnnamedUpload, shard: Callable[[Digest], BlobStore]) -> None:
        self._here = here
        self._upload = upload
        self._shard = shard

    @override
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        await self._upload.append(pieces, length)

    @override
    async def finish(self) -> Digest:
        digest = await self._upload.finish()
        there = self._shard(digest)
        if there is not self._here and not digest.is_empty:
            # If this is cancelled the blob stays here too, where nobody asks for it, until it is evicted.
            await self._copy(digest, there)
            await self._here.remove([digest])
        return digest

    async def _copy(self, digest: Digest, there: BlobStore) -> None:
        try:
            copy = await there.open_unnamed_upload(digest.function, digest.hash)
            await copy.take_all(memoryview(piece) async for piece in self._here.read(digest))
        except LatheError:
            await self._here.remove([digest])
            raise

    @override
    async def abandon(self) -> None:
        await self._upload.abandon()

    @override
    def abandon_soon(self) -> None:
        self._upload.abandon_soon()
