"""A plain gRPC client of a Lathe cluster, as another project would write one."""

import hashlib
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
from tests.integration.independent_client.generated_api import GeneratedApi

INSTANCE = "main"
# A WriteRequest of this size is what clients send; below any limit of message sizes.
CHUNK_BYTES = 64 * 1024
# Of each call, unless it says otherwise: only reached when something hangs.
RPC_SECONDS = 60

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    # One service knows nothing of the connections of another test.
    ("grpc.use_local_subchannel_pool", 1),
    # A refused call ends there: a retry by the library would hide it.
    ("grpc.enable_retries", 0),
    ("grpc.service_config", f'{{"methodConfig": [{{"name": [{{}}], "timeout": "{RPC_SECONDS}s"}}]}}'),
]


class IndependentClient:
    """Stubs for every service, and the few steps that most tests need.

    Args:
        api: The generated code.
        cas_address: host:port of the CAS.
        scheduler_address: host:port of the scheduler's client port.
        max_receive_bytes: Bound on a message that arrives; -1 for none.
    """

    def __init__(
        self, api: GeneratedApi, cas_address: str, scheduler_address: str, *, max_receive_bytes: int = -1
    ) -> None:
        options = [*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", max_receive_bytes)]
        self.api = api
        self.cas_channel = grpc.insecure_channel(cas_address, options=options)
        self.scheduler_channel = grpc.insecure_channel(scheduler_address, options=options)
        self.cas: Any = api.reapi_stubs.ContentAddressableStorageStub(self.cas_channel)
        self.bytestream: Any = api.bytestream_stubs.ByteStreamStub(self.cas_channel)
        self.action_cache: Any = api.reapi_stubs.ActionCacheStub(self.cas_channel)
        self.proxied_action_cache: Any = api.reapi_stubs.ActionCacheStub(self.scheduler_channel)
        self.execution: Any = api.reapi_stubs.ExecutionStub(self.scheduler_channel)
        self.operations: Any = api.operations_stubs.OperationsStub(self.scheduler_channel)

    def close(self) -> None:
        """Close both connections."""
        self.cas_channel.close()
        self.scheduler_channel.close()

    def digest(self, data: bytes) -> Any:
        """Return the SHA-256 digest of bytes, stored or not."""
        return self.api.reapi.Digest(hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def store(self, *blobs: bytes) -> list[Any]:
        """Upload small blobs in one batch; return their digests."""
        digests = [self.digest(data) for data in blobs]
        requests = [{"digest": digest, "data": data} for digest, data in zip(digests, blobs, strict=True)]
        answer = self.cas.BatchUpdateBlobs(
            self.api.reapi.BatchUpdateBlobsRequest(instance_name=INSTANCE, requests=requests)
        )
        assert [response.status.code for response in answer.responses] == [0] * len(blobs), answer
        return digests

    def missing(self, *digests: Any) -> list[str]:
        """Return the hashes of those that the CAS lacks."""
        request = self.api.reapi.FindMissingBlobsRequest(instance_name=INSTANCE, blob_digests=digests)
        return [digest.hash for digest in self.cas.FindMissingBlobs(request).missing_blob_digests]

    def read(self, name: str, offset: int = 0, limit: int = 0) -> bytes:
        """Read a resource by ByteStream."""
        request = self.api.bytestream.ReadRequest(resource_name=name, read_offset=offset, read_limit=limit)
        return b"".join(response.data for response in self.bytestream.Read(request))

    def write(self, name: str, data: bytes, offset: int = 0) -> int:
        """Write ``data`` from ``offset`` on to the end of a resource; return the committed size."""
        return int(self.bytestream.Write(self.write_requests(name, data, offset)).committed_size)

    def write_requests(self, name: str, data: bytes, offset: int = 0, *, finish: bool = True) -> Iterator[Any]:
        """Cut ``data`` from ``offset`` on into requests as clients do: the name only in the first one."""
        for start in range(offset, max(len(data), offset + 1), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            yield self.api.bytestream.WriteRequest(
                resource_name=name if start == offset else "",
                write_offset=start,
                data=piece,
                finish_write=finish and start + CHUNK_BYTES >= len(data),
            )

    def read_name(self, data: bytes) -> str:
        """Return the resource name under which a blob is read."""
        return f"{INSTANCE}/blobs/{self.blob_name(data)}"

    def upload_name(self, data: bytes) -> str:
        """Return a fresh resource name for an upload."""
        return f"{INSTANCE}/uploads/{uuid.uuid4()}/blobs/{self.blob_name(data)}"

    @staticmethod
    def blob_name(data: bytes) -> str:
        """Return ``hash/size``."""
        return f"{hashlib.sha256(data).hexdigest()}/{len(data)}"

    def details(self, error: grpc.RpcError) -> list[Any]:
        """Unpack the status details of an error, as google.rpc says they travel."""
        trailers: Any = error.trailing_metadata()
        packed = dict(trailers or ()).get("grpc-status-details-bin")
        if packed is None:
            return []
        status = self.api.status.Status.FromString(packed)
        assert status.code == error.code().value[0]
        return [self.unpack(detail) for detail in status.details]

    def unpack(self, detail: Any) -> Any:
        """Unpack an Any whose type is one of google.rpc's error details."""
        kind = getattr(self.api.error_details, detail.TypeName().removeprefix("google.rpc."))
        message = kind()
        assert detail.Unpack(message)
        return message
