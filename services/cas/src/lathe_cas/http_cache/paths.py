"""What the path of a request names.

The forms, where brackets enclose what may be absent::

    /[instance/]cas/[function/]hash     a blob
    /[instance/]ac/[function/]hash      the ActionResult of an action
    /cache/key                          a value that no rule of REAPI holds for; the key may have slashes

The first two are what Bazel appends to the address of an HTTP cache; the third is for everybody else.

Spec: Bazel's documentation, "Remote caching", HTTP caching protocol; REAPI, Digest, for hash and function.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.instance_name import check_well_formed

if TYPE_CHECKING:
    from collections.abc import Collection

FIELD = "path"

MAX_KEY_LENGTH = 1024
"""Longest accepted key in characters: far above what any client makes up, and a bound for logs."""

_BLOB_AMONG_VALUES = re.compile(r"(?:.+/)?cas/[0-9a-f]{32,}")
_SEGMENTS = {function.segment: function for function in DigestFunction}


@dataclass(frozen=True, slots=True)
class BlobPath:
    """A blob.

    Attributes:
        instance_name: May be empty.
        digest: Its function and hash. The size is not known, and stands as 0.
    """

    instance_name: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class ActionResultPath:
    """An action's result.

    Attributes:
        instance_name: May be empty.
        action_digest: Its function and hash. The size is not known, and stands as 0.
    """

    instance_name: str
    action_digest: Digest


@dataclass(frozen=True, slots=True)
class ValuePath:
    """A value under a key of the client's choice."""

    key: str


CachePath: TypeAlias = BlobPath | ActionResultPath | ValuePath


def parse_path(path: str, offered: Collection[DigestFunction] = tuple(DigestFunction)) -> CachePath | None:
    """Take a path apart; None if it has none of the forms at all.

    Args:
        path: Decoded, with its leading slash.
        offered: The digest functions that the service offers.

    Raises:
        InvalidArgumentError: A part of it is malformed.
    """
    segments = path[1:].split("/")
    if segments[0] == "cache" and len(segments) > 1:
        return ValuePath(_key(path.removeprefix("/cache/")))
    # An instance name may have slashes, so the last of the words is the one that counts.
    for index in range(len(segments) - 2, -1, -1):
        if segments[index] in ("cas", "ac"):
            instance_name = "/".join(segments[:index])
            if index and not instance_name:
                raise InvalidArgumentError(FIELD, "begins with two slashes; an empty instance name has none of its own")
            check_well_formed(instance_name)
            digest = _digest(segments[index + 1 :], offered)
            return (BlobPath if segments[index] == "cas" else ActionResultPath)(instance_name, digest)
    return None


def _digest(segments: list[str], offered: Collection[DigestFunction]) -> Digest:
    hash_ = segments[-1]
    if len(segments) == 1:
        function = select_function(0, len(hash_), offered, FIELD)
    else:
        named = _SEGMENTS.get(segments[0]) if len(segments) == 2 else None
        if named not in offered or named is None:
            raise InvalidArgumentError(FIELD, f"{'/'.join(segments)[:140]!r} is neither HASH nor FUNCTION/HASH")
        function = named
    return Digest.parse(hash_, 0, function, FIELD)


def _key(key: str) -> str:
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidArgumentError(FIELD, f"a key of {len(key)} characters is longer than {MAX_KEY_LENGTH}")
    if not key.isprintable() or any(segment in ("", ".", "..") for segment in key.split("/")):
        raise InvalidArgumentError(
            FIELD, f"{key[:140]!r} is no key: it is empty, or has an unprintable character or an empty segment"
        )
    if _BLOB_AMONG_VALUES.fullmatch(key):
        # Bazel, told the wrong address. It would work, and nothing would be verified.
        raise InvalidArgumentError(
            FIELD, f"{key[:140]!r} looks like a blob, and below /cache nothing is verified; use the address without it"
        )
    return key
