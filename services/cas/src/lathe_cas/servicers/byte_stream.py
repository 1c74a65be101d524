"""ByteStream: blobs of any size, read in part and written resumably.

Spec: google/bytestream/bytestream.proto; REAPI, ContentAddressableStorage, on resource names and uploads.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import override

from lathe_cas.blob_store import UploadName
from lathe_cas.upload_runner import run_upload
from lathe_cas.upload_session import UploadSession
from lathe_shared import cas_wire
from lathe_shared.compressor import Compressor
from lathe_shared.errors import InvalidArgumentError, LatheError, OutOfRangeError
from lathe_shared.resource_name import ReadResource, WriteResource, parse_read, parse_write
from lathe_shared.service_boundary import (
    EndedBy,
    PendingAnswer,
    Rpc,
    RpcContext,
    Servicer,
    client_streaming,
    server_streaming,
    unary,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    from lathe_cas.blob_store import BlobStore
    from lathe_cas.cas_metrics import CasCounters
    from lathe_shared.digest import DigestFunction
    from lathe_shared.instance_name import InstanceNames

ResourceT = TypeVar("ResourceT", ReadResource, WriteResource)


class ByteStreamServicer(Servicer):
    """Serves ``google.bytestream.ByteStream``.

    Args:
        store: Where the blobs are.
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
        counters: What was sent and received.
    """

    service_name = "google.bytestream.ByteStream"

    def __init__(
        self,
        store: BlobStore,
        instance_names: InstanceNames,
        functions: Collection[DigestFunction],
        counters: CasCounters,
    ) -> None:
        self._store = store
        self._instance_names = instance_names
        self._functions = functions
        self._counters = counters

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "Read": server_streaming(self._read, at_once=self._read_at_once),
            "Write": client_streaming(self._write, at_once=self._write_at_once),
            "QueryWriteStatus": unary(self._query_write_status),
        }

    def _read_at_once(self, data: bytes, _context: RpcContext) -> bytes | None:
        """Answer the read of a small blob, which is one response."""
        resource, offset, limit = self._wanted(data)
        if resource.compressor is not Compressor.IDENTITY:
            return None
        whole = self._store.read_at_once(resource.digest, offset, limit)
        if not whole:
            return None  # no response at all, or a large blob
        self._counters.sent_bytes += len(whole)
        return cas_wire.read_response_prefix(len(whole)) + whole

    async def _read(self, data: bytes, _context: RpcContext) -> AsyncIterator[bytes]:
        resource, offset, limit = self._wanted(data)
        if resource.compressor is Compressor.ZSTD:
            pieces = self._store.read_zstd(resource.digest, offset)
        else:
            pieces = self._store.read(resource.digest, offset, limit)
        async for piece in pieces:
            self._counters.sent_bytes += len(piece)
            yield cas_wire.read_response_prefix(len(piece)) + piece

    def _wanted(self, data: bytes) -> tuple[ReadResource, int, int]:
        """Return which blob a read is for, from which byte, and how many of them."""
        request = cas_wire.read_read_request(data)
        resource = self._served(parse_read(request.resource_name, self._functions))
        if request.read_offset < 0:
            # Spec: ReadRequest.read_offset, which has one error for what is before the blob and what is behind it.
            raise OutOfRangeError(f"read_offset {request.read_offset} is negative")
        if request.read_limit < 0:
            raise InvalidArgumentError("read_limit", f"{request.read_limit} is negative")
        if request.read_limit and resource.compressor is not Compressor.IDENTITY:
            raise InvalidArgumentError("read_limit", f"{request.read_limit}, where compressed reads have no limit")
        return resource, request.read_offset, request.read_limit

    def _write_at_once(self, data: bytes, _context: RpcContext) -> PendingAnswer | None:
        """Store a small blob that came as a whole."""
        session = UploadSession(self._parse_write)
        try:
            session.receive(cas_wire.read_write_request(data))
            whole = session.whole
            if whole is None or session.resource.compressor is not Compressor.IDENTITY:
                return None
            resource = session.resource
            name = UploadName(resource.instance_name, resource.upload_id, resource.digest)
            stored = self._store.put_at_once(name, whole)
            if stored is None:
                return None
        except LatheError:
            self._count_received(len(data))
            raise
        self._count_received(len(data))
        response = cas_wire.write_response(resource.digest.size_bytes)

        def answer(outcome: asyncio.Future[None], _ended_by: EndedBy | None) -> bytes:
            outcome.result()
            return response

        return PendingAnswer(stored, answer)

    async def _write(self, messages: AsyncIterator[bytes], _context: RpcContext) -> bytes:
        committed_bytes = await run_upload(messages, self._store, self._parse_write, self._count_received)
        return cas_wire.write_response(committed_bytes)

    async def _query_write_status(self, data: bytes, _context: RpcContext) -> bytes:
        resource = self._parse_write(cas_wire.read_query_write_status(data))
        name = UploadName(resource.instance_name, resource.upload_id, resource.digest, resource.compressor)
        return cas_wire.query_write_status_response(*await self._store.upload_status(name))

    def _count_received(self, size_bytes: int) -> None:
        self._counters.received_bytes += size_bytes

    def _parse_write(self, name: str) -> WriteResource:
        return self._served(parse_write(name, self._functions))

    def _served(self, resource: ResourceT) -> ResourceT:
        """Return a resource if its instance is served.

        Raises:
            InvalidArgumentError: It is not.
        """
        self._instance_names.check(resource.instance_name)
        return resource
