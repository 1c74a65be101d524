"""Values under keys of the client's choice: what ccache, sccache, Gradle and others keep in an HTTP cache.

A value is a blob, and its key is an action digest of an instance that no client can name. The result of that "action"
is an ActionResult whose stdout is the blob. So values are held, counted, touched and evicted as everything else is,
and none of them can be taken for the result of an action.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.soon import settled
from lathe_shared.action_result_wire import read_references
from lathe_shared.digest import Digest
from lathe_shared.wire import message_field

if TYPE_CHECKING:
    from lathe_cas.action_result_store import ActionResultStore

INSTANCE_NAME = "/cache"
"""Begins with an empty segment, so it is malformed in any request; ``instance_name.check_well_formed`` sees to that."""

_STDOUT_DIGEST = 6
"""Field number of ActionResult.stdout_digest."""


class OpaqueValues:
    """Tells which blob is the value of a key.

    Args:
        results: Where the keys are kept. The blobs are to be in the store that goes with it.
    """

    def __init__(self, results: ActionResultStore) -> None:
        self._results = results

    async def find(self, key: str) -> Digest | None:
        """Return the digest of a key's value if it is there, and touch both; None if not."""
        found = await settled(self._results.get(INSTANCE_NAME, _action_digest(key)))
        if found is None:
            return None
        ((hash_, size_bytes),) = read_references(found.action_result).blobs
        return Digest(hash_, size_bytes)

    async def put(self, key: str, value: Digest) -> None:
        """Make a blob that is there the value of a key, durably, in place of what was its value.

        Raises:
            ResourceExhaustedError: No room is left.
        """
        action_result = message_field(_STDOUT_DIGEST, value.wire)
        stored = StoredActionResult(action_result, [(value.key, value.size_bytes)])
        await self._results.put(INSTANCE_NAME, _action_digest(key), stored)


def _action_digest(key: str) -> Digest:
    return Digest.of(key.encode())
