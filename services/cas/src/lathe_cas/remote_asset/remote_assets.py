"""Fetch and Push: finds what is remembered, downloads what is not.

Spec: Remote Asset API, services Fetch and Push.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_cas.remote_asset.asset_records import Asset, AssetName, AssetRecords
from lathe_cas.remote_asset.qualifiers import CHECKSUM, FetchTerms, fetch_terms, parse_integrity
from lathe_cas.remote_asset.spool import Spool
from lathe_cas.remote_asset.unpacking import unpack
from lathe_cas.shared_work import SharedWork
from lathe_cas.soon import settled
from lathe_shared.errors import (
    AbortedError,
    DeadlineExceededError,
    InvalidArgumentError,
    LatheError,
    NotFoundError,
    PermissionDeniedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lathe_cas.action_cache import ActionCache
    from lathe_cas.blob_store import BlobStore
    from lathe_cas.cas_metrics import CasCounters
    from lathe_cas.remote_asset.archive import ArchiveLimits
    from lathe_cas.remote_asset.origin import Origin
    from lathe_shared.digest import Digest, DigestFunction

_FETCHES_AT_ONCE = 16
"""Downloads at the same time. Each holds a connection, a file and some megabytes; more wait."""

_BY_ORIGIN = (NotFoundError, PermissionDeniedError, DeadlineExceededError, AbortedError)
"""Errors that are not ours: told in the response. Spec: FetchBlobResponse.status."""


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How assets are fetched.

    Attributes:
        spool_directory: Where downloads wait until their digest is known.
        timeout_seconds: For one address, unless a client asks for less.
        max_age_seconds: For how long content that no checksum names answers for its address.
        limits: What archives may hold.
    """

    spool_directory: Path
    timeout_seconds: float
    max_age_seconds: float
    limits: ArchiveLimits


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """FetchBlobRequest and FetchDirectoryRequest, checked.

    Attributes:
        is_directory: Which of the two.
        instance_name: The instance.
        uris: Addresses of the same content, at least one.
        qualifiers: As ``qualifiers.identity`` gives them.
        function: Makes the digests.
        timeout_seconds: For one address; zero leaves it to the service.
        oldest_accepted: Content that was retrieved before is not wanted; seconds since 1970.
    """

    is_directory: bool
    instance_name: str
    uris: tuple[str, ...]
    qualifiers: tuple[tuple[str, str], ...]
    function: DigestFunction
    timeout_seconds: float = 0.0
    oldest_accepted: float = 0.0

    def name(self, uri: str) -> AssetName:
        """Return what a record of one of the addresses is found by."""
        return AssetName(self.is_directory, self.instance_name, uri, self.qualifiers, self.function)


@dataclass(frozen=True, slots=True)
class FetchOutcome:
    """What became of a request.

    Attributes:
        uri: The address that the content, or the error, comes from.
        asset: The content; None if there is an error.
        error: One that is not ours.
    """

    uri: str
    asset: Asset | None = None
    error: LatheError | None = None


