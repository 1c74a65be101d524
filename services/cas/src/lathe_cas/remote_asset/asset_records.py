"""Which content stands for an address: remembered as long as the content is there.

A record is an action result under an instance name that no client can send: the content and what it refers to are its
outputs. So a record is found only while all of that is there, finding it touches it, and eviction takes it first.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_cas.soon import settled
from lathe_protos import reapi
from lathe_shared.digest import Digest
from lathe_shared.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_cas.action_cache import ActionCache
    from lathe_shared.digest import DigestFunction

_INSTANCE = "//assets"

_TIMES = struct.Struct(">QQ")
"""Microseconds since 1970: of the retrieval, and of the expiry or zero. Kept in ``stdout_raw``."""


@dataclass(frozen=True, slots=True)
class AssetName:
    """What a record is found by.

    Attributes:
        is_directory: Whether content is a directory.
        instance_name: The client's.
        uri: The address.
        qualifiers: As ``qualifiers.identity`` gives them. Those with passwords count, too: who has others, or none, is
            to ask the origin.
        function: The digest function.
    """

    is_directory: bool
    instance_name: str
    uri: str
    qualifiers: tuple[tuple[str, str], ...]
    function: DigestFunction

    @property
    def key(self) -> Digest:
        """The digest under which the record is kept: one by the function of what it refers to."""
        text = json.dumps([self.is_directory, self.instance_name, self.uri, self.qualifiers])
        return Digest.of(text.encode(), self.function)


@dataclass(frozen=True, slots=True)
class Asset:
    """Content that stands for an address.

    Attributes:
        digest: Of the blob, or of the root Directory.
        retrieved_at: When its retrieval began, or it was pushed; seconds since 1970.
        expires_at: Until when it is to be returned; None without a bound.
    """

    digest: Digest
    retrieved_at: float
    expires_at: float | None = None


class AssetRecords:
    """Records in an action cache.

    Args:
        cache: The action cache.
    """

    def __init__(self, cache: ActionCache) -> None:
        self._cache = cache

    async def get(self, name: AssetName) -> Asset | None:
        """Return what stands for an address, if all of it is there, and touch that."""
        found = await settled(self._cache.get(_INSTANCE, name.key))
        if found is None:
            return None
        result = reapi.ActionResult().parse(found)
        if name.is_directory:
            message = result.output_directories[0].root_directory_digest
        else:
            message = result.output_files[0].digest
        retrieved_at, expires_at = _TIMES.unpack(result.stdout_raw)
        return Asset(Digest.from_message(message, name.function), retrieved_at / 1e6, expires_at / 1e6 or None)

    async def put(
        self, name: AssetName, asset: Asset, blobs: Sequence[Digest] = (), directories: Sequence[Digest] = ()
    ) -> None:
        """Remember what stands for an address, durably, in place of what was there.

        Args:
            name: The address.
            asset: The content.
            blobs: What it refers to besides.
            directories: The same.

        Raises:
            InvalidArgumentError: What should be a directory is none.
            ResourceExhaustedError: No room is left.
        """
        files = [*blobs] if name.is_directory else [asset.digest, *blobs]
        roots = [asset.digest, *directories] if name.is_directory else [*directories]
        result = reapi.ActionResult(
            output_files=[reapi.OutputFile(digest=digest.to_message()) for digest in files],
            output_directories=[reapi.OutputDirectory(root_directory_digest=digest.to_message()) for digest in roots],
            stdout_raw=_TIMES.pack(round(asset.retrieved_at * 1e6), round((asset.expires_at or 0) * 1e6)),
        )
        try:
            await self._cache.update(_INSTANCE, name.key, bytes(result))
        except InvalidArgumentError as error:
            raise InvalidArgumentError("directory", f"does not hold Directories: {error.message}") from None
