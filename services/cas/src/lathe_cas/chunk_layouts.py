"""Which chunks make up a blob: remembered as long as the chunks are there.

A layout is kept as an action result is, under an instance name that no client can send. What an action result's
references give it is what a layout needs: it is found only while every chunk is there, finding it touches them all, and
eviction takes it before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.soon import settled
from lathe_protos import reapi
from lathe_shared.wire import message_field, varint_field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_cas.action_result_store import ActionResultStore
    from lathe_cas.fast_cdc import FastCdcParameters
    from lathe_shared.digest import Digest

_FAST_CDC = reapi.ChunkingFunctionValue.FAST_CDC_2020
_UNKNOWN = reapi.ChunkingFunctionValue.UNKNOWN


class ChunkLayouts:
    """Two layouts of each blob at most: by FastCDC with the parameters in use, and as some client cut it.

    Args:
        results: Where they are kept.
        parameters: Those of FastCDC. Layouts by others are not found.
    """

    def __init__(self, results: ActionResultStore, parameters: FastCdcParameters) -> None:
        self._results = results
        # An empty segment is in no instance name that ``instance_name.check_well_formed`` lets pass.
        self._instance_names = {
            _FAST_CDC: f"//chunks/fast_cdc_2020/{parameters.average_bytes}/{parameters.seed}",
            _UNKNOWN: "//chunks/unknown",
        }

    async def get(self, blob: Digest, *, by_fast_cdc: bool) -> bytes | None:
        """Return a blob's layout, a serialized SplitBlobResponse, if all its chunks are there, and touch them."""
        found = await settled(self._results.get(self._instance_name(by_fast_cdc), blob))
        return None if found is None else found.action_result

    async def put(self, blob: Digest, chunks: Sequence[Digest], *, by_fast_cdc: bool) -> bytes:
        """Remember a layout, durably, in place of what was there; return it as ``get`` does.

        Args:
            blob: The blob.
            chunks: What it is when they are joined; the caller has verified that.
            by_fast_cdc: Whether FastCDC makes exactly these chunks.

        Raises:
            ResourceExhaustedError: No room is left.
        """
        layout = layout_message(chunks, by_fast_cdc=by_fast_cdc)
        references = dict.fromkeys((chunk.key, chunk.size_bytes) for chunk in chunks)
        await self._results.put(self._instance_name(by_fast_cdc), blob, StoredActionResult(layout, list(references)))
        return layout

    def _instance_name(self, by_fast_cdc: bool) -> str:
        return self._instance_names[_FAST_CDC if by_fast_cdc else _UNKNOWN]


def layout_message(chunks: Sequence[Digest], *, by_fast_cdc: bool) -> bytes:
    """Write a SplitBlobResponse."""
    digests = b"".join(message_field(1, chunk.wire) for chunk in chunks)
    return digests + varint_field(2, _FAST_CDC if by_fast_cdc else _UNKNOWN)
