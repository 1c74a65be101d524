"""SplitBlob and SpliceBlob, of the service ContentAddressableStorage.

Spec: REAPI, ContentAddressableStorage.SplitBlob and SpliceBlob.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_protos import reapi
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, decode, unary
from lathe_shared.wire import message_field

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lathe_cas.blob_chunking import BlobChunking
    from lathe_shared.instance_name import InstanceNames


class BlobChunkingServicer(Servicer):
    """Serves two methods of ``build.bazel.remote.execution.v2.ContentAddressableStorage``.

    Args:
        chunking: Does the work.
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
    """

    service_name = "build.bazel.remote.execution.v2.ContentAddressableStorage"

    def __init__(
        self, chunking: BlobChunking, instance_names: InstanceNames, functions: Collection[DigestFunction]
    ) -> None:
        self._chunking = chunking
        self._instance_names = instance_names
        self._functions = functions

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"SplitBlob": unary(self._split_blob), "SpliceBlob": unary(self._splice_blob)}

    async def _split_blob(self, data: bytes, _context: RpcContext) -> bytes:
        request = decode(reapi.SplitBlobRequest, data)
        self._instance_names.check(request.instance_name)
        blob = self._blob_digest(request)
        # A client that asks for a function that is not offered gets FastCDC, as the specification allows.
        any_layout = request.chunking_function == reapi.ChunkingFunctionValue.UNKNOWN
        return await self._chunking.split(blob, any_layout=any_layout)

    async def _splice_blob(self, data: bytes, _context: RpcContext) -> bytes:
        request = decode(reapi.SpliceBlobRequest, data)
        self._instance_names.check(request.instance_name)
        blob = self._blob_digest(request)
        chunks = [
            Digest.from_message(message, blob.function, f"chunk_digests[{place}]")
            for place, message in enumerate(request.chunk_digests)
        ]
        by_fast_cdc = request.chunking_function == reapi.ChunkingFunctionValue.FAST_CDC_2020
        await self._chunking.splice(blob, chunks, by_fast_cdc=by_fast_cdc)
        return message_field(1, blob.wire)

    def _blob_digest(self, request: reapi.SplitBlobRequest | reapi.SpliceBlobRequest) -> Digest:
        message = request.blob_digest
        function = select_function(request.digest_function, len(message.hash), self._functions, "blob_digest")
        return Digest.from_message(message, function, "blob_digest")
