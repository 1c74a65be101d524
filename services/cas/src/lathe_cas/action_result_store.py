"""The port to action result storage.

An action result is kept as the bytes that arrived, with the list of blobs that it refers to, so that a look-up can
tell in one step whether it is still complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_cas.soon import Soon
    from lathe_shared.digest import Digest


@dataclass(frozen=True, slots=True)
class StoredActionResult:
    """An action result and what it refers to.

    Attributes:
        action_result: The serialized ActionResult, as it arrived.
        references: Key and size of every blob it refers to, with those that its Trees name.
        expanded: Whether ``references`` is complete. It is not if a Tree or Directory that the result names was
            missing when the result was stored.
    """

    action_result: bytes
    references: Sequence[tuple[bytes, int]]
    expanded: bool = True


class FoundActionResult(NamedTuple):
    """An action result whose known references are all there.

    Attributes:
        action_result: The serialized ActionResult, as it arrived.
        expanded: Whether its references were known completely; if not, they must be looked up before it is used.
    """

    action_result: bytes
    expanded: bool


class ActionResultStore(ABC):
    """Holds action results under instance name and action digest."""

    @abstractmethod
    def get(self, instance_name: str, action_digest: Digest) -> Soon[FoundActionResult | None]:
        """Return an action result if every blob in its references is there, and touch it and them all.

        Called inline on the event loop, so it must not block. An answer at once is the rule; if a lease is over, or
        about to end, it has to be awaited until that is renewed, and if the result names many blobs, until they are
        looked for in a thread. The check and the look-up see one state of the store.
        """

    @abstractmethod
    async def put(self, instance_name: str, action_digest: Digest, stored: StoredActionResult) -> None:
        """Store an action result durably, in place of what was there.

        Raises:
            ResourceExhaustedError: No room is left.
        """
