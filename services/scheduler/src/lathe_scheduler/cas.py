"""Port: what the scheduler needs of the content addressable storage and the action cache."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lathe_shared.digest import Digest
    from lathe_shared.errors import LatheError


class Cas(abc.ABC):
    """Blobs and action results, as one service holds them.

    Every method raises UnavailableError while the service is away, and other errors of ``lathe_shared.errors`` as it
    answers them.
    """

    @abc.abstractmethod
    async def find_missing(self, instance_name: str, digests: Collection[Digest]) -> set[Digest]:
        """Return those digests that are not stored.

        Args:
            instance_name: The client's instance.
            digests: Any number, all by one digest function.
        """

    @abc.abstractmethod
    async def read(self, instance_name: str, digests: Collection[Digest]) -> Mapping[Digest, bytes | LatheError]:
        """Read whole blobs, each with its bytes or its own error; those that are not stored are left out.

        Args:
            instance_name: The client's instance.
            digests: Any number, all by one digest function.
        """

    @abc.abstractmethod
    async def get_action_result(self, instance_name: str, action_digest: Digest) -> bytes | None:
        """Return a cached ActionResult as its own bytes; None if there is none that is complete."""

    @abc.abstractmethod
    async def forward(self, method: str, request: bytes) -> bytes:
        """Pass a unary call on as it is, and its answer back.

        Args:
            method: Path, such as ``/build.bazel.remote.execution.v2.ActionCache/GetActionResult``.
            request: The serialized request.

        Raises:
            LatheError: The service's own status, message and details.
        """

    @property
    @abc.abstractmethod
    def is_available(self) -> bool:
        """Whether the last call reached the service; for the status page."""
