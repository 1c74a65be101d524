"""FastCDC: cuts bytes where their content says so, so that what two blobs share becomes the same chunks.

The cut points are pyfastcdc's; which parameters they are made with, and how bytes that arrive in pieces are cut in
bounded memory, is this module's.

Spec: REAPI, message FastCdc2020Params; Wen Xia et al., "The Design of Fast Content-Defined Chunking for Data
Deduplication Based Storage Systems" (2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyfastcdc import FastCDC

if TYPE_CHECKING:
    from collections.abc import Iterator

LEAST_AVERAGE_BYTES = 1 << 10
"""Spec: FastCdc2020Params.avg_chunk_size_bytes; clients ignore FastCDC where it is out of bounds."""

LARGEST_AVERAGE_BYTES = 1 << 20
"""Spec: the same."""

RECOMMENDED_AVERAGE_BYTES = 512 << 10
"""Spec: the same."""

_NORMALIZATION_LEVEL: Final = 2
"""Spec: FastCdc2020Params asks for this one. Chunks are then closer to the average than by the paper's default."""


@dataclass(frozen=True, slots=True)
class FastCdcParameters:
    """What clients need to know to cut as this service does.

    Attributes:
        average_bytes: Size that chunks have about. A power of two, so that everybody chooses the same masks for it.
        seed: Changes the table of the rolling hash.
    """

    average_bytes: int = RECOMMENDED_AVERAGE_BYTES
    seed: int = 0

    @property
    def min_bytes(self) -> int:
        """Size that only the last chunk falls below."""
        return self.average_bytes // 4

    @property
    def max_bytes(self) -> int:
        """Size that no chunk exceeds."""
        return self.average_bytes * 4


class FastCdcCutter:
    """Cuts one blob, whose bytes arrive in pieces of any size. Holds ``max_bytes`` and one piece at most.

    Its methods may run in a thread, one at a time; the search for cut points lets go of the GIL.

    Args:
        parameters: How to cut.
    """

    def __init__(self, parameters: FastCdcParameters) -> None:
        self._max_bytes = parameters.max_bytes
        self._algorithm = FastCDC(
            parameters.average_bytes,
            min_size=parameters.min_bytes,
            max_size=parameters.max_bytes,
            normalized_chunking=_NORMALIZATION_LEVEL,
            seed=parameters.seed,
        )
        self._pieces: list[bytes | memoryview] = []
        self._held_bytes = 0

    def feed(self, piece: bytes) -> list[memoryview]:
        """Take in the next bytes; return the chunks that are certain now."""
        self._pieces.append(piece)
        self._held_bytes += len(piece)
        # No cut looks further ahead than the largest chunk reaches: with that many bytes at hand it is final.
        return list(self._cut(self._max_bytes)) if self._held_bytes >= self._max_bytes else []

    def finish(self) -> list[memoryview]:
        """Return the last chunks."""
        return list(self._cut(1)) if self._held_bytes else []

    def _cut(self, least_bytes: int) -> Iterator[memoryview]:
        """Cut as long as there are so many bytes; keep the rest."""
        data = memoryview(b"".join(self._pieces))
        found = self._algorithm.cut_buf(data)
        position = 0
        while len(data) - position >= least_bytes:
            end = position + next(found).length
            yield data[position:end]
            position = end
        self._pieces = [data[position:]]
        self._held_bytes = len(data) - position
