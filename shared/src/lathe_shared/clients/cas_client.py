"""The content addressable storage, as services that need blobs see it.

Bytes that are read are verified against their digest before anybody gets them, apart from ``read_stream``.

Spec: REAPI, ContentAddressableStorage.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from grpclib.const import Status

from lathe_shared.cas_wire import find_missing_request, find_missing_response_digests
from lathe_shared.clients.batch_limit import BatchLimit
from lathe_shared.clients.batch_messages import (
    ITEM_OVERHEAD_BYTES,
    batch_read_request,
    batch_update_request,
    read_batch_read_response,
    read_batch_update_response,
)
from lathe_shared.clients.blob_file import FileSource, FileTarget, write_file
from lathe_shared.clients.byte_stream_client import ByteStreamClient, transfer_seconds
from lathe_shared.clients.rpc_client import RetryPolicy, RpcClient
from lathe_shared.clock import SystemClock
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import BlobNotFoundError, InternalError, LatheError, NotFoundError, UnavailableError
from lathe_shared.status_details import error_from
from lathe_shared.wire import message_field, scan, string_field, text, varint_field

if TYPE_CHECKING:
    from lathe_shared.clock import Clock
    from lathe_shared.grpc_transport import GrpcChannel

_SERVICE = "/build.bazel.remote.execution.v2.ContentAddressableStorage/"

MAX_BATCH_BYTES = 4_000_000
"""What goes into one batch, or less if the CAS advertises less: Lathe's does when its operator says so."""

MAX_BATCHED_BLOB_BYTES = 256 << 10
"""Larger blobs travel by ByteStream: a batch is held in memory whole on both sides. So do those that are too large for
any batch of this CAS."""

MAX_DIGESTS_PER_QUERY = 10_000
"""Digests in one FindMissingBlobs: 750 kB, and about 10 ms of the CAS's time."""

CONCURRENT_TRANSFERS = 16
"""Batches and streams that one client has under way at once."""

BlobSource: TypeAlias = "bytes | Path"
"""Where a blob's bytes are."""


