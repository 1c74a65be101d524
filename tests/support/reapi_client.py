"""A small REAPI client on grpcio and google-protobuf: what the tests say to Lathe beside what Bazel says.

Messages are classes made at run time, which no type checker knows; hence `Any` for them throughout.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc
from tests.support.google_messages import message_class, reapi_class

_REAPI = "/build.bazel.remote.execution.v2"
WRITE_MESSAGE_BYTES = 1 << 16
# gRPC's own bound on one call; a healthy cluster needs a fraction of it.
DEADLINE_SECONDS = 60.0


def reapi_message(name: str, **fields: Any) -> Any:
    """Make one of REAPI's messages by its name."""
    return reapi_class(name)(**fields)


def digest_of(data: bytes) -> Any:
    """Make the Digest message of these bytes (SHA-256)."""
    return reapi_message("Digest", hash=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


class ReapiClient:
    """One client of a cluster; close it, or use it in a ``with``.

    Args:
        cas_port: On loopback.
        scheduler_port: On loopback.
        instance_name: Of every call.
        own_connection: Whether it has a connection to the CAS of its own; all clients of this process share one if not.
    """

    def __init__(
        self, cas_port: int, scheduler_port: int, instance_name: str = "main", *, own_connection: bool = False
    ) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)] if own_connection else []
        self._cas = grpc.insecure_channel(f"127.0.0.1:{cas_port}", options)
        self._scheduler = grpc.insecure_channel(f"127.0.0.1:{scheduler_port}")
        self._instance_name = instance_name
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close both connections, and let half a write end."""
        self._closing.set()
        self._cas.close()
        self._scheduler.close()

    def upload(self, *blobs: bytes) -> list[Any]:
        """Write small blobs in one batch and return their Digests."""
        statuses = self.try_to_upload(*blobs)
        assert [status.code for status in statuses] == [0] * len(blobs), statuses
        return [digest_of(blob) for blob in blobs]

    def try_to_upload(self, *blobs: bytes) -> list[Any]:
        """Write small blobs in one batch and return the status of each."""
        request = self._request("BatchUpdateBlobsRequest")
        for blob in blobs:
            request.requests.add(digest=digest_of(blob), data=blob)
        answer = self._unary(self._cas, f"{_REAPI}.ContentAddressableStorage/BatchUpdateBlobs", "BatchUpdateBlobs")(
            request
        )
        assert [response.digest for response in answer.responses] == [digest_of(blob) for blob in blobs]
        return [response.status for response in answer.responses]

    def missing(self, *digests: Any) -> list[Any]:
        """Ask which of these are not there."""
        request = self._request("FindMissingBlobsRequest", blob_digests=digests)
        answer = self._unary(self._cas, f"{_REAPI}.ContentAddressableStorage/FindMissingBlobs", "FindMissingBlobs")(
            request
        )
        return list(answer.missing_blob_digests)

    def read(self, digest: Any) -> bytes:
        """Read a small blob."""
        request = self._request("BatchReadBlobsRequest", digests=[digest])
        answer = self._unary(self._cas, f"{_REAPI}.ContentAddressableStorage/BatchReadBlobs", "BatchReadBlobs")(request)
        assert answer.responses[0].status.code == 0, answer
        return bytes(answer.responses[0].data)

    def read_stream(self, digest: Any) -> bytes:
        """Read a blob of any size by ByteStream."""
        call = self._cas.unary_stream(
            "/google.bytestream.ByteStream/Read",
            request_serializer=message_class("google.bytestream.ReadRequest").SerializeToString,
            response_deserializer=message_class("google.bytestream.ReadResponse").FromString,
        )
        name = f"{self._instance_name}/blobs/{digest.hash}/{digest.size_bytes}"
        request = message_class("google.bytestream.ReadRequest")(resource_name=name)
        return b"".join(answer.data for answer in call(request, timeout=DEADLINE_SECONDS, wait_for_ready=True))

    def write_status(self, data: bytes, upload_id: str) -> tuple[int, bool]:
        """Ask how far an upload is: bytes committed, and whether it is complete."""
        call = self._cas.unary_unary(
            "/google.bytestream.ByteStream/QueryWriteStatus",
            request_serializer=message_class("google.bytestream.QueryWriteStatusRequest").SerializeToString,
            response_deserializer=message_class("google.bytestream.QueryWriteStatusResponse").FromString,
        )
        request = message_class("google.bytestream.QueryWriteStatusRequest")
        answer = call(request(resource_name=self._upload_name(data, upload_id)), timeout=DEADLINE_SECONDS)
        return answer.committed_size, answer.complete

    def write_part(self, data: bytes, upload_id: str, start: int, stop: int) -> int:
        """Write a part of a blob by ByteStream, from ``start`` on; return the committed size that is answered."""
        parts = [
            message_class("google.bytestream.WriteRequest")(
                resource_name=self._upload_name(data, upload_id),
                write_offset=offset,
                data=data[offset : min(stop, offset + WRITE_MESSAGE_BYTES)],
                finish_write=offset + WRITE_MESSAGE_BYTES >= len(data) == stop,
            )
            for offset in range(start, stop, WRITE_MESSAGE_BYTES)
        ]
        committed: int = self._start_write(iter(parts)).result().committed_size
        return committed

    def write(self, data: bytes) -> Any:
        """Write a blob of any size by ByteStream and return its Digest, once the CAS has acknowledged it."""
        answer = self._start_write(self._parts(data))
        assert answer.result().committed_size == len(data)
        return digest_of(data)

    def start_half_a_write(self, data: bytes) -> Any:
        """Send half of a blob by ByteStream, come back when that is out, and leave the stream open."""
        sent = threading.Event()

        def first_half() -> Iterator[Any]:
            parts = list(self._parts(data))
            yield from parts[: len(parts) // 2]
            sent.set()
            self._closing.wait(DEADLINE_SECONDS)

        call = self._start_write(first_half())
        assert sent.wait(DEADLINE_SECONDS)
        return call

    def _parts(self, data: bytes) -> Iterator[Any]:
        name = self._upload_name(data, str(uuid.uuid4()))
        request = message_class("google.bytestream.WriteRequest")
        for offset in range(0, max(len(data), 1), WRITE_MESSAGE_BYTES):
            part = data[offset : offset + WRITE_MESSAGE_BYTES]
            last = offset + len(part) == len(data)
            yield request(resource_name=name, write_offset=offset, data=part, finish_write=last)

    def _upload_name(self, data: bytes, upload_id: str) -> str:
        digest = digest_of(data)
        return f"{self._instance_name}/uploads/{upload_id}/blobs/{digest.hash}/{digest.size_bytes}"

    def _start_write(self, requests: Iterator[Any]) -> Any:
        call = self._cas.stream_unary(
            "/google.bytestream.ByteStream/Write",
            request_serializer=message_class("google.bytestream.WriteRequest").SerializeToString,
            response_deserializer=message_class("google.bytestream.WriteResponse").FromString,
        )
        return call.future(requests, timeout=DEADLINE_SECONDS, wait_for_ready=True)

    def action_result(self, action_digest: Any) -> Any | None:
        """Look an action up in the action cache; None when it is not there."""
        request = self._request("GetActionResultRequest", action_digest=action_digest)
        call = self._unary(self._cas, f"{_REAPI}.ActionCache/GetActionResult", "GetActionResult", answer="ActionResult")
        try:
            return call(request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            return None

    def put_action_result(self, action_digest: Any, result: Any) -> None:
        """Store an ActionResult in the action cache."""
        request = self._request("UpdateActionResultRequest", action_digest=action_digest, action_result=result)
        self._unary(self._cas, f"{_REAPI}.ActionCache/UpdateActionResult", "UpdateActionResult", answer="ActionResult")(
            request
        )

    def execute(self, action_digest: Any, *, skip_cache_lookup: bool = False) -> Any:
        """Execute an action and return its ExecuteResponse, whatever its status."""
        request = self._request("ExecuteRequest", action_digest=action_digest, skip_cache_lookup=skip_cache_lookup)
        call = self._scheduler.unary_stream(
            f"{_REAPI}.Execution/Execute",
            request_serializer=reapi_class("ExecuteRequest").SerializeToString,
            response_deserializer=message_class("google.longrunning.Operation").FromString,
        )
        operations: list[Any] = list(call(request, timeout=DEADLINE_SECONDS))
        assert operations[-1].done, operations
        response: Any = reapi_class("ExecuteResponse")()
        assert operations[-1].response.Unpack(response), operations[-1]
        return response

    def _request(self, name: str, **fields: Any) -> Any:
        return reapi_class(name)(instance_name=self._instance_name, **fields)

    def _unary(
        self, channel: grpc.Channel, method: str, name: str, *, answer: str | None = None
    ) -> Callable[[Any], Any]:
        call = channel.unary_unary(
            method,
            request_serializer=reapi_class(f"{name}Request").SerializeToString,
            response_deserializer=reapi_class(answer or f"{name}Response").FromString,
        )
        return lambda request: call(request, timeout=DEADLINE_SECONDS)


def missing_subjects(status: Any) -> list[str]:
    """List the subjects of the MISSING violations in a google.rpc.Status's details."""
    subjects = []
    for detail in status.details:
        failure: Any = message_class("google.rpc.PreconditionFailure")()
        if detail.Unpack(failure):
            subjects += [violation.subject for violation in failure.violations if violation.type == "MISSING"]
    return subjects
