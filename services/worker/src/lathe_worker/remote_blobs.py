"""RemoteBlobs: the port to the content addressable storage, as far as a worker needs it."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lathe_shared.digest import Digest


class RemoteBlobs(abc.ABC):
    """Reads and writes blobs of the cluster.

    All methods raise ``LatheError`` if the storage cannot be reached or refuses.
    """

    @abc.abstractmethod
    async def read_many(self, instance_name: str, digests: Sequence[Digest]) -> Mapping[Digest, bytes]:
        """Read blobs that fit into memory together, verified; absent ones are absent from the answer."""

    @abc.abstractmethod
    async def read_tree(self, instance_name: str, root: Digest) -> Sequence[bytes]:
        """Return the Directory messages under a root, itself included, as far as they are there; in no certain order.

        They are not verified; nothing at all is returned if the root is absent.
        """

    @abc.abstractmethod
    async def read_to_file(self, instance_name: str, digest: Digest, path: Path) -> None:
        """Stream a blob into a new file, verified.

        Raises:
            BlobNotFoundError: It is absent.
            OSError: The file cannot be written.
        """

    @abc.abstractmethod
    async def upload(self, instance_name: str, blobs: Mapping[Digest, bytes | Path]) -> None:
        """Write those blobs that the storage does not have yet; files are streamed.

        Raises:
            OSError: A file cannot be read.
        """

    @abc.abstractmethod
    async def update_action_result(self, instance_name: str, digest: Digest, action_result: bytes) -> None:
        """Put a result into the action cache."""
