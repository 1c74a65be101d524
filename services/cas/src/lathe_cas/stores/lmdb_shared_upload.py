"""One staged upload for all streams of this process that bring the same blob at the same time.

Its end is the *frontier*. The bytes there are taken from whichever stream brings them first; what a stream brings that
lies before is on its way to disk already, and is dropped. So a fast client never waits for a slow one, and a stream
that is behind keeps nothing in memory. What streams do wait for is the store: each other's bytes being taken in.

Bytes of several clients meet in a blob that only the hash over all of them can vouch for. If that is wrong, nobody can
be shown to have lied unless one stream brought everything. The others are told to try again, and for a while each
stream of that blob is staged for itself, so that honest ones succeed.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog
from typing_extensions import override

from lathe_cas.blob_store import Upload, UploadName
from lathe_cas.stores.lmdb_operations import DropUpload
from lathe_cas.stores.lmdb_upload import STAGE_BYTES, suspend_quietly, upload_key_of
from lathe_shared.digest import Digest
from lathe_shared.errors import (
    AbortedError,
    DigestMismatchError,
    InvalidArgumentError,
    LatheError,
    ResourceExhaustedError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from typing import Any

    from lathe_cas.blob_store import UploadStatus
    from lathe_cas.stores.lmdb_records import UploadRecord
    from lathe_cas.stores.lmdb_storage import LmdbStorage
    from lathe_cas.stores.lmdb_upload import LmdbUpload

K = TypeVar("K")

SHARED_FROM_BYTES = STAGE_BYTES
"""Uploads of smaller blobs are not staged, so there is nothing to share."""

REMEMBERED_SECONDS = 600
"""For how long it is remembered that a shared upload was dropped: far longer than clients wait between two tries, which
is seconds, and short beside what staging a blob more often than once costs if nobody lies any more."""

MAX_REMEMBERED = 4096
"""How many uploads are remembered for any reason, some 300 bytes each; beyond that the oldest is forgotten."""

_log = structlog.get_logger(__name__)


class SharedUploads:
    """The uploads of one store that are under way, but for small ones and those that clients compressed.

    Args:
        storage: Where they are staged.
        open_alone: Begins an upload that only this module uses, or goes on with what is staged of it.
        record_of: Looks up what is staged of an upload.
        status_of: Tells how far an upload is, and has the lease of a blob that is there renewed.
        has: Tells whether a blob is there, without that counting as its use.
    """

    def __init__(
        self,
        storage: LmdbStorage,
        open_alone: Callable[[UploadName], Awaitable[LmdbUpload]],
        record_of: Callable[[UploadName], UploadRecord | None],
        status_of: Callable[[UploadName], Awaitable[UploadStatus]],
        has: Callable[[Digest], bool],
    ) -> None:
        self.has = has
        self.status_of = status_of
        self._record_of = record_of
        self._storage = storage
        self._open_alone = open_alone
        self._holders: dict[UploadName, SharedUpload] = {}
        self._staged: dict[UploadName, _Frontier] = {}
        self._shared: dict[Digest, _Frontier] = {}
        self._spoilt = _Recently[Digest](storage.seconds, REMEMBERED_SECONDS)
        self._dropped = _Recently[Digest](storage.seconds, REMEMBERED_SECONDS)
        self._mixed = _Recently[UploadName](storage.seconds, storage.options.upload_max_age_seconds)

    async def open(self, name: UploadName, *, restart: bool) -> SharedUpload:
        """Begin an upload, go on with one, or join one of the same blob; a stream that holds it loses it.

        A stream that begins anew has what is staged under its own name forgotten, unless others bring that, too.

        Raises:
            AbortedError: What it is to go on with was dropped, together with what others had brought.
        """
        stream = SharedUpload(self, name)
        previous = self._holders.get(name)
        self._holders[name] = stream
        staged = self._staged.get(name)
        try:
            if previous is not None:
                await previous.give_up()
            if staged is None or not self._join_stored(stream, staged, restart=restart):
                while stream.holds and not await self._join_or_begin(stream, restart=restart):
                    pass
        except BaseException:
            self.release(stream)
            raise
        return stream

    async def _join_or_begin(self, stream: SharedUpload, *, restart: bool) -> bool:
        """Have a stream join an upload that is under way, or begin one; False if something changed meanwhile."""
        name = stream.name
        staged = self._staged.get(name)
        if staged is not None and staged.ending is not None:
            await staged.ended()
            return self._join_stored(stream, staged, restart=restart)
        if staged is not None:
            stream.join(staged, None, 0 if restart else self.committed_bytes(name))
            return True
        own = self._record_of(name)
        if own is not None and restart:
            # Now, and not when there is something to take its place: whoever asks meanwhile is told the truth.
            await self.forget(name, own)
            return False
        frontier = None if name.digest in self._spoilt else self._shared.get(name.digest)
        committed_bytes = 0 if own is None else own.committed_bytes
        # One that is longer than what is shared has bytes which only its own name leads to.
        if frontier is None or committed_bytes > frontier.position:
            if own is None and not restart and name.digest in self._dropped:
                raise AbortedError("what had arrived of this upload was dropped with that of others; begin it again")
            return await self._begin(stream)
        stream.join(frontier, own, committed_bytes)
        return True

    def _join_stored(self, stream: SharedUpload, staged: _Frontier, *, restart: bool) -> bool:
        """Have a stream join what was staged under its name and became a blob while it was opened.

        What its client was told to go on with is in the blob, so it must not be told now that nothing is there.
        """
        if restart or not staged.is_stored:
            return False
        stream.join(staged, None, staged.position)
        return True

    async def _begin(self, stream: SharedUpload) -> bool:
        name = stream.name
        upload = await self._open_alone(name)
        if not stream.holds:
            with contextlib.suppress(LatheError):
                await upload.suspend()
            return False
        frontier = _Frontier(self, name, upload, is_mixed=bool(upload.committed_bytes) and name in self._mixed)
        self._staged[name] = frontier
        if name.digest not in self._spoilt:
            self._shared.setdefault(name.digest, frontier)
        stream.join(frontier, None, upload.committed_bytes)
        return True

    def release(self, stream: SharedUpload) -> None:
        """Let another stream have an upload's name."""
        if self._holders.get(stream.name) is stream:
            del self._holders[stream.name]

    def committed_bytes(self, name: UploadName) -> int:
        """Return how many bytes are staged under a name, durably."""
        record = self._record_of(name)
        return 0 if record is None else record.committed_bytes

    async def forget(self, name: UploadName, own: UploadRecord) -> None:
        """Drop what is staged under a name, unless another process has taken it over."""
        await self._storage.writer.submit(DropUpload(upload_key_of(name), (own.owner,)))

    def closing(self, frontier: _Frontier) -> None:
        """Learn that nobody can join an upload any more."""
        if self._shared.get(frontier.name.digest) is frontier:
            del self._shared[frontier.name.digest]

    def closed(self, frontier: _Frontier) -> None:
        """Learn that the name under which an upload was staged is free."""
        del self._staged[frontier.name]

    def note_dropped(self, digest: Digest, *, is_spoilt: bool) -> None:
        """Learn that bytes were dropped of which some client may have been told that they are kept.

        Args:
            digest: The blob.
            is_spoilt: Whether that is because bytes which several brought were not the blob.
        """
        self._dropped.add(digest)
        if is_spoilt:
            self._spoilt.add(digest)

    def note_mixed(self, name: UploadName) -> None:
        """Learn that what is kept under a name was not all brought by that client."""
        self._mixed.add(name)

    async def aclose(self) -> None:
        """Take the uploads away from streams that still hold them; what they brought stays."""
        for stream in list(self._holders.values()):
            await stream.give_up()
        for frontier in list(self._staged.values()):
            await frontier.ended()


