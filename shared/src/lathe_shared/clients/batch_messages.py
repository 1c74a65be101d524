"""The batch RPCs' messages from the client's side, as bytes.

Spec: REAPI, BatchUpdateBlobs and BatchReadBlobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lathe_shared.cas_wire import read_digest
from lathe_shared.wire import bytes_field, message_field, scan, signed_32, string_field, text, varint_field

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lathe_shared.digest import Digest, DigestFunction

ITEM_OVERHEAD_BYTES = 160
"""What one blob costs in a batch beside its bytes: the longest hash, sizes and tags."""


class BatchItem(NamedTuple):
    """One blob of a batch response.

    Attributes:
        hash: Its hash, as the peer wrote it.
        size_bytes: Its size, likewise: a request may ask for one hash with two sizes, of which one is wrong.
        data: Its bytes; empty in an answer to an update.
        code: gRPC status code; 0 for OK.
        message: What went wrong.
    """

    hash: str
    size_bytes: int
    data: bytes
    code: int
    message: str


def batch_update_request(instance_name: str, function: DigestFunction, blobs: Iterable[tuple[Digest, bytes]]) -> bytes:
    """Write a BatchUpdateBlobsRequest for blobs whose digests share one function."""
    parts = [string_field(1, instance_name)]
    for digest, data in blobs:
        parts.append(message_field(2, message_field(1, digest.wire) + bytes_field(2, data)))
    parts.append(varint_field(5, function))
    return b"".join(parts)


def batch_read_request(instance_name: str, function: DigestFunction, digests: Iterable[Digest]) -> bytes:
    """Write a BatchReadBlobsRequest for digests that share one function."""
    parts = [string_field(1, instance_name)]
    parts.extend(message_field(2, digest.wire) for digest in digests)
    parts.append(varint_field(4, function))
    return b"".join(parts)


def read_batch_update_response(response: bytes) -> list[BatchItem]:
    """Read a BatchUpdateBlobsResponse.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    return [_item(response, a, b, status_tag=0x12) for tag, a, b in scan(response) if tag == 0x0A]


def read_batch_read_response(response: bytes) -> list[BatchItem]:
    """Read a BatchReadBlobsResponse.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    return [_item(response, a, b, status_tag=0x1A, data_tag=0x12) for tag, a, b in scan(response) if tag == 0x0A]


def _item(response: bytes, start: int, end: int, *, status_tag: int, data_tag: int = 0) -> BatchItem:
    hash_, size_bytes, data, code, message = "", 0, b"", 0, ""
    for tag, a, b in scan(response, start, end):
        if tag == 0x0A:
            hash_, size_bytes = read_digest(response, a, b)
        elif tag == status_tag:
            for inner, c, d in scan(response, a, b):
                if inner == 0x08:
                    code = signed_32(c)
                elif inner == 0x12:
                    message = text(response, c, d)
        elif tag == data_tag:
            data = response[a:b]
    return BatchItem(hash_, size_bytes, data, code, message)
