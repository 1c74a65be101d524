"""Splitting blobs into chunks and splicing them from chunks. Chunks are blobs like any other.

Work on one blob is done once, however many clients ask at the same time, and goes on when they are gone: the next one
then finds it done.

Spec: REAPI, ContentAddressableStorage.SplitBlob and SpliceBlob.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import TYPE_CHECKING

import structlog

from lathe_cas.blob_store import UploadName
from lathe_cas.chunk_layouts import ChunkLayouts, layout_message
from lathe_cas.fast_cdc import FastCdcCutter
from lathe_cas.shared_work import SharedWork
from lathe_cas.soon import settled
from lathe_shared.digest import Digest
from lathe_shared.errors import BlobNotFoundError, DigestMismatchError, InvalidArgumentError, LatheError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from lathe_cas.action_result_store import ActionResultStore
    from lathe_cas.blob_store import BlobStore, Upload
    from lathe_cas.cas_metrics import CasCounters
    from lathe_cas.fast_cdc import FastCdcParameters
    from lathe_shared.digest import DigestFunction

MAX_CHUNKS = 25_000
"""Chunks of one blob. With the longest digests they make a SplitBlobResponse of 3.6 MB, and clients accept 4 MiB.
FastCDC with its recommended parameters comes there with blobs of 13 GB."""

_GROUP_BYTES = 4 << 20
"""Bytes of chunks that are stored, or read, together: enough to make a commit worth it, little enough to hold."""

_GROUP_BLOBS = 500
"""Chunks that are read together at most."""

_SPLICE_INSTANCE = "//splice"
"""Uploads of spliced blobs have this instance name, which no client can send: none can get hold of them."""

_log = structlog.get_logger(__name__)


class BlobChunking:
    """Splits and splices blobs.

    Args:
        blobs: Where blobs and chunks are.
        results: Where layouts are remembered.
        parameters: Those of FastCDC, as advertised.
        counters: What was done.
    """

    def __init__(
        self, blobs: BlobStore, results: ActionResultStore, parameters: FastCdcParameters, counters: CasCounters
    ) -> None:
        self._blobs = blobs
        self._layouts = ChunkLayouts(results, parameters)
        self._parameters = parameters
        self._counters = counters
        # Each holds up to some 16 MB, and keeps a thread busy.
        self._work = SharedWork("chunking", os.cpu_count() or 1)

    async def split(self, blob: Digest, *, any_layout: bool) -> bytes:
        """Return a blob's layout as a serialized SplitBlobResponse, after making it if none is known.

        Args:
            blob: The blob.
            any_layout: Whether that by which some client spliced the blob will do, if there is none by FastCDC.

        Raises:
            NotFoundError: The blob is not there, or would have too many chunks.
            ResourceExhaustedError: No room is left for the chunks.
        """
        await self._check_present([blob])
        layout = await self._layouts.get(blob, by_fast_cdc=True)
        if layout is None and any_layout:
            layout = await self._layouts.get(blob, by_fast_cdc=False)
        if layout is None:
            layout = await self._work.once(blob, lambda: self._make_layout(blob))
        return layout

    async def splice(self, blob: Digest, chunks: Sequence[Digest], *, by_fast_cdc: bool) -> None:
        """Make a blob of chunks and remember that it consists of them.

        Args:
            blob: What it is to be.
            chunks: What to join.
            by_fast_cdc: Whether the client says that it cut by FastCDC. It is believed when it is so.

        Raises:
            NotFoundError: A chunk is not there.
            InvalidArgumentError: The chunks do not make this blob, or are too many. Nothing is stored.
            ResourceExhaustedError: No room is left for the blob.
        """
        if len(chunks) > MAX_CHUNKS:
            raise InvalidArgumentError("chunk_digests", f"{len(chunks)} are more than {MAX_CHUNKS}")
        total_bytes = sum(chunk.size_bytes for chunk in chunks)
        if total_bytes != blob.size_bytes:
            raise InvalidArgumentError(
                "chunk_digests", f"have {total_bytes} bytes together, where blob {blob} has {blob.size_bytes}"
            )
        await self._check_present(chunks)
        if not await self._is_spliced(blob, chunks):
            key = (blob, tuple(chunks), by_fast_cdc)
            await self._work.once(key, lambda: self._join(blob, chunks, by_fast_cdc=by_fast_cdc))

    async def aclose(self) -> None:
        """Give up what is under way."""
        await self._work.aclose()

    async def _check_present(self, digests: Sequence[Digest]) -> None:
        """Touch blobs.

        Raises:
            NotFoundError: One or more are not there; the message names the first.
        """
        missing = await self._missing(digests)
        if len(missing) == 1:
            raise BlobNotFoundError(missing[0])
        if missing:
            raise NotFoundError(f"{BlobNotFoundError(missing[0]).message}, nor are {len(missing) - 1} more")

    async def _missing(self, digests: Sequence[Digest]) -> list[Digest]:
        return await settled(self._blobs.find_missing([(digest, digest.key, digest.size_bytes) for digest in digests]))

    async def _is_spliced(self, blob: Digest, chunks: Sequence[Digest]) -> bool:
        """Tell whether a blob is there and known to consist of these chunks."""
        if await self._missing([blob]):
            return False
        for by_fast_cdc in (True, False):
            layout = await self._layouts.get(blob, by_fast_cdc=by_fast_cdc)
            if layout == layout_message(chunks, by_fast_cdc=by_fast_cdc):
                return True
        return False

    async def _make_layout(self, blob: Digest) -> bytes:
        """Split a blob: store its chunks and remember which they are."""
        if blob.size_bytes > MAX_CHUNKS * self._parameters.average_bytes:
            # It would most likely come out in the end, after gigabytes of chunks that are no use.
            raise _too_many_chunks(blob)
        chunks: list[Digest] = []
        # Chunks are committed while the next ones are read, cut and hashed.
        storing: asyncio.Future[None] = asyncio.ensure_future(self._store([]))
        try:
            async for group in self._cut(blob):
                chunks += (digest for digest, _ in group)
                if len(chunks) > MAX_CHUNKS:
                    raise _too_many_chunks(blob)
                await storing
                storing = asyncio.ensure_future(self._store(group))
            await storing
        finally:
            storing.cancel()
            await asyncio.gather(storing, return_exceptions=True)
        layout = await self._layouts.put(blob, chunks, by_fast_cdc=True)
        self._counters.split_blobs += 1
        return layout

    async def _cut(self, blob: Digest) -> AsyncIterator[list[tuple[Digest, memoryview]]]:
        """Yield a blob's chunks, many together."""
        cutter = FastCdcCutter(self._parameters)
        group: list[tuple[Digest, memoryview]] = []
        group_bytes = 0
        async for piece in self._blobs.read(blob):
            found = await asyncio.to_thread(_digests, cutter.feed, piece, blob.function)
            group += found
            group_bytes += sum(digest.size_bytes for digest, _ in found)
            if group_bytes >= _GROUP_BYTES:
                yield group
                group, group_bytes = [], 0
        yield group + await asyncio.to_thread(_digests, lambda _: cutter.finish(), b"", blob.function)

    async def _store(self, chunks: Sequence[tuple[Digest, memoryview]]) -> None:
        missing = set(await self._missing([digest for digest, _ in chunks]))
        new = {digest: data for digest, data in chunks if digest in missing}
        for error in await self._blobs.put_many(list(new.items())):
            if error is not None:
                raise error

    async def _join(self, blob: Digest, chunks: Sequence[Digest], *, by_fast_cdc: bool) -> None:
        """Make a blob of its chunks, or verify that they make the one that is there; remember the layout."""
        cutter = FastCdcCutter(self._parameters) if by_fast_cdc else None
        sizes: list[int] = []
        sink = await self._open_sink(blob)
        try:
            async for piece in self._contents(chunks):
                await sink.append(piece)
                if cutter is not None:
                    sizes += await asyncio.to_thread(_sizes, cutter.feed, piece)
            await sink.finish()
        except BaseException:
            await asyncio.shield(sink.abandon())
            raise
        if cutter is not None:
            sizes += map(len, cutter.finish())
        is_fast_cdc = cutter is not None and sizes == [chunk.size_bytes for chunk in chunks]
        await self._layouts.put(blob, chunks, by_fast_cdc=is_fast_cdc)
        self._counters.spliced_blobs += 1

    async def _open_sink(self, blob: Digest) -> _UploadSink | _VerifyingSink:
        if not await self._missing([blob]):
            return _VerifyingSink(blob)
        name = UploadName(_SPLICE_INSTANCE, str(uuid.uuid4()), blob)
        return _UploadSink(await self._blobs.open_upload(name, restart=True))

    async def _contents(self, chunks: Sequence[Digest]) -> AsyncIterator[bytes]:
        """Yield the bytes of chunks in order, small ones together."""
        group: list[Digest] = []
        group_bytes = 0
        for chunk in chunks:
            if group and (group_bytes + chunk.size_bytes > _GROUP_BYTES or len(group) == _GROUP_BLOBS):
                yield await self._read_together(group)
                group, group_bytes = [], 0
            if chunk.size_bytes > _GROUP_BYTES:
                async for piece in self._blobs.read(chunk):
                    yield piece
            else:
                group.append(chunk)
                group_bytes += chunk.size_bytes
        if group:
            yield await self._read_together(group)

    async def _read_together(self, chunks: Sequence[Digest]) -> bytes:
        blobs = await self._blobs.read_many(chunks)
        for chunk, data in zip(chunks, blobs, strict=True):
            if data is None:
                raise BlobNotFoundError(chunk)
        return b"".join(data or b"" for data in blobs)


