"""The port to blob storage: what the services need of it, cut in batches.

The empty blob is in every store without being put, and is never stored.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from lathe_cas.compression.zstd_decoder import decode_whole
from lathe_cas.compression.zstd_encoder import ZstdEncoder
from lathe_shared.compressor import Compressor
from lathe_shared.errors import LatheError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Mapping, Sequence

    from lathe_cas.soon import Soon
    from lathe_shared.digest import Digest, DigestFunction

T = TypeVar("T")


class UploadName(NamedTuple):
    """Which upload: the instance, the client's own id for it, the blob that it is to become, and how it travels."""

    instance_name: str
    upload_id: str
    digest: Digest
    compressor: Compressor = Compressor.IDENTITY


class UploadStatus(NamedTuple):
    """How far an upload is; the answer to QueryWriteStatus."""

    committed_bytes: int
    complete: bool


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """Exact figures about a store, for metrics and ``/status``.

    Attributes:
        blobs: Blobs held.
        blob_bytes: Their bytes, as clients see them.
        stored_bytes: Bytes on disk of everything kept; what the limit is about.
        staged_bytes: Bytes on disk of unfinished uploads, a part of ``stored_bytes``.
        garbage_bytes: Bytes on disk that wait to be freed.
        action_results: Action results held.
        limit_bytes: The limit of ``stored_bytes``.
        file_bytes: Size of the files.
        oldest_evicted_age_seconds: For how long, at least, that had not been used which was evicted last: the least
            recently used of its time. None if nothing was evicted since the process began.
        least_evicted_age_seconds: The least of these since the process began: the worst retention given.
        counters: Counts since the process began, by name.
    """

    blobs: int
    blob_bytes: int
    stored_bytes: int
    staged_bytes: int
    garbage_bytes: int
    action_results: int
    limit_bytes: int
    file_bytes: int
    oldest_evicted_age_seconds: int | None = None
    least_evicted_age_seconds: int | None = None
    counters: Mapping[str, int] = field(default_factory=dict)


class Upload(ABC):
    """An upload in progress, held by one stream.

    A store may let streams that bring the same blob share what they bring, whatever their uploads' names.

    Exactly one of ``finish``, ``suspend`` and ``abandon`` ends it. Its methods are called one after the other. The
    bytes are those on their way: with a compressor in the upload's name they are what the blob is decoded from. Such an
    upload can only begin anew; suspending it keeps nothing.
    """

    @property
    @abstractmethod
    def committed_bytes(self) -> int:
        """Bytes that need not be sent again, when the upload was opened."""

    @abstractmethod
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        """Take in the next bytes.

        Returns when there is room for more, not when they are durable.

        Args:
            pieces: The bytes; not changed by the caller afterwards.
            length: How many they are together.

        Raises:
            InvalidArgumentError: What was appended before cannot be decoded, or is more than the blob.
            AbortedError: Another stream has taken this upload over, or others that share in it have spoilt it.
            ResourceExhaustedError: No room is left.
        """

    @abstractmethod
    async def finish(self) -> None:
        """Verify the bytes and make the blob visible, durably.

        Raises:
            InvalidArgumentError: The bytes are not the blob, or cannot be decoded; nothing of them is kept.
            AbortedError: Another stream has taken this upload over; or the bytes are not the blob, and nothing of them
                is kept, but not all of them came from here.
            ResourceExhaustedError: No room is left.
        """

    @abstractmethod
    async def suspend(self, pieces: Sequence[memoryview] = (), length: int = 0) -> int:
        """Take in the last bytes and keep what has arrived for a later stream, durably.

        Returns:
            How many bytes are kept under the upload's name. What others share in may be kept under another.

        Raises:
            AbortedError: Another stream has taken this upload over, or others that share in it have spoilt it.
            ResourceExhaustedError: No room is left.
        """

    @abstractmethod
    def suspend_soon(self, pieces: Sequence[memoryview] = (), length: int = 0) -> None:
        """Do what ``suspend`` does, in the background: for a stream that was cancelled."""

    @abstractmethod
    async def abandon(self) -> None:
        """Forget what has arrived, unless another stream has taken it over or shares in it."""


