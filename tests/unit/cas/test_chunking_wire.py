"""SpliceBlobRequest as bytes: the same as betterproto reads, for any message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe_cas.chunking_wire import read_splice
from lathe_protos import reapi
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.wire import message_field

FUNCTIONS = tuple(DigestFunction)
DIGESTS = st.builds(
    lambda data, size: Digest(Digest.of(data).hash, size), st.binary(max_size=3), st.integers(0, 2**63 - 1)
)


@given(
    instance_name=st.text(max_size=5),
    blob=DIGESTS,
    chunks=st.lists(DIGESTS, max_size=5),
    function=st.sampled_from([0, 1]),
    chunking_function=st.integers(0, 3),
    unknown=st.binary(max_size=5),
)
def test_any_request_is_read(
    instance_name: str, blob: Digest, chunks: Sequence[Digest], function: int, chunking_function: int, unknown: bytes
) -> None:
    message = reapi.SpliceBlobRequest(
        instance_name=instance_name,
        blob_digest=blob.to_message(),
        chunk_digests=[chunk.to_message() for chunk in chunks],
        digest_function=reapi.DigestFunctionValue(function),
        # Also ones that there are not yet.
        chunking_function=cast("reapi.ChunkingFunctionValue", chunking_function),
    )

    request = read_splice(bytes(message) + message_field(99, unknown), FUNCTIONS)

    assert request == (instance_name, blob, list(chunks), chunking_function)


def test_chunks_are_by_the_function_of_the_blob() -> None:
    blob, chunk = Digest.of(b"blob", DigestFunction.SHA1), Digest.of(b"chunk")
    message = reapi.SpliceBlobRequest(blob_digest=blob.to_message(), chunk_digests=[chunk.to_message()])

    with pytest.raises(InvalidArgumentError, match=r"chunk_digests\[0\].*SHA1"):
        read_splice(bytes(message), FUNCTIONS)


@given(data=st.binary(max_size=60))
def test_other_bytes_are_refused_in_the_terms_of_the_client(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        # Whatever these may mean, there is no blob digest that fits.
        read_splice(data + message_field(2, b"\x0a\x01x"), FUNCTIONS)