class SharedUpload(Upload):
    """One stream's part in an upload; made by ``SharedUploads.open``.

    Args:
        shared: The uploads of the store.
        name: Which upload, as the stream names it. What it shares with others may be staged under another name.
    """

    def __init__(self, shared: SharedUploads, name: UploadName) -> None:
        self.name = name
        self._shared = shared
        self._frontier: _Frontier | None = None
        self._own: UploadRecord | None = None
        self._committed_at_open = 0
        self._position = 0
        self._lost = False
        self._ending: asyncio.Task[None] | None = None

    def join(self, frontier: _Frontier, own: UploadRecord | None, position: int) -> None:
        """Begin.

        Args:
            frontier: What to share in.
            own: What is staged under the stream's own name, if that is not what it shares in.
            position: Bytes that the stream need not send.
        """
        self._frontier = frontier
        self._own = own
        self._committed_at_open = self._position = position
        frontier.join(self)

    @property
    def holds(self) -> bool:
        """Whether no other stream has taken this upload over."""
        return not self._lost

    @property
    @override
    def committed_bytes(self) -> int:
        return self._committed_at_open

    @override
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        frontier = self._held()
        start, end = self._position, self._position + length
        if end > self.name.digest.size_bytes:
            raise InvalidArgumentError(
                "data", f"{end} bytes are more than the {self.name.digest.size_bytes} of the digest"
            )
        try:
            await frontier.take_in(self, start, pieces, length)
        finally:
            # Cancelled while others were ahead of it, a stream was not heard to its end.
            self._position = min(end, frontier.position)

    @override
    async def finish(self) -> None:
        frontier = self._held()
        digest = self.name.digest
        if self._position < digest.size_bytes:
            await self.abandon()
            raise DigestMismatchError(digest, f"{self._position} bytes")
        is_over = frontier.is_stored
        try:
            await frontier.finished()
        finally:
            self._leave(frontier)
        frontier.check(self)
        if is_over and not (await self._shared.status_of(self.name)).complete:
            raise AbortedError("another stream brought the blob, and it is gone again; begin the upload again")
        await self._forget_own()

    @override
    async def suspend(self, pieces: Sequence[memoryview] = (), length: int = 0) -> int:
        frontier = self._held()
        try:
            await self.append(pieces, length)
        finally:
            kept = self._leave(frontier)
        if kept is not None:
            kept_bytes = await asyncio.shield(kept)
            if frontier.name == self.name:
                return kept_bytes
        if frontier.is_stored:
            return self.name.digest.size_bytes
        return self._shared.committed_bytes(self.name)

    @override
    def suspend_soon(self, pieces: Sequence[memoryview] = (), length: int = 0) -> None:
        self._ending = asyncio.create_task(suspend_quietly(self, self.name.digest, pieces, length))

    @override
    async def abandon(self) -> None:
        frontier = self._frontier
        if self._lost or frontier is None:
            return
        # What is staged under another client's name is that client's to resume, if the blob does not come before.
        drops = frontier.name == self.name or self._shared.has(self.name.digest)
        ending = self._leave(frontier, drops=drops)
        if ending is not None:
            await asyncio.shield(ending)
        elif frontier.ending is not None:
            await frontier.ended()
        await self._forget_own()

    async def _forget_own(self) -> None:
        if self._own is not None:
            await self._shared.forget(self.name, self._own)

    async def give_up(self) -> None:
        """Lose the upload to another stream; what it brought stays."""
        if self._ending is not None:
            await asyncio.wait([self._ending])
            return
        self._lost = True
        if self._frontier is not None:
            self._leave(self._frontier)

    def _held(self) -> _Frontier:
        if self._lost:
            raise AbortedError("another stream took this upload over")
        if self._frontier is None:
            raise RuntimeError("this upload was not opened")
        return self._frontier

    def _leave(self, frontier: _Frontier, *, drops: bool = False) -> asyncio.Task[int] | None:
        """Bring nothing more; if nobody else does, return what keeps or drops what is staged."""
        self._shared.release(self)
        return frontier.leave(self, drops=drops)


