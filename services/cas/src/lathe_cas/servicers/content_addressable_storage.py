"""ContentAddressableStorage: which blobs are there, many small ones at once, and whole input trees.

Spec: REAPI, service ContentAddressableStorage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_cas.batch_responses import MAX_RESPONSE_BYTES, batch_read_response, batch_update_response
from lathe_cas.tree_walk import TreeWalk
from lathe_shared import cas_wire
from lathe_shared.compressor import Compressor, offered_text
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.errors import BlobNotFoundError, InvalidArgumentError, LatheError
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, server_streaming, unary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence

    from lathe_cas.blob_store import BlobStore
    from lathe_cas.cas_metrics import CasCounters
    from lathe_cas.soon import Soon
    from lathe_shared.instance_name import InstanceNames

_COMPRESSOR_VALUES = frozenset(Compressor)

_FRAMING_SHARE = 32
"""Beyond what clients accept unless they were told otherwise, a response is as long as a batch may be and this part of
it, for what frames the blobs."""


class ContentAddressableStorageServicer(Servicer):
    """Serves ``build.bazel.remote.execution.v2.ContentAddressableStorage``.

    Args:
        store: Where the blobs are.
        instance_names: The instances that are served.
        functions: The digest functions that are offered.
        max_batch_total_size_bytes: Bytes of blobs in one batch, as advertised.
        counters: What was asked for and found.
    """

    service_name = "build.bazel.remote.execution.v2.ContentAddressableStorage"

    def __init__(
        self,
        store: BlobStore,
        instance_names: InstanceNames,
        functions: Collection[DigestFunction],
        max_batch_total_size_bytes: int,
        counters: CasCounters,
    ) -> None:
        self._store = store
        self._instance_names = instance_names
        self._functions = functions
        self._max_batch_bytes = max_batch_total_size_bytes
        self._max_response_bytes = max(
            MAX_RESPONSE_BYTES, max_batch_total_size_bytes + max_batch_total_size_bytes // _FRAMING_SHARE
        )
        self._counters = counters

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "FindMissingBlobs": unary(self._find_missing_blobs),
            "BatchUpdateBlobs": unary(self._batch_update_blobs),
            "BatchReadBlobs": unary(self._batch_read_blobs),
            "GetTree": server_streaming(self._get_tree),
        }

    def _find_missing_blobs(self, data: bytes, _context: RpcContext) -> Soon[bytes]:
        request = cas_wire.read_find_missing(data, self._functions)
        self._instance_names.check(request.instance_name)
        # The fields of the request are those of the response: what is missing goes back as it came.
        missing = self._store.find_missing(request.blobs)
        self._counters.digests_asked_for += len(request.blobs)
        return self._answer_missing(missing) if isinstance(missing, list) else self._answer_later(missing)

    async def _answer_later(self, missing: Awaitable[list[bytes]]) -> bytes:
        return self._answer_missing(await missing)

    def _answer_missing(self, missing: list[bytes]) -> bytes:
        self._counters.digests_missing += len(missing)
        return b"".join(missing)

    async def _batch_update_blobs(self, data: bytes, _context: RpcContext) -> bytes:
        request = cas_wire.read_batch_update(data)
        self._instance_names.check(request.instance_name)
        total_bytes = sum(len(item.data) for item in request.items)
        self._check_batch("requests", total_bytes)
        outcomes: list[LatheError | None] = [None] * len(request.items)
        blobs: list[tuple[Digest, memoryview]] = []
        places: list[int] = []
        zstd_blobs: list[tuple[Digest, memoryview]] = []
        zstd_places: list[int] = []
        zstd_room_bytes = self._max_batch_bytes
        for place, item in enumerate(request.items):
            try:
                digest = self._digest(item.hash, item.size_bytes, request.function_value)
                if item.compressor == Compressor.IDENTITY:
                    blobs.append((digest, item.data))
                    places.append(place)
                    continue
                self._check_compressor("compressor", item.compressor)
                self._check_decoded(zstd_room_bytes - digest.size_bytes)
                zstd_room_bytes -= digest.size_bytes
            except LatheError as error:
                outcomes[place] = error
                continue
            zstd_blobs.append((digest, item.data))
            zstd_places.append(place)
        for place, outcome in zip(places, await self._store.put_many(blobs), strict=True):
            outcomes[place] = outcome
        for place, outcome in zip(zstd_places, await self._store.put_many_zstd(zstd_blobs), strict=True):
            outcomes[place] = outcome
        self._counters.received_bytes += total_bytes
        return batch_update_response([item.digest_wire for item in request.items], outcomes)

    async def _batch_read_blobs(self, data: bytes, _context: RpcContext) -> bytes:
        request = cas_wire.read_batch_read(data)
        self._instance_names.check(request.instance_name)
        self._check_batch("digests", sum(max(size_bytes, 0) for _, _, size_bytes in request.digests))
        outcomes: list[bytes | tuple[Compressor, bytes] | LatheError] = [b""] * len(request.digests)
        digests: list[Digest] = []
        places: list[int] = []
        for place, (_, hash_, size_bytes) in enumerate(request.digests):
            try:
                digests.append(self._digest(hash_, size_bytes, request.function_value))
            except LatheError as error:
                outcomes[place] = error
                continue
            places.append(place)
        blobs: Sequence[bytes | tuple[Compressor, bytes] | None]
        if Compressor.ZSTD in request.acceptable_compressors:
            blobs = await self._store.read_many_as_stored(digests)
        else:
            blobs = await self._store.read_many(digests)
        for place, digest, blob in zip(places, digests, blobs, strict=True):
            if blob is None:
                outcomes[place] = BlobNotFoundError(digest)
                continue
            outcomes[place] = blob
            self._counters.sent_bytes += len(blob[1] if isinstance(blob, tuple) else blob)
        return batch_read_response([wire for wire, _, _ in request.digests], outcomes, self._max_response_bytes)

    async def _get_tree(self, data: bytes, _context: RpcContext) -> AsyncIterator[bytes]:
        request = cas_wire.read_get_tree(data, self._functions)
        self._instance_names.check(request.instance_name)
        walk = TreeWalk(self._store, request.root_digest, request.page_size, request.page_token)
        async for page in walk.pages():
            yield page

    def _digest(self, hash_: str, size_bytes: int, function_value: int) -> Digest:
        return Digest.parse(hash_, size_bytes, select_function(function_value, len(hash_), self._functions))

    @staticmethod
    def _check_compressor(field: str, value: int) -> None:
        if value not in _COMPRESSOR_VALUES:
            raise InvalidArgumentError(field, f"{value} is not one of {offered_text()}")

    def _check_decoded(self, room_bytes: int) -> None:
        if room_bytes < 0:
            raise InvalidArgumentError(
                "digest.size_bytes",
                f"with this blob, the batch decompresses to more than the {self._max_batch_bytes} bytes of a batch",
            )

    def _check_batch(self, field: str, total_bytes: int) -> None:
        if total_bytes > self._max_batch_bytes:
            raise InvalidArgumentError(
                field, f"{total_bytes} bytes of blobs; a batch holds at most {self._max_batch_bytes}, as advertised"
            )