class UnnamedUpload(ABC):
    """An upload of a blob whose size, or even whose hash, nobody has told: both are known when it ends.

    It has no name, so nobody can resume it. Exactly one of ``finish``, ``abandon`` and ``abandon_soon`` ends it. Its
    methods are called one after the other.
    """

    @abstractmethod
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        """Take in the next bytes; as ``Upload.append`` does.

        Raises:
            ResourceExhaustedError: No room is left.
        """

    @abstractmethod
    async def finish(self) -> Digest:
        """Make the blob visible, durably, and return its digest.

        Raises:
            DigestMismatchError: The bytes have another hash than was expected; nothing of them is kept.
            ResourceExhaustedError: No room is left.
        """

    @abstractmethod
    async def abandon(self) -> None:
        """Forget what has arrived."""

    @abstractmethod
    def abandon_soon(self) -> None:
        """Do what ``abandon`` does, in the background: for a request that was cancelled."""

    async def take_all(self, pieces: AsyncIterator[memoryview]) -> Digest:
        """Take in a whole blob and finish; whatever goes wrong, in ``pieces`` too, nothing of it is left.

        Args:
            pieces: The bytes; not changed by the caller afterwards.

        Raises:
            LatheError: As ``append`` and ``finish`` do.
        """
        async with abandoned_on_failure(self):
            async for piece in pieces:
                await self.append([piece], len(piece))
        return await self.finish()


class Abandonable(Protocol):
    """What has ``abandon`` and ``abandon_soon``, as ``UnnamedUpload`` has."""

    async def abandon(self) -> None:
        """Forget what has arrived."""

    def abandon_soon(self) -> None:
        """Do what ``abandon`` does, in the background."""


@contextlib.asynccontextmanager
async def abandoned_on_failure(upload: Abandonable) -> AsyncIterator[None]:
    """Have nothing left of an upload if what is done within the block fails or is cancelled."""
    try:
        yield
    except Exception:
        # The error that is under way matters more than one that this meets.
        with contextlib.suppress(LatheError):
            await upload.abandon()
        raise
    except BaseException:
        upload.abandon_soon()
        raise


