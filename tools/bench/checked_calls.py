"""Calls whose answers are looked at: by grpcio, which knows nothing of our code, and with bytes as messages.

They put what the measured calls ask for in its place, and make sure before each row that the server's answer to its
request is right: a fast wrong answer is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import grpc
from tools.bench.blobs import (
    Blob,
    batch_update_request,
    update_action_result_request,
    write_messages,
)
from tools.bench.errors import BenchError
from tools.bench.lean_client import BATCH_UPDATE, WRITE

from lathe_shared.cas_wire import (
    committed_size,
    find_missing_request,
    find_missing_response_digests,
    read_request,
    read_response_data,
)
from lathe_shared.digest import Digest
from lathe_shared.resource_name import format_read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

T = TypeVar("T")

CAS = "/build.bazel.remote.execution.v2.ContentAddressableStorage/"
FIND_MISSING = CAS + "FindMissingBlobs"
BATCH_READ = CAS + "BatchReadBlobs"
GET_ACTION_RESULT = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult"
UPDATE_ACTION_RESULT = "/build.bazel.remote.execution.v2.ActionCache/UpdateActionResult"
READ = "/google.bytestream.ByteStream/Read"

CALL_SECONDS = 120.0
_BATCH_BYTES = 1 << 20
"""Bytes of blobs uploaded in one batch: below what any server accepts."""


class CheckedCalls:
    """A connection to a server, for calls that must be answered right.

    Args:
        address: ``host:port`` of the server.
        instance_name: What its requests name.
    """

    def __init__(self, address: str, instance_name: str) -> None:
        self.instance_name = instance_name
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def unary(self, path: str, request: bytes) -> bytes:
        """Make a unary call and return its answer.

        Raises:
            BenchError: It failed.
        """
        call: Callable[..., bytes] = self._channel.unary_unary(path, None, None)
        return _answer(path, lambda: call(request, timeout=CALL_SECONDS, wait_for_ready=True))

    def expect(self, path: str, request: bytes, is_right: Callable[[bytes], bool]) -> bytes:
        """Make a unary call, look at its answer and return it.

        Raises:
            BenchError: It failed, or the answer is wrong.
        """
        answer = self.unary(path, request)
        if not is_right(answer):
            raise BenchError(f"{path} gave a wrong answer: {answer[:200]!r}")
        return answer

    def store(self, blobs: Sequence[Blob]) -> None:
        """Upload blobs of one size: small ones in batches, large ones as streams."""
        size_bytes = len(blobs[0].data)
        if size_bytes > _BATCH_BYTES:
            for blob in blobs:
                self.write(blob, f"bench-{blob.digest.hash[:8]}", _BATCH_BYTES)
            return
        together = max(_BATCH_BYTES // (size_bytes + 200), 1)
        for start in range(0, len(blobs), together):
            batch = blobs[start : start + together]
            self.batch_update(batch)

    def batch_update(self, batch: Sequence[Blob]) -> None:
        """Upload blobs in one batch, and make sure that they are there afterwards."""
        self.unary(BATCH_UPDATE, batch_update_request(self.instance_name, batch))
        self.expect_missing([blob.digest for blob in batch], [])

    def write(self, blob: Blob, upload_id: str, message_bytes: int) -> None:
        """Upload a blob, and make sure that it is there afterwards."""
        call = self._channel.stream_unary(WRITE, None, None)
        messages = write_messages(self.instance_name, upload_id, blob, message_bytes)
        response = _answer(WRITE, lambda: call(messages, timeout=CALL_SECONDS, wait_for_ready=True))
        if committed_size(response) != len(blob.data):
            raise BenchError(f"{committed_size(response)} bytes were committed of {len(blob.data)}")
        self.expect_missing([blob.digest], [])

    def expect_missing(self, digests: Sequence[Digest], missing: Sequence[Digest]) -> None:
        """Make sure that FindMissingBlobs finds what is missing, and nothing else."""
        answer = self.unary(FIND_MISSING, find_missing_request(self.instance_name, digests))
        if sorted(find_missing_response_digests(answer)) != sorted((d.hash, d.size_bytes) for d in missing):
            raise BenchError(f"FindMissingBlobs answered {answer[:200]!r}")

    def expect_read(self, blob: Blob) -> None:
        """Read a blob and compare its bytes."""
        call = self._channel.unary_stream(READ, None, None)
        request = read_request(format_read(blob.digest, self.instance_name))
        pieces = _answer(READ, lambda: list(call(request, timeout=CALL_SECONDS)))
        if b"".join(map(read_response_data, pieces)) != blob.data:
            raise BenchError(f"{READ} gave other bytes than those of {blob.digest}")

    def store_action_result(self, action: Digest, result: bytes) -> None:
        """Put an action result."""
        self.unary(UPDATE_ACTION_RESULT, update_action_result_request(self.instance_name, action, result))


def _answer(path: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except grpc.RpcError as error:
        raise BenchError(f"{path} failed: {error}") from None
