"""The bytes of a benchmark: blobs that nobody has yet, and the messages about them.

All of it follows from a salt, so that a client in another process makes the same blobs or quite different ones, and a
server that was measured before has none of them.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, NamedTuple

from lathe_shared.cas_wire import write_request
from lathe_shared.digest import Digest
from lathe_shared.resource_name import format_write
from lathe_shared.wire import bytes_field, message_field, string_field, varint_field

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME_BYTES = 16
"""How much of a blob's beginning makes it different from all others."""


class Blob(NamedTuple):
    """A blob and its digest."""

    data: bytes
    digest: Digest


def make_blobs(salt: str, size_bytes: int, count: int) -> Iterator[Blob]:
    """Make blobs that share all but their first bytes, so that many large ones are soon made.

    Args:
        salt: Other salts give other blobs.
        size_bytes: Of each; at least NAME_BYTES.
        count: How many.
    """
    common = random.Random(salt).randbytes(size_bytes - NAME_BYTES)
    for number in range(count):
        name = hashlib.blake2b(f"{salt}/{number}".encode(), digest_size=NAME_BYTES).digest()
        data = name + common
        yield Blob(data, Digest.of(data))


def batch_update_request(instance_name: str, blobs: Sequence[Blob]) -> bytes:
    """Write a BatchUpdateBlobsRequest."""
    items = [message_field(2, message_field(1, blob.digest.wire) + bytes_field(2, blob.data)) for blob in blobs]
    return string_field(1, instance_name) + b"".join(items)


def batch_read_request(instance_name: str, blobs: Sequence[Blob]) -> bytes:
    """Write a BatchReadBlobsRequest."""
    return string_field(1, instance_name) + b"".join([message_field(2, blob.digest.wire) for blob in blobs])


def update_action_result_request(instance_name: str, action: Digest, result: bytes) -> bytes:
    """Write an UpdateActionResultRequest."""
    return string_field(1, instance_name) + message_field(2, action.wire) + message_field(3, result)


def get_action_result_request(instance_name: str, action: Digest) -> bytes:
    """Write a GetActionResultRequest."""
    return string_field(1, instance_name) + message_field(2, action.wire)


def action_result(outputs: Sequence[Blob]) -> bytes:
    """Write the ActionResult of an action that made some files."""
    files = [
        message_field(2, string_field(1, f"bazel-out/k8-fastbuild/bin/library/part_{number}.o") + digest_field)
        for number, digest_field in enumerate(message_field(2, output.digest.wire) for output in outputs)
    ]
    return b"".join(files) + varint_field(4, 0)


def write_messages(instance_name: str, upload_id: str, blob: Blob, message_bytes: int) -> Iterator[bytes]:
    """Cut a blob into WriteRequests as clients do: the name only in the first one.

    Args:
        instance_name: Where to.
        upload_id: Unique for this upload.
        blob: What to upload.
        message_bytes: Bytes of the blob in one request.
    """
    name = format_write(blob.digest, upload_id, instance_name)
    size_bytes = len(blob.data)
    view = memoryview(blob.data)
    for start in range(0, size_bytes, message_bytes):
        end = min(start + message_bytes, size_bytes)
        yield write_request("" if start else name, start, end == size_bytes, bytes(view[start:end]))
