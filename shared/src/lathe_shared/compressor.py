"""The compressors that Lathe offers for blobs on their way, under REAPI's numbers.

Spec: REAPI, message Compressor.
"""

from __future__ import annotations

import enum


class Compressor(enum.IntEnum):
    """How the bytes of a blob travel."""

    IDENTITY = 0
    ZSTD = 1

    @property
    def segment(self) -> str:
        """Name of the compressor inside a resource name; ``identity`` never stands in one."""
        return self.name.lower()


def offered_text() -> str:
    """Name what is offered, for the error that a client gets who asks for something else."""
    return ", ".join(f"{compressor.name} ({compressor.value})" for compressor in Compressor)
