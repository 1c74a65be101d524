"""A content addressable storage and action cache in memory, behind the real RPCs.

For tests of services that need a CAS and may not import ``lathe_cas``. It answers as that one does, as far as clients
can tell; what it lacks is durability, limits and eviction, in whose place tests remove blobs themselves.

    cas = FakeCas()
    digest = cas.put(b"content")
    async with serving(cas.servicers()) as channel:
        ...

Spec: REAPI; google/bytestream/bytestream.proto.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from lathe_protos import reapi, semver
from lathe_shared import cas_wire
from lathe_shared.action_result_wire import read_references
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.errors import (
    BlobNotFoundError,
    DigestMismatchError,
    InvalidArgumentError,
    LatheError,
    NotFoundError,
    OutOfRangeError,
)
from lathe_shared.instance_name import InstanceNames
from lathe_shared.resource_name import parse_read, parse_write
from lathe_shared.service_boundary import (
    Rpc,
    RpcContext,
    Servicer,
    client_streaming,
    decode,
    server_streaming,
    unary,
)
from lathe_shared.tree_wire import read_directory, tree_file_digests
from lathe_shared.wire import bytes_field, message_field

if TYPE_CHECKING:
    from lathe_shared.testing.builders import BlobSet

READ_CHUNK_BYTES = 1 << 16


class FakeCas:
    """Blobs and action results in memory.

    Args:
        instance_names: The instances that are served; none means any.

    Attributes:
        blobs: What is there; tests may add and remove as they like.
        action_results: Serialized ActionResults by instance name and action digest.
        calls: How often each method was called, by its short name.
        max_batch_total_size_bytes: What it advertises and holds batches to; 0 advertises nothing and takes anything.
    """

    def __init__(self, instance_names: Iterable[str] = ()) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.action_results: dict[tuple[str, Digest], bytes] = {}
        self.calls: Counter[str] = Counter()
        self.max_batch_total_size_bytes = 4_000_000
        self.instances = InstanceNames(instance_names)
        self.uploads: dict[str, bytearray] = {}

    def put(self, data: bytes) -> Digest:
        """Store bytes and return their digest."""
        digest = Digest.of(data)
        self.blobs[digest] = data
        return digest

    def put_all(self, blobs: BlobSet) -> None:
        """Store everything that a test has built."""
        self.blobs.update(blobs.blobs)

    def remove(self, digest: Digest) -> None:
        """Lose a blob, as eviction would."""
        del self.blobs[digest]

    def get(self, digest: Digest) -> bytes | None:
        """Return a blob if it is there; the empty one always is."""
        return b"" if digest.is_empty else self.blobs.get(digest)

    def require(self, digest: Digest) -> bytes:
        """Return a blob.

        Raises:
            BlobNotFoundError: It is not there.
        """
        data = self.get(digest)
        if data is None:
            raise BlobNotFoundError(digest)
        return data

    def store(self, digest: Digest, data: bytes) -> None:
        """Store a blob whose bytes match its digest.

        Raises:
            DigestMismatchError: They don't.
        """
        got = Digest.of(data, digest.function)
        if got != digest:
            raise DigestMismatchError(digest, str(got))
        self.blobs[digest] = data

    def servicers(self) -> list[Servicer]:
        """Return everything that a real CAS serves."""
        return [_Storage(self), _ByteStream(self), _ActionCache(self), _Capabilities(self)]


class _Storage(Servicer):
    service_name = "build.bazel.remote.execution.v2.ContentAddressableStorage"

    def __init__(self, cas: FakeCas) -> None:
        self._cas = cas

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "FindMissingBlobs": unary(self._find_missing),
            "BatchUpdateBlobs": unary(self._batch_update),
            "BatchReadBlobs": unary(self._batch_read),
            "GetTree": server_streaming(self._get_tree),
        }

    def _find_missing(self, data: bytes, _context: RpcContext) -> bytes:
        self._cas.calls["FindMissingBlobs"] += 1
        request = cas_wire.read_find_missing(data)
        self._cas.instances.check(request.instance_name)
        missing = []
        for item, key, size_bytes in request.blobs:
            digest = Digest(key[1:].hex(), size_bytes, request.function)
            if self._cas.get(digest) is None:
                missing.append(item)
        return b"".join(missing)

    def _batch_update(self, data: bytes, _context: RpcContext) -> bytes:
        self._cas.calls["BatchUpdateBlobs"] += 1
        request = cas_wire.read_batch_update(data)
        self._cas.instances.check(request.instance_name)
        self._check_batch("requests", sum(len(item.data) for item in request.items))
        parts = []
        for item in request.items:
            try:
                function = select_function(request.function_value, len(item.hash), tuple(DigestFunction))
                self._cas.store(Digest.parse(item.hash, item.size_bytes, function), bytes(item.data))
                status = b""
            except LatheError as error:
                status = cas_wire.rpc_status(error.status.value, error.message)
            parts.append(cas_wire.batch_update_response_item(item.digest_wire, status))
        return b"".join(parts)

    def _batch_read(self, data: bytes, _context: RpcContext) -> bytes:
        self._cas.calls["BatchReadBlobs"] += 1
        request = cas_wire.read_batch_read(data)
        self._cas.instances.check(request.instance_name)
        self._check_batch("digests", sum(size for _, _, size in request.digests))
        parts = []
        for wire, hash_, size_bytes in request.digests:
            blob, status = b"", b""
            try:
                function = select_function(request.function_value, len(hash_), tuple(DigestFunction))
                blob = self._cas.require(Digest.parse(hash_, size_bytes, function))
            except LatheError as error:
                status = cas_wire.rpc_status(error.status.value, error.message)
            parts.append(cas_wire.batch_read_response_item(wire, blob, status))
        return b"".join(parts)

    def _check_batch(self, field: str, total_bytes: int) -> None:
        limit = self._cas.max_batch_total_size_bytes
        if limit and total_bytes > limit:
            raise InvalidArgumentError(field, f"more than {limit} bytes in one batch")

    async def _get_tree(self, data: bytes, _context: RpcContext) -> AsyncIterator[bytes]:
        self._cas.calls["GetTree"] += 1
        request = cas_wire.read_get_tree(data)
        self._cas.instances.check(request.instance_name)
        self._cas.require(request.root_digest)
        pending = [request.root_digest]
        seen = set(pending)
        while pending:
            directory = self._cas.get(pending.pop(0))
            if directory is None:
                continue
            yield message_field(1, directory)
            for entry in read_directory(directory).directories:
                child = Digest(entry.hash, entry.size_bytes, request.root_digest.function)
                if child not in seen:
                    seen.add(child)
                    pending.append(child)


class _ByteStream(Servicer):
    service_name = "google.bytestream.ByteStream"

    def __init__(self, cas: FakeCas) -> None:
        self._cas = cas

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {
            "Read": server_streaming(self._read),
            "Write": client_streaming(self._write),
            "QueryWriteStatus": unary(self._query_write_status),
        }

    async def _read(self, data: bytes, _context: RpcContext) -> AsyncIterator[bytes]:
        self._cas.calls["Read"] += 1
        request = cas_wire.read_read_request(data)
        resource = parse_read(request.resource_name)
        self._cas.instances.check(resource.instance_name)
        blob = self._cas.require(resource.digest)
        if request.read_limit < 0:
            raise InvalidArgumentError("read_limit", "a negative limit is not accepted")
        if not 0 <= request.read_offset <= len(blob):
            raise OutOfRangeError(f"offset {request.read_offset} is not within the {len(blob)} bytes of the blob")
        end = request.read_offset + request.read_limit if request.read_limit else len(blob)
        for start in range(request.read_offset, min(end, len(blob)), READ_CHUNK_BYTES):
            yield bytes_field(10, blob[start : min(start + READ_CHUNK_BYTES, end)])

    async def _write(self, requests: AsyncIterator[bytes], _context: RpcContext) -> bytes:
        self._cas.calls["Write"] += 1
        name = ""
        async for data in requests:
            request = cas_wire.read_write_request(data)
            name = request.resource_name or name
            resource = parse_write(name)
            self._cas.instances.check(resource.instance_name)
            if self._cas.get(resource.digest) is not None:
                return cas_wire.write_response(resource.digest.size_bytes)
            upload = self._cas.uploads.setdefault(name, bytearray())
            if request.write_offset != len(upload):
                raise InvalidArgumentError("write_offset", f"{request.write_offset} where {len(upload)} is expected")
            upload += request.data
            if request.finish_write:
                del self._cas.uploads[name]
                self._cas.store(resource.digest, bytes(upload))
                return cas_wire.write_response(len(upload))
        raise InvalidArgumentError("finish_write", "the stream ended before the upload was finished")

    def _query_write_status(self, data: bytes, _context: RpcContext) -> bytes:
        self._cas.calls["QueryWriteStatus"] += 1
        name = cas_wire.read_query_write_status(data)
        resource = parse_write(name)
        if self._cas.get(resource.digest) is not None:
            return cas_wire.query_write_status_response(resource.digest.size_bytes, True)
        upload = self._cas.uploads.get(name)
        if upload is None:
            raise NotFoundError(f"no upload {name}")
        return cas_wire.query_write_status_response(len(upload), False)


class _ActionCache(Servicer):
    service_name = "build.bazel.remote.execution.v2.ActionCache"

    def __init__(self, cas: FakeCas) -> None:
        self._cas = cas

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"GetActionResult": unary(self._get), "UpdateActionResult": unary(self._update)}

    def _get(self, data: bytes, _context: RpcContext) -> bytes:
        self._cas.calls["GetActionResult"] += 1
        request = cas_wire.read_get_action_result(data)
        self._cas.instances.check(request.instance_name)
        result = self._cas.action_results.get((request.instance_name, request.digest))
        if result is None or not self._is_complete(result, request.digest.function):
            raise NotFoundError(f"no action result for {request.digest}")
        return result

    def _update(self, data: bytes, _context: RpcContext) -> bytes:
        self._cas.calls["UpdateActionResult"] += 1
        request = cas_wire.read_update_action_result(data)
        self._cas.instances.check(request.instance_name)
        self._cas.action_results[request.instance_name, request.digest] = request.action_result
        return request.action_result

    def _is_complete(self, result: bytes, function: DigestFunction) -> bool:
        references = read_references(result)
        wanted = [*references.blobs, *references.trees, *references.root_directories]
        for hash_, size_bytes in references.trees:
            tree = self._cas.get(Digest(hash_, size_bytes, function))
            if tree is not None:
                wanted.extend(tree_file_digests(tree))
        return all(self._cas.get(Digest(hash_, size_bytes, function)) is not None for hash_, size_bytes in wanted)


class _Capabilities(Servicer):
    service_name = "build.bazel.remote.execution.v2.Capabilities"

    def __init__(self, cas: FakeCas) -> None:
        self._cas = cas

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"GetCapabilities": unary(self._get)}

    def _get(self, data: bytes, _context: RpcContext) -> bytes:
        self._cas.calls["GetCapabilities"] += 1
        self._cas.instances.check(decode(reapi.GetCapabilitiesRequest, data).instance_name)
        cache = reapi.CacheCapabilities(
            digest_functions=[reapi.DigestFunctionValue(int(function)) for function in DigestFunction],
            action_cache_update_capabilities=reapi.ActionCacheUpdateCapabilities(update_enabled=True),
            max_batch_total_size_bytes=self._cas.max_batch_total_size_bytes,
            symlink_absolute_path_strategy=reapi.SymlinkAbsolutePathStrategyValue(
                reapi.SymlinkAbsolutePathStrategyValue.ALLOWED
            ),
        )
        capabilities = reapi.ServerCapabilities(
            cache_capabilities=cache,
            low_api_version=semver.SemVer(major=2),
            high_api_version=semver.SemVer(major=2, minor=3),
        )
        return bytes(capabilities)