class _Frontier:
    """A staged upload and the streams that share in it.

    Args:
        shared: Where it is listed.
        name: What it is staged under: that of the stream which began it.
        upload: What is staged.
        is_mixed: Whether others have brought some of it, too.

    Attributes:
        position: Bytes that were taken in, from whomever.
        ending: What finishes, keeps or drops it. Nobody joins any more.
        is_stored: Whether it became a blob.
    """

    def __init__(self, shared: SharedUploads, name: UploadName, upload: LmdbUpload, *, is_mixed: bool) -> None:
        self.name = name
        self.position = upload.committed_bytes
        self.ending: asyncio.Task[int] | None = None
        self.is_stored = False
        self._shared = shared
        self._upload = upload
        self._streams: set[SharedUpload] = set()
        self._turn = asyncio.Lock()
        self._error: Exception | None = None
        self._was_shared = False
        self._bringer = name if upload.committed_bytes else None
        self._is_mixed = is_mixed

    def join(self, stream: SharedUpload) -> None:
        """Have one more stream share in it."""
        self._was_shared |= bool(self._streams)
        self._streams.add(stream)

    def leave(self, stream: SharedUpload, *, drops: bool) -> asyncio.Task[int] | None:
        """Have a stream no longer share in it; if it was the last one, begin to keep or drop what is staged."""
        self._streams.discard(stream)
        if self._streams or self.ending is not None:
            return None
        self._begin_ending(self._drop() if drops else self._keep())
        return self.ending

    async def take_in(self, stream: SharedUpload, start: int, pieces: Sequence[memoryview], length: int) -> None:
        """Take in what lies behind the frontier of a stream's next bytes, which begin at ``start``.

        Cancellation: All of them are taken in, or none.
        """
        self.check(stream)
        if start + length <= self.position:
            return
        async with self._turn:
            self.check(stream)
            passed = self.position - start
            if passed >= length:
                return
            self.position = start + length
            self._is_mixed |= self._bringer not in (None, stream.name)
            self._bringer = stream.name
            try:
                await self._upload.append(_behind(pieces, passed), length - passed)
            except Exception as error:  # noqa: BLE001 - the others are told, too, whatever it is
                self._fail(error)
        await self.ended_if_failed()
        self.check(stream)

    def check(self, stream: SharedUpload) -> None:
        """Make sure that this can still become the blob.

        Raises:
            LatheError: It cannot. What to tell the stream: only one that brought everything can be shown to be wrong.
        """
        error = self._error
        if error is None:
            return
        if isinstance(error, InvalidArgumentError) and (self._is_mixed or self._bringer not in (None, stream.name)):
            raise AbortedError(
                f"the bytes that several uploads brought together are not {self.name.digest}, and are dropped; "
                "begin the upload again, and it is verified for itself"
            )
        raise error

    async def finished(self) -> None:
        """Have the blob verified and made visible, or wait until that is done; ``check`` tells the outcome."""
        if self.ending is None:
            self._begin_ending(self._finish())
        await self.ended()

    async def ended(self) -> None:
        """Wait until what is ending has ended, however that may be."""
        if self.ending is not None:
            with contextlib.suppress(Exception):  # which whoever ended it is told
                await asyncio.shield(self.ending)

    async def ended_if_failed(self) -> None:
        """Wait until the room of what failed is free, so that nobody is told before."""
        if self._error is not None:
            await self.ended()

    def _fail(self, error: Exception) -> None:
        """Have nobody go on. What was staged is kept, unless several that do so would keep the room from each other."""
        self._error = error
        if self.ending is None:
            self._begin_ending(self._give_up())

    async def _give_up(self) -> int:
        return await (self._drop() if isinstance(self._error, ResourceExhaustedError) else self._keep())

    async def _finish(self) -> int:
        if self._error is not None:
            return await self._give_up()
        try:
            await self._upload.finish()
            self.is_stored = True
        except ResourceExhaustedError as error:
            self._error = error
            return await self._drop()
        except InvalidArgumentError as error:
            self._error = error
            if self._was_shared or self._is_mixed:
                self._shared.note_dropped(self.name.digest, is_spoilt=True)
                _log.warning("shared_upload_spoilt", digest=str(self.name.digest), error=str(error))
        except Exception as error:  # noqa: BLE001 - all who wait are told
            self._error = error
        return 0

    async def _keep(self) -> int:
        if self._is_mixed or self._bringer not in (None, self.name):
            self._shared.note_mixed(self.name)
        return await self._upload.suspend()

    async def _drop(self) -> int:
        if self._was_shared:
            self._shared.note_dropped(self.name.digest, is_spoilt=False)
        await self._upload.abandon()
        return 0

    def _begin_ending(self, work: Coroutine[Any, Any, int]) -> None:
        self._shared.closing(self)
        self.ending = asyncio.create_task(self._run(work))
        self.ending.add_done_callback(self._log_failure)

    async def _run(self, work: Coroutine[Any, Any, int]) -> int:
        try:
            async with self._turn:
                return await work
        finally:
            self._shared.closed(self)

    def _log_failure(self, ending: asyncio.Task[int]) -> None:
        if not ending.cancelled() and (error := ending.exception()) is not None:
            _log.info("upload_not_kept", digest=str(self.name.digest), error=str(error))


class _Recently(Generic[K]):
    """What something happened to a short while ago.

    Args:
        seconds: The store's clock.
        remembered_seconds: How long a short while is.
    """

    def __init__(self, seconds: Callable[[], float], remembered_seconds: float) -> None:
        self._seconds = seconds
        self._remembered_seconds = remembered_seconds
        self._until: dict[K, float] = {}

    def add(self, key: K) -> None:
        self._until.pop(key, None)
        self._until[key] = self._seconds() + self._remembered_seconds
        if len(self._until) > MAX_REMEMBERED:
            del self._until[next(iter(self._until))]

    def __contains__(self, key: K) -> bool:
        return self._until.get(key, 0) > self._seconds()


def _behind(pieces: Sequence[memoryview], passed: int) -> Sequence[memoryview]:
    """Return pieces without their first ``passed`` bytes."""
    if not passed:
        return pieces
    left: list[memoryview] = []
    for piece in pieces:
        if passed < len(piece):
            left.append(piece[passed:])
        passed = max(0, passed - len(piece))
    return left
