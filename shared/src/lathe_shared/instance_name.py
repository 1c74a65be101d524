"""Instance names: which namespace of action results, and which cluster, a request is for.

The name is the client's ``--remote_instance_name``. Blobs are shared by all instances, because a blob's digest says
all about it; action results are not.

Spec: REAPI, the ``instance_name`` field of each request and its rules inside resource names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_shared.errors import InvalidArgumentError, UnknownInstanceError

if TYPE_CHECKING:
    from collections.abc import Iterable

RESERVED_SEGMENTS = frozenset(
    {"blobs", "uploads", "actions", "actionResults", "operations", "capabilities", "compressed-blobs"}
)
"""Words that resource names use; a segment of an instance name must not be one of them.

Spec: REAPI, ContentAddressableStorage, "instance_name".
"""

MAX_LENGTH = 1024
"""Longest accepted name in characters: far above what anybody types, and a bound for logs and keys."""


class InstanceNames:
    """The instance names that a service answers for.

    Args:
        configured: The names; none means that any well-formed name is served.
    """

    def __init__(self, configured: Iterable[str] = ()) -> None:
        self.configured = frozenset(configured)
        for name in self.configured:
            check_well_formed(name)
        self._accepted: set[str] = set(self.configured)

    def check(self, name: str) -> str:
        """Return the name if this service answers for it.

        Raises:
            UnknownInstanceError: Names are configured, and this is not one of them.
            InvalidArgumentError: The name is malformed.
        """
        if name in self._accepted:
            return name
        if self.configured:
            raise UnknownInstanceError(name, self.configured)
        check_well_formed(name)
        # Remembers what was checked, since each request brings the name again; bounded, since clients choose it.
        if len(self._accepted) < 1024:
            self._accepted.add(name)
        return name


def check_well_formed(name: str) -> None:
    """Check a name's form alone.

    Raises:
        InvalidArgumentError: The name is too long, has an empty or a reserved segment, or a control character.
    """
    if not name:
        return
    if len(name) > MAX_LENGTH:
        raise InvalidArgumentError("instance_name", f"{len(name)} characters are more than {MAX_LENGTH}")
    if not name.isprintable():
        raise InvalidArgumentError("instance_name", f"{name[:80]!r} has an unprintable character")
    for segment in name.split("/"):
        if not segment:
            raise InvalidArgumentError("instance_name", f"{name!r} has an empty segment")
        if segment in RESERVED_SEGMENTS:
            raise InvalidArgumentError("instance_name", f"{name!r} has the segment {segment!r}, which names a resource")