class _UploadSink:
    """Takes in a blob that is not there yet."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    async def append(self, piece: bytes) -> None:
        await self._upload.append([memoryview(piece)], len(piece))

    async def finish(self) -> None:
        await self._upload.finish()

    async def abandon(self) -> None:
        try:
            await self._upload.abandon()
        except LatheError as error:
            # What is under way matters more; what is staged is forgotten in a day.
            _log.info("splice_not_abandoned", error=str(error))


class _VerifyingSink:
    """Takes in a blob that is there, to see that it is the same."""

    def __init__(self, blob: Digest) -> None:
        self._blob = blob
        self._hasher = blob.function.new_hasher()

    async def append(self, piece: bytes) -> None:
        await asyncio.to_thread(self._hasher.update, piece)

    async def finish(self) -> None:
        if (got := self._hasher.hexdigest()) != self._blob.hash:
            raise DigestMismatchError(self._blob, f"{got}/{self._blob.size_bytes}")

    async def abandon(self) -> None:
        pass


def _too_many_chunks(blob: Digest) -> NotFoundError:
    return NotFoundError(f"blob {blob} would have more than {MAX_CHUNKS} chunks; fetch it as a whole")


def _digests(
    cut: Callable[[bytes], list[memoryview]], piece: bytes, function: DigestFunction
) -> list[tuple[Digest, memoryview]]:
    return [(Digest.of(chunk, function), chunk) for chunk in cut(piece)]


def _sizes(cut: Callable[[bytes], list[memoryview]], piece: bytes) -> list[int]:
    return [len(chunk) for chunk in cut(piece)]