class RemoteAssets:
    """Fetches assets, and remembers those that were fetched or pushed.

    Args:
        blobs: Where content goes.
        cache: Where it is remembered.
        origin: Downloads.
        options: How.
        wall_seconds: The clock.
        counters: What was done.
    """

    def __init__(
        self,
        blobs: BlobStore,
        cache: ActionCache,
        origin: Origin,
        options: FetchOptions,
        wall_seconds: Callable[[], float],
        counters: CasCounters,
    ) -> None:
        self._blobs = blobs
        self._records = AssetRecords(cache)
        self._origin = origin
        self._options = options
        self._wall_seconds = wall_seconds
        self._counters = counters
        self._work = SharedWork("fetch", _FETCHES_AT_ONCE)

    async def aclose(self) -> None:
        """Give up what is under way."""
        await self._work.aclose()
        await self._origin.aclose()

    async def fetch(self, request: FetchRequest) -> FetchOutcome:
        """Return content for one of the addresses: what is remembered, else the first that can be downloaded.

        Raises:
            InvalidArgumentError: A qualifier is unknown, and no pushed content has it; or one is malformed.
            ResourceExhaustedError: No room is left for the content.
            UnavailableError: No origin can be reached for the moment.
        """
        for uri in request.uris:
            asset = await self._remembered(request, uri)
            if asset is not None:
                self._counters.asset_hits += 1
                return FetchOutcome(uri, asset)
        terms = fetch_terms(request.qualifiers, request.uris, with_directory=request.is_directory)
        failed: FetchOutcome | None = None
        for uri in request.uris:
            try:
                return FetchOutcome(uri, await self._retrieve(request, uri, terms))
            except LatheError as error:
                # A mirror may be there where this one is not.
                failed = FetchOutcome(uri, error=error)
        if failed is None or failed.error is None:
            raise InvalidArgumentError("uris", "there is none")
        if isinstance(failed.error, _BY_ORIGIN):
            return failed
        raise failed.error

    async def push(
        self,
        names: Sequence[AssetName],
        digest: Digest,
        expires_at: float | None,
        blobs: Sequence[Digest],
        directories: Sequence[Digest],
    ) -> None:
        """Have content stand for addresses.

        Args:
            names: The addresses.
            digest: The content, which must be there.
            expires_at: Until when; None without a bound.
            blobs: What it refers to besides.
            directories: The same.

        Raises:
            InvalidArgumentError: It is not there, is no directory where it should be, or not what its checksum says.
            ResourceExhaustedError: No room is left.
        """
        field = "root_directory_digest" if names[0].is_directory else "blob_digest"
        if await settled(self._blobs.find_missing([(digest, digest.key, digest.size_bytes)])):
            raise InvalidArgumentError(field, f"{digest} is not in the content addressable storage; upload it before")
        checksum = dict(names[0].qualifiers).get(CHECKSUM)
        if checksum is not None and not names[0].is_directory:
            await self._check_pushed(digest, checksum)
        asset = Asset(digest, self._wall_seconds(), expires_at)
        for name in names:
            await self._records.put(name, asset, blobs, directories)

    async def _check_pushed(self, digest: Digest, checksum: str) -> None:
        """Verify what a client says of its content: others will believe it."""
        wanted = parse_integrity(checksum)
        with Spool(self._options.spool_directory, {each.function for each in wanted}) as spool:
            async for piece in self._blobs.read(digest):
                await spool.write(piece)
            await spool.flush()
            if not any(spool.digest(each.function).hash == each.hash for each in wanted):
                raise InvalidArgumentError("blob_digest", f"{digest} does not have the checksum {checksum[:200]}")

    async def _remembered(self, request: FetchRequest, uri: str) -> Asset | None:
        asset = await self._records.get(request.name(uri))
        if asset is None or asset.retrieved_at < request.oldest_accepted:
            return None
        if asset.expires_at is not None and asset.expires_at <= self._wall_seconds():
            return None
        return asset

    async def _retrieve(self, request: FetchRequest, uri: str, terms: FetchTerms) -> Asset:
        name = request.name(uri)
        timeout_seconds = min(request.timeout_seconds or self._options.timeout_seconds, self._options.timeout_seconds)
        asked_at = self._wall_seconds()
        # Nobody is held to the patience of another client.
        key = (name, timeout_seconds)
        asset = await self._work.once(key, lambda: self._download(name, terms, timeout_seconds))
        if asset.retrieved_at < request.oldest_accepted <= asked_at:
            # It was under way already, and began too early. A time to come is met by none: clients that send one want
            # no content that was kept, and have to find what their last try began.
            asset = await self._work.once(key, lambda: self._download(name, terms, timeout_seconds))
        return asset

    async def _download(self, name: AssetName, terms: FetchTerms, timeout_seconds: float) -> Asset:
        started_at = self._wall_seconds()
        functions = {name.function, *(checksum.function for checksum in terms.checksums)}
        try:
            with Spool(self._options.spool_directory, functions) as spool:
                await self._origin.download(name.uri, terms.headers.get(name.uri, {}), timeout_seconds, spool.write)
                await spool.flush()
                self._check_fetched(spool, terms)
                digest = await self._store(spool, name, terms)
        except LatheError:
            self._counters.asset_failures += 1
            raise
        # Content with a checksum is the same for ever; of other content nobody knows.
        expires_at = None if terms.checksums else started_at + self._options.max_age_seconds
        asset = Asset(digest, started_at, expires_at)
        await self._records.put(name, asset)
        self._counters.asset_downloads += 1
        self._counters.asset_downloaded_bytes += spool.size_bytes
        return asset

    async def _store(self, spool: Spool, name: AssetName, terms: FetchTerms) -> Digest:
        if name.is_directory:
            options = self._options
            return await unpack(
                spool, self._blobs, name.function, options.limits, terms.subdirectory, options.spool_directory
            )
        digest = spool.digest(name.function)
        await spool.store(self._blobs, digest)
        return digest

    @staticmethod
    def _check_fetched(spool: Spool, terms: FetchTerms) -> None:
        checksums = terms.checksums
        if checksums and not any(spool.digest(each.function).hash == each.hash for each in checksums):
            got = spool.digest(checksums[0].function)
            raise AbortedError(
                f"what was fetched has the {checksums[0].function.name} {got.hash}, where {checksums[0].hash} is wanted"
            )