class BlobStore(ABC):
    """Holds blobs under their digests. A blob is there when it is whole and verified, and not before."""

    @abstractmethod
    def find_missing(self, wanted: Sequence[tuple[T, bytes, int]]) -> Soon[list[T]]:
        """Tell which blobs are not there, and touch those which are.

        Called inline on the event loop, so it must not block. An answer at once is the rule; if a lease is over, or
        about to end, it has to be awaited until that is renewed.

        Args:
            wanted: A token of the caller's choice, ``Digest.key`` and the size, for each blob.

        Returns:
            The tokens of the blobs that are missing, in order.
        """

    @abstractmethod
    def find_sizes(self, keys: Sequence[bytes]) -> Soon[list[int | None]]:
        """Return the sizes of blobs, for those who know no more than a hash, and touch those which are there.

        Called inline on the event loop, and answered at once, as ``find_missing`` is.

        Args:
            keys: ``Digest.key`` of each blob.

        Returns:
            For each blob its size in bytes; None if it is not there.
        """

    @abstractmethod
    async def put_many(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        """Verify and store blobs, durably.

        Returns:
            For each blob None, or why it was not stored: DigestMismatchError, ResourceExhaustedError.

        Raises:
            UnavailableError: The store cannot be written.
        """

    async def put_many_zstd(self, blobs: Sequence[tuple[Digest, memoryview]]) -> list[LatheError | None]:
        """Do what ``put_many`` does with blobs that come as zstd streams. The caller bounds the digests' total size.

        Returns:
            For each blob None, or why it was not stored: InvalidArgumentError, ResourceExhaustedError.

        Raises:
            UnavailableError: The store cannot be written.
        """
        outcomes: list[LatheError | None] = [None] * len(blobs)
        decoded: list[tuple[int, Digest, memoryview]] = []
        for place, (digest, data) in enumerate(blobs):
            try:
                decoded.append((place, digest, memoryview(decode_whole(data, digest.size_bytes))))
            except LatheError as error:
                outcomes[place] = error
        stored = await self.put_many([(digest, data) for _, digest, data in decoded])
        for (place, _, _), outcome in zip(decoded, stored, strict=True):
            outcomes[place] = outcome
        return outcomes

    @abstractmethod
    async def read_many(self, digests: Sequence[Digest]) -> list[bytes | None]:
        """Return whole blobs, verified; None for one that is not there. The caller bounds their total size."""

    async def read_many_as_stored(self, digests: Sequence[Digest]) -> list[tuple[Compressor, bytes] | None]:
        """Do what ``read_many`` does, but leave compressed what is stored so."""
        blobs = await self.read_many(digests)
        return [None if blob is None else (Compressor.IDENTITY, blob) for blob in blobs]

    def read_at_once(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> bytes | None:  # noqa: ARG002
        """Return what ``read`` would, if it is so little that it may be fetched inline; None if it is to be read.

        Called inline on the event loop, so it must not block. Most blobs are small, and for them the rest of what a
        stream costs is more than the look-up.

        Raises:
            BlobNotFoundError: As ``read`` does.
            OutOfRangeError: As ``read`` does.
        """
        return None

    @abstractmethod
    def read(self, digest: Digest, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
        """Return a blob's bytes in pieces of some size, verified.

        Args:
            digest: The blob.
            offset_bytes: Where to begin, not negative.
            limit_bytes: How many bytes at most; zero means all.

        Raises:
            BlobNotFoundError: It is not there, or was found damaged.
            OutOfRangeError: ``offset_bytes`` is past its end.
        """

    async def read_zstd(self, digest: Digest, offset_bytes: int = 0) -> AsyncIterator[bytes]:
        """Return a zstd stream, in pieces of some size, that decodes to a blob or to its end.

        Args:
            digest: The blob.
            offset_bytes: Where in the blob to begin, not negative.

        Raises:
            BlobNotFoundError: It is not there, or was found damaged.
            OutOfRangeError: ``offset_bytes`` is past its end.
            UnavailableError: It was stored anew meanwhile, in another form.
        """
        encoder = ZstdEncoder()
        is_empty = True
        async for piece in self.read(digest, offset_bytes):
            is_empty = False
            yield encoder.encode(piece)
        if is_empty:
            yield encoder.encode(b"")

    @abstractmethod
    async def open_upload(self, name: UploadName, *, restart: bool = False) -> Upload:
        """Begin or go on with an upload. A stream that still holds it loses it.

        Args:
            name: Which upload.
            restart: Whether to forget what has arrived so far.

        Raises:
            AbortedError: What had arrived was lost with what others had brought; ``restart`` helps.
            ResourceExhaustedError: The blob is larger than the store's limit.
        """

    @abstractmethod
    async def open_unnamed_upload(self, function: DigestFunction, expected_hash: str | None = None) -> UnnamedUpload:
        """Begin an upload of a blob whose digest is not known yet.

        Args:
            function: What its digest is to be made with.
            expected_hash: What its hash has to be; None if any will do.
        """

    async def put_upload(self, name: UploadName, data: memoryview) -> None:
        """Verify and store a blob whose upload came in one piece; what had arrived under its name is forgotten.

        Returns at once if the blob is there already.

        Args:
            name: Which upload.
            data: All bytes, at least one: as many as the digest has, unless they are compressed. Not changed by the
                caller afterwards.

        Raises:
            InvalidArgumentError: The bytes are not the blob, or cannot be decoded.
            AbortedError: Another stream has taken this upload over.
            ResourceExhaustedError: No room is left.
        """
        if (await self.upload_status(name)).complete:
            return
        upload = await self.open_upload(name, restart=True)
        try:
            await upload.append([data], len(data))
        except LatheError:
            await upload.abandon()
            raise
        except BaseException:
            upload.suspend_soon()
            raise
        await upload.finish()

    def put_at_once(self, name: UploadName, data: memoryview) -> asyncio.Future[None] | None:  # noqa: ARG002
        """Do what ``put_upload`` does, if the blob is so small that it may be begun inline; None if it may not.

        Called inline on the event loop, so it must not block. Most blobs are small, and for them a task that waits is
        more than the work.

        Returns:
            What is done when the blob is stored, or failed as ``put_upload`` does.

        Raises:
            DigestMismatchError: The bytes are not the blob.
        """
        return None

    @abstractmethod
    async def upload_status(self, name: UploadName) -> UploadStatus:
        """Tell how far an upload is, durably: complete if its blob is there, by whatever way; at zero if unknown.

        It waits for nothing but the renewal of a lease.
        """

    @abstractmethod
    async def remove(self, digests: Sequence[Digest]) -> int:
        """Make blobs vanish, for operators and tests; returns how many were there."""

    @abstractmethod
    def status(self) -> StoreStatus:
        """Return the store's figures; cheap."""