class CasClient:
    """Finds, reads and writes blobs.

    Args:
        channel: The connection to the CAS.
        retry: How calls are tried again while the CAS is away.
        clock: What pauses between tries are measured by, and the age of what the CAS has said.
    """

    def __init__(self, channel: GrpcChannel, *, retry: RetryPolicy | None = None, clock: Clock | None = None) -> None:
        clock = clock or SystemClock()
        self._rpc = RpcClient(channel, "the CAS", retry=retry, clock=clock)
        self._limit = BatchLimit(self._rpc, clock, MAX_BATCH_BYTES)
        self._byte_stream = ByteStreamClient(self._rpc)
        self._transfers = asyncio.Semaphore(CONCURRENT_TRANSFERS)

    async def find_missing(self, instance_name: str, digests: Iterable[Digest]) -> set[Digest]:
        """Return those of the digests that the CAS lacks, and keep the others from eviction for a while.

        Raises:
            LatheError: The CAS answered with an error, or stayed away.
        """
        missing: set[Digest] = set()
        for function, group in _by_function({digest for digest in digests if not digest.is_empty}):
            for start in range(0, len(group), MAX_DIGESTS_PER_QUERY):
                part = group[start : start + MAX_DIGESTS_PER_QUERY]
                response = await self._rpc.unary(
                    _SERVICE + "FindMissingBlobs", find_missing_request(instance_name, part)
                )
                missing.update(Digest(hash_, size, function) for hash_, size in find_missing_response_digests(response))
        return missing

    async def read(self, instance_name: str, digest: Digest) -> bytes:
        """Return a blob; for those of moderate size, since it is held in memory.

        Raises:
            BlobNotFoundError: The CAS does not hold the blob.
            LatheError: It answered with another error, or stayed away.
        """
        if digest.is_empty:
            return b""
        if digest.size_bytes <= MAX_BATCHED_BLOB_BYTES:
            found = (await self.batch_read(instance_name, [digest]))[digest]
            if isinstance(found, LatheError):
                raise found
            return found
        return await self._read_whole_stream(instance_name, digest)

    async def _read_whole_stream(self, instance_name: str, digest: Digest) -> bytes:
        async with self._transfers, aclosing(self.read_stream(instance_name, digest)) as pieces:
            data = b"".join([piece async for piece in pieces])
        if (error := self._mismatch(digest, data)) is not None:
            raise error
        return data

    async def read_stream(
        self, instance_name: str, digest: Digest, offset: int = 0
    ) -> AsyncGenerator[memoryview, None]:
        """Give a blob's bytes from an offset on, in pieces, not verified.

        Close the generator (``contextlib.aclosing``) if you may leave it early.

        Raises:
            BlobNotFoundError: The CAS does not hold the blob.
            LatheError: It answered with another error, or stayed away.
        """
        if digest.is_empty:
            return
        async with aclosing(self._byte_stream.read(instance_name, digest, offset)) as pieces:
            async for piece in pieces:
                yield piece

    async def read_to_file(self, instance_name: str, digest: Digest, path: Path, *, mode: int = 0o644) -> None:
        """Make a file of a blob.

        The bytes go to a temporary file beside ``path``, which takes its name when all of them are there and verified;
        ``path`` is never partial. Nothing is fsynced.

        Args:
            instance_name: The instance to ask.
            digest: The blob.
            path: The file; what has that name is replaced.
            mode: The file's permissions, whatever the umask.

        Raises:
            BlobNotFoundError: The CAS does not hold the blob.
            LatheError: It answered with another error, or stayed away.
            OSError: The file cannot be written.
        """
        if digest.size_bytes <= MAX_BATCHED_BLOB_BYTES:
            await asyncio.to_thread(write_file, path, digest, mode, await self.read(instance_name, digest))
            return
        async with self._transfers:
            target = await asyncio.to_thread(FileTarget, path, digest, mode)
            try:
                async with aclosing(self.read_stream(instance_name, digest)) as pieces:
                    await target.write_all(pieces)
                await asyncio.to_thread(target.commit)
            finally:
                target.close()

    async def batch_read(self, instance_name: str, digests: Iterable[Digest]) -> dict[Digest, bytes | LatheError]:
        """Read many blobs, each with its bytes or its own error.

        What fits goes into batches, the rest over ByteStream. A blob that is not there has ``BlobNotFoundError``; the
        blobs of a batch that is refused as a whole share its error.

        Raises:
            UnavailableError: The CAS stayed away.
            LatheError: It did not say how large batches may be.
        """
        found: dict[Digest, bytes | LatheError] = {}
        wanted = set()
        for digest in digests:
            if digest.is_empty:
                found[digest] = b""
            else:
                wanted.add(digest)

        async def one(digest: Digest) -> None:
            try:
                found[digest] = await self._read_whole_stream(instance_name, digest)
            except UnavailableError:
                raise
            except LatheError as error:
                found[digest] = error

        batches, streamed = await self._divided(instance_name, wanted)
        try:
            async with asyncio.TaskGroup() as group:
                for function, batch in batches:
                    group.create_task(self._read_batch(instance_name, function, batch, found))
                for digest in streamed:
                    group.create_task(one(digest))
        except ExceptionGroup as errors:
            raise _first(errors) from None
        return found

    async def _read_batch(
        self,
        instance_name: str,
        function: DigestFunction,
        batch: Sequence[Digest],
        found: dict[Digest, bytes | LatheError],
    ) -> None:
        unanswered = set(batch)
        request = batch_read_request(instance_name, function, batch)
        try:
            async with self._transfers:
                response = await self._rpc.unary(_SERVICE + "BatchReadBlobs", request)
            items = read_batch_read_response(response)
        except UnavailableError:
            raise
        except LatheError as error:
            found.update(dict.fromkeys(batch, error))
            return
        for item in items:
            digest = Digest(item.hash, item.size_bytes, function)
            if digest not in unanswered:
                continue
            unanswered.remove(digest)
            if item.code == Status.NOT_FOUND.value:
                found[digest] = BlobNotFoundError(digest)
            elif item.code:
                found[digest] = error_from(Status(item.code), item.message)
            else:
                found[digest] = self._mismatch(digest, item.data) or item.data
        for digest in unanswered:
            found[digest] = InternalError(f"{self._rpc.peer} left {digest} out of its answer")

    async def write(self, instance_name: str, digest: Digest, data: bytes) -> None:
        """Upload a blob from memory; returns when the CAS has it.

        Raises:
            InvalidArgumentError: The bytes do not match the digest.
            LatheError: The CAS answered with another error, or stayed away.
        """
        await self._write_all(instance_name, {digest: data})

    async def write_file(self, instance_name: str, digest: Digest, path: Path) -> None:
        """Upload a blob from a file; returns when the CAS has it.

        Raises:
            InvalidArgumentError: The file's bytes do not match the digest.
            LatheError: The CAS answered with another error, or stayed away.
            OSError: The file cannot be read.
        """
        await self._write_all(instance_name, {digest: path})

    async def upload(self, instance_name: str, blobs: Mapping[Digest, BlobSource]) -> set[Digest]:
        """Upload those of many blobs that the CAS lacks, in batches and streams side by side.

        Args:
            instance_name: The instance to upload to.
            blobs: Where the bytes of each are.

        Returns:
            The digests that were uploaded; the CAS had the others.

        Raises:
            LatheError: The CAS answered with an error, or stayed away; others may have been uploaded.
            OSError: A file cannot be read.
        """
        missing = await self.find_missing(instance_name, blobs)
        await self._write_all(instance_name, {digest: blobs[digest] for digest in missing})
        return missing

    async def _write_all(self, instance_name: str, blobs: Mapping[Digest, BlobSource]) -> None:
        batches, streamed = await self._divided(instance_name, {digest for digest in blobs if not digest.is_empty})
        try:
            async with asyncio.TaskGroup() as group:
                for function, batch in batches:
                    group.create_task(self._write_batch(instance_name, function, batch, blobs))
                for digest in streamed:
                    group.create_task(self._write_stream(instance_name, digest, blobs[digest]))
        except ExceptionGroup as errors:
            raise _first(errors) from None

    async def _write_batch(
        self,
        instance_name: str,
        function: DigestFunction,
        batch: Sequence[Digest],
        blobs: Mapping[Digest, BlobSource],
    ) -> None:
        async with self._transfers:
            contents = await asyncio.to_thread(lambda: [(digest, _content(blobs[digest])) for digest in batch])
            request = batch_update_request(instance_name, function, contents)
            response = await self._rpc.unary(_SERVICE + "BatchUpdateBlobs", request)
        acknowledged = set()
        for item in read_batch_update_response(response):
            if item.code:
                raise error_from(Status(item.code), item.message)
            acknowledged.add((item.hash, item.size_bytes))
        for digest in batch:
            if (digest.hash, digest.size_bytes) not in acknowledged:
                raise InternalError(f"{self._rpc.peer} left {digest} out of its answer")

    async def _write_stream(self, instance_name: str, digest: Digest, source: BlobSource) -> None:
        async with self._transfers:
            if isinstance(source, bytes):

                async def read_at(offset: int, size: int) -> bytes:
                    return source[offset : offset + size]

                await self._byte_stream.write(instance_name, digest, read_at)
            else:
                with FileSource(source) as file:
                    await self._byte_stream.write(instance_name, digest, file.read_at)

    async def get_tree(self, instance_name: str, root: Digest) -> list[bytes]:
        """Return the serialized Directory messages under a root directory, the root first.

        Directories that the CAS lacks are left out, as GetTree does.

        Raises:
            BlobNotFoundError: The root itself is not there.
            LatheError: The CAS answered with another error, or stayed away.
        """

        async def call() -> list[bytes]:
            directories: list[bytes] = []
            token = ""
            while True:
                request = (
                    string_field(1, instance_name)
                    + message_field(2, root.wire)
                    + string_field(4, token)
                    + varint_field(5, root.function)
                )
                token = ""
                stream = self._rpc.server_stream(_SERVICE + "GetTree", request, timeout_seconds=transfer_seconds(0))
                async with aclosing(stream) as messages:
                    async for message in messages:
                        for tag, a, b in scan(message):
                            if tag == 0x0A:
                                directories.append(message[a:b])
                            elif tag == 0x12:
                                token = text(message, a, b)
                if not token:
                    return directories

        try:
            return await self._rpc.retried(call)
        except NotFoundError:
            raise BlobNotFoundError(root) from None

    async def _divided(
        self, instance_name: str, digests: Set[Digest]
    ) -> tuple[list[tuple[DigestFunction, list[Digest]]], Set[Digest]]:
        """Divide blobs into batches that the CAS takes, and those that travel alone.

        The CAS is not asked for its limit if there is nothing to put into a batch.
        """
        small = {digest for digest in digests if digest.size_bytes <= MAX_BATCHED_BLOB_BYTES}
        if not small:
            return [], digests
        limit = await self._limit.get(instance_name)
        fitting = {digest for digest in small if _size_in_batch(digest) <= limit}
        return list(_batches(fitting, limit)), digests - fitting

    def _mismatch(self, digest: Digest, data: bytes) -> LatheError | None:
        got = Digest.of(data, digest.function)
        return None if got == digest else InternalError(f"{self._rpc.peer} sent {got} in place of {digest}")


def _content(source: BlobSource) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _by_function(digests: Iterable[Digest]) -> Iterator[tuple[DigestFunction, list[Digest]]]:
    """Group digests by their function, since a request has one function for all; sorted, so that runs are alike."""
    groups: defaultdict[DigestFunction, list[Digest]] = defaultdict(list)
    for digest in sorted(digests):
        groups[digest.function].append(digest)
    yield from groups.items()


def _size_in_batch(digest: Digest) -> int:
    """Return what a blob takes of a batch, with what it costs beside its bytes."""
    return digest.size_bytes + ITEM_OVERHEAD_BYTES


def _batches(digests: Iterable[Digest], limit: int) -> Iterator[tuple[DigestFunction, list[Digest]]]:
    """Split digests, each of which fits, into batches that stay within the limit."""
    for function, group in _by_function(digests):
        batch: list[Digest] = []
        total = 0
        for digest in group:
            size = _size_in_batch(digest)
            if batch and total + size > limit:
                yield function, batch
                batch, total = [], 0
            batch.append(digest)
            total += size
        if batch:
            yield function, batch


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error by which a group of tasks ended.

    Not by ``except*``: what is raised inside that comes out wrapped in a group again before Python 3.11.4.
    """
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
