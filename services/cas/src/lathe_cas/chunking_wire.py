"""SpliceBlobRequest, read as bytes: a large blob has thousands of chunks, which as message objects take seconds.

Spec: REAPI, message SpliceBlobRequest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lathe_shared.cas_wire import read_digest
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.wire import scan, signed_32, text

if TYPE_CHECKING:
    from collections.abc import Collection


class SpliceRequest(NamedTuple):
    """SpliceBlobRequest, checked."""

    instance_name: str
    blob: Digest
    chunks: list[Digest]
    chunking_function: int


def read_splice(data: bytes, offered: Collection[DigestFunction]) -> SpliceRequest:
    """Read a SpliceBlobRequest; in any thread.

    Args:
        data: The serialized request.
        offered: The digest functions that the service offers.

    Raises:
        MalformedMessageError: The bytes are no such message.
        InvalidArgumentError: A digest is malformed, or its function is not offered.
    """
    instance_name = ""
    blob = b""
    chunks: list[tuple[str, int]] = []
    function_value = chunking_function = 0
    for tag, a, b in scan(data):
        if tag == 0x0A:
            instance_name = text(data, a, b)
        elif tag == 0x12:
            # One that comes twice is merged.
            blob += data[a:b]
        elif tag == 0x1A:
            chunks.append(read_digest(data, a, b))
        elif tag == 0x20:
            function_value = signed_32(a)
        elif tag == 0x28:
            chunking_function = signed_32(a)
    hash_, size_bytes = read_digest(blob)
    function = select_function(function_value, len(hash_), offered, "blob_digest")
    return SpliceRequest(
        instance_name,
        Digest.parse(hash_, size_bytes, function, "blob_digest"),
        [Digest.parse(*chunk, function, f"chunk_digests[{place}]") for place, chunk in enumerate(chunks)],
        chunking_function,
    )
