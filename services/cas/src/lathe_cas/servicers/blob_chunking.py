"""SplitBlob and SpliceBlob, of the service ContentAddressableStorage.

Spec: REAPI, ContentAddressableStorage.SplitBlob and SpliceBlob.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_cas.chunking_wire import read_splice
from lathe_protos import reapi
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, decode, unary
from lathe_shared.wire import message_field

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lathe_cas.blob_chunking import BlobChunking
    from lathe_shared.instance_name import InstanceNames

_INLINE_PARSE_BYTES = 64 << 10
"""Up to this size, some 900 chunks, a request is parsed on the event loop, in a few milliseconds."""


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
        message = request.blob_digest
        function = select_function(request.digest_function, len(message.hash), self._functions, "blob_digest")
        blob = Digest.from_message(message, function, "blob_digest")
        # A client that asks for a function that is not offered gets FastCDC, as the specification allows.
        any_layout = request.chunking_function == reapi.ChunkingFunctionValue.UNKNOWN
        return await self._chunking.split(blob, any_layout=any_layout)

    async def _splice_blob(self, data: bytes, _context: RpcContext) -> bytes:
        if len(data) <= _INLINE_PARSE_BYTES:
            request = read_splice(data, self._functions)
        else:
            request = await asyncio.to_thread(read_splice, data, self._functions)
        self._instance_names.check(request.instance_name)
        by_fast_cdc = request.chunking_function == reapi.ChunkingFunctionValue.FAST_CDC_2020
        await self._chunking.splice(request.blob, request.chunks, by_fast_cdc=by_fast_cdc)
        return message_field(1, request.blob.wire)
