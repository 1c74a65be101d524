"""Responses of the batch RPCs, kept as small as what clients accept.

A batch is bounded by the bytes of its blobs. With thousands of tiny ones, what frames them and the texts of their
errors can be several times as much, and a response that is too large is lost as a whole.

Spec: REAPI, BatchReadBlobsResponse and BatchUpdateBlobsResponse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_shared.cas_wire import batch_read_response_item, batch_update_response_item, rpc_status
from lathe_shared.errors import LatheError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_shared.compressor import Compressor

MAX_RESPONSE_BYTES = 4 << 20
"""What clients accept as one message unless they were told otherwise. Spec: gRPC's default of every library."""

_LEFT_OUT = ResourceExhaustedError("the response is as large as clients accept; ask again")


def batch_read_response(
    digest_wires: Sequence[bytes],
    outcomes: Sequence[bytes | tuple[Compressor, bytes] | LatheError],
    max_bytes: int = MAX_RESPONSE_BYTES,
) -> bytes:
    """Write a BatchReadBlobsResponse; blobs that have no room are RESOURCE_EXHAUSTED, for another request.

    Args:
        digest_wires: The Digests as they came, in order.
        outcomes: To each its blob, perhaps compressed, or what is wrong.
        max_bytes: Bound on the response, as far as the digests alone leave room.
    """
    items = [_batch_read_item(wire, outcome) for wire, outcome in zip(digest_wires, outcomes, strict=True)]
    if sum(map(len, items)) <= max_bytes:
        return b"".join(items)
    forms = []
    for item, wire, outcome in zip(items, digest_wires, outcomes, strict=True):
        error = outcome if isinstance(outcome, LatheError) else _LEFT_OUT
        statuses = (_status(error), _bare_status(error))
        forms.append((item, *(batch_read_response_item(wire, b"", status) for status in statuses)))
    return _join(forms, max_bytes)


def batch_update_response(
    digest_wires: Sequence[bytes], outcomes: Sequence[LatheError | None], max_bytes: int = MAX_RESPONSE_BYTES
) -> bytes:
    """Write a BatchUpdateBlobsResponse; errors whose texts have no room keep their codes.

    Args:
        digest_wires: The Digests as they came, in order.
        outcomes: To each what is wrong, or None.
        max_bytes: Bound on the response, as far as the digests alone leave room.
    """
    items = [
        batch_update_response_item(wire, _status(outcome)) for wire, outcome in zip(digest_wires, outcomes, strict=True)
    ]
    if sum(map(len, items)) <= max_bytes:
        return b"".join(items)
    forms = [
        (item, batch_update_response_item(wire, _bare_status(outcome)))
        for item, wire, outcome in zip(items, digest_wires, outcomes, strict=True)
    ]
    return _join(forms, max_bytes)


def _batch_read_item(digest_wire: bytes, outcome: bytes | tuple[Compressor, bytes] | LatheError) -> bytes:
    if isinstance(outcome, bytes):
        return batch_read_response_item(digest_wire, outcome, b"")
    if isinstance(outcome, LatheError):
        return batch_read_response_item(digest_wire, b"", _status(outcome))
    compressor, data = outcome
    return batch_read_response_item(digest_wire, data, b"", compressor)


def _join(forms: Sequence[tuple[bytes, ...]], max_bytes: int) -> bytes:
    """Join the first form of each entry that leaves room for the last, shortest one of all that follow."""
    room_bytes = max_bytes - sum(len(entry[-1]) for entry in forms)
    chosen = []
    for entry in forms:
        shortest = len(entry[-1])
        item = next((form for form in entry if len(form) - shortest <= room_bytes), entry[-1])
        room_bytes -= len(item) - shortest
        chosen.append(item)
    return b"".join(chosen)


def _status(outcome: LatheError | None) -> bytes:
    """Write the google.rpc.Status of one blob; nothing for OK."""
    return b"" if outcome is None else rpc_status(outcome.status.value, outcome.message)


def _bare_status(outcome: LatheError | None) -> bytes:
    """Write it without its text."""
    return b"" if outcome is None else rpc_status(outcome.status.value)
