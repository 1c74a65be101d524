"""Uploads into LMDB: hashed while they arrive, staged chunk by chunk, published by one small record.

What has arrived is either staged (whole chunks, hashed, on their way to disk) or in the buffer. An upload that fits the
buffer is never staged: it becomes a blob in one operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections import deque
from typing import TYPE_CHECKING

import structlog
from typing_extensions import override

from lathe_cas.blob_store import UnnamedUpload, Upload, UploadName, abandoned_on_failure
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_chunks import ChunkDamagedError, chunk_seed, cut_pieces, read_chunks
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_operations import DropUpload, PublishUpload, StageUpload
from lathe_shared.digest import Digest
from lathe_shared.errors import AbortedError, DigestMismatchError, InvalidArgumentError, LatheError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from lathe_cas.stores.lmdb_chunks import Chunk
    from lathe_cas.stores.lmdb_storage import LmdbStorage
    from lathe_shared.digest import DigestFunction, Hasher

STAGE_BYTES = 16 * records.CHUNK_BYTES
"""Bytes that are gathered before they are hashed and staged together. Uploads below it are never staged."""

MAX_STAGES_IN_FLIGHT = 4
"""Pieces of one upload that may wait for the writer: its memory is some six times STAGE_BYTES at most."""

INLINE_HASH_BYTES = records.CHUNK_BYTES
"""Up to this size bytes are hashed on the event loop: 40 µs, less than a thread switch and back costs."""

_JOIN_BELOW_BYTES = 4 * records.CHUNK_BYTES
"""Pieces that are smaller than this on average are copied together: most chunks would have to be in any case, and each
piece is a time to let go of the GIL."""

_log = structlog.get_logger(__name__)


async def begin_upload(upload: LmdbUpload, *, restart: bool) -> LmdbUpload:
    """Begin an upload or go on with what is staged of it; a stream of this process that holds it loses it.

    Args:
        upload: Which upload, newly made.
        restart: Whether to forget what is staged.
    """
    await upload.take_hold()
    try:
        await upload.resume(restart=restart)
    except BaseException:
        upload.release()
        raise
    return upload


async def open_unnamed_lmdb_upload(
    storage: LmdbStorage, active: dict[bytes, LmdbUpload], function: DigestFunction, expected_hash: str | None
) -> LmdbUnnamedUpload:
    """Begin an upload whose digest is not known yet; see ``begin_upload``. It is stored as it comes."""
    digest = Digest(expected_hash or "0" * function.hash_length, 0, function)
    upload = await begin_upload(LmdbUpload(storage, active, _secret_name(digest)), restart=True)
    return LmdbUnnamedUpload(upload, expected_hash)


async def suspend_quietly(upload: Upload, digest: Digest, pieces: Sequence[memoryview], length: int) -> None:
    """Suspend an upload for a stream that is gone; what goes wrong is only logged."""
    try:
        await upload.suspend(pieces, length)
    except LatheError as error:
        # Nobody is left to tell; the client finds out when it resumes.
        _log.info("upload_not_kept", digest=str(digest), error=str(error))


def find_upload(storage: LmdbStorage, key: bytes) -> records.UploadRecord | None:
    """Look up what is staged of an upload. What LMDB cannot look up is not there."""
    with storage.environment.read() as txn:
        try:
            value = txn.get(key, db=storage.environment.uploads)
        except PAGE_ERRORS as error:
            storage.note_index_damage(error)
            return None
    return None if value is None else records.UploadRecord.unpack(value)


def upload_key_of(name: UploadName) -> bytes:
    """Return the key under which an upload is staged."""
    digest = name.digest
    return records.upload_key(name.instance_name, name.upload_id, digest.key, digest.size_bytes, name.compressor)


def _secret_name(digest: Digest) -> UploadName:
    """Name an upload as nobody else can."""
    return UploadName("", uuid.uuid4().hex, digest)


class LmdbUpload(Upload):
    """One stream's hold on an upload, which begins with ``begin_upload``.

    Args:
        storage: Where to.
        active: The uploads that streams of this process hold.
        name: Which upload.
    """

    def __init__(self, storage: LmdbStorage, active: dict[bytes, LmdbUpload], name: UploadName) -> None:
        self._storage = storage
        self._active = active
        self._digest = name.digest
        self._key = upload_key_of(name)
        self._seed = chunk_seed(name.digest.key)
        self._loop = asyncio.get_running_loop()
        # Random, so that two streams are never taken for one another, not even in two processes or after a restart.
        self._owner = int.from_bytes(os.urandom(8), "big")
        self._takes_over: int | None = None
        self._restart = False
        self._hasher: Hasher = name.digest.function.new_hasher()
        self._committed_at_open = 0
        self._staged_bytes = 0
        self._staged_chunks = 0
        self._replaced_bytes = 0
        self._buffer: list[memoryview] = []
        self._buffered = 0
        self._hashing: asyncio.Task[None] | None = None
        self._stages: deque[asyncio.Future[None]] = deque()
        self._ending: asyncio.Task[None] | None = None
        self._lost: LatheError | None = None
        self._compression = records.COMPRESSION_NONE

    @property
    @override
    def committed_bytes(self) -> int:
        return self._committed_at_open

    async def take_hold(self) -> None:
        """Take the upload away from the stream that holds it."""
        while (previous := self._active.get(self._key)) is not None:
            await previous.give_up()
        self._active[self._key] = self

    async def resume(self, *, restart: bool) -> None:
        """Look up what is staged and hash it again; a hash cannot be saved and continued."""
        record = find_upload(self._storage, self._key)
        if record is None:
            return
        self._takes_over = record.owner
        self._restart = restart
        if restart:
            return
        self._compression = record.compression
        try:
            tail = await self._loop.run_in_executor(self._storage.executor, self._hash_staged, record)
        except ChunkDamagedError as error:
            if find_upload(self._storage, self._key) != record:
                raise AbortedError(
                    "another stream took this upload over; ask QueryWriteStatus where to go on"
                ) from error
            # Gone at once, or the client would be told of bytes that are no use, and come back with the same offset.
            _log.error("upload_damaged", digest=str(self._digest), error=str(error))
            self._hasher = self._digest.function.new_hasher()
            await self._storage.writer.submit(DropUpload(self._key, (record.owner,)))
            return
        self._committed_at_open = record.committed_bytes
        self._staged_bytes = record.committed_bytes - len(tail)
        self._staged_chunks = record.chunks - bool(tail)
        self._replaced_bytes = self._buffered = len(tail)
        self._buffer = [memoryview(tail)] if tail else []

    def _hash_staged(self, record: records.UploadRecord) -> bytes:
        """Hash all whole chunks and return the bytes of the part chunk behind them; in a thread."""
        whole, rest = divmod(record.committed_bytes, records.CHUNK_BYTES)
        environment = self._storage.environment
        for first in range(0, whole, 16):
            with environment.read() as txn:
                count = min(16, whole - first)
                pieces = read_chunks(txn, environment.chunks, record.storage_id, self._seed, first, count)
            for piece in pieces:
                self._hasher.update(piece)
        if not rest:
            return b""
        with environment.read() as txn:
            tail = read_chunks(txn, environment.chunks, record.storage_id, self._seed, whole, 1)[0]
        if len(tail) != rest:
            # A stream of another process, which goes on meanwhile, has replaced it.
            raise ChunkDamagedError(record.storage_id, whole, f"{len(tail)} bytes instead of {rest}")
        return tail

    @override
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        self._check_hold()
        self._buffer.extend(pieces)
        self._buffered += length
        if self._buffered >= STAGE_BYTES:
            await self._stage()

    async def _stage(self) -> None:
        """Take whole chunks out of the buffer and have them hashed and staged, while the next bytes arrive."""
        await self._settle_hashing()
        while self._stages and (len(self._stages) >= MAX_STAGES_IN_FLIGHT or self._stages[0].done()):
            await self._settle_first_stage()
        await self._storage.writer.wait_for_room()
        self._check_hold()
        length = self._buffered - self._buffered % records.CHUNK_BYTES
        self._hashing = asyncio.create_task(self._hash_and_submit(self._take(length), length))

    async def _hash_and_submit(self, pieces: list[memoryview], length: int) -> None:
        self._submit_stage(await self._hash_and_cut(pieces, length), length)

    async def _hash_and_cut(self, pieces: list[memoryview], length: int) -> list[Chunk]:
        """Hash the next bytes and turn them into chunks: their own, unless a subclass stores them in another form.

        Raises:
            InvalidArgumentError: They cannot be part of the blob.
        """
        if length <= INLINE_HASH_BYTES:
            return self._cut(self._hash(pieces))
        return await self._loop.run_in_executor(self._storage.executor, lambda: self._cut(self._hash(pieces)))

    def _hash(self, pieces: list[memoryview]) -> list[memoryview]:
        """Hash the next bytes, and return them as ``_cut`` likes them; in any thread.

        Large pieces, such as messages of a megabyte, are not copied together: only a chunk that two of them share will
        be.
        """
        if sum(map(len, pieces)) < len(pieces) * _JOIN_BELOW_BYTES:
            pieces = [memoryview(b"".join(pieces))]
        for piece in pieces:
            self._hasher.update(piece)
        return pieces

    def _cut(self, pieces: list[memoryview]) -> list[Chunk]:
        return cut_pieces(pieces, self._seed, self._staged_chunks)

    def _submit_stage(self, chunks: list[Chunk], length: int) -> None:
        stage = self._storage.writer.submit_nowait(self._next_stage(chunks, length))
        # The first stage that fails is the one that is reported; the others fail as a consequence.
        stage.add_done_callback(_retrieve)
        self._stages.append(stage)

    def _next_stage(self, chunks: list[Chunk], length: int) -> StageUpload:
        """Describe the next operation, which stores ``length`` of the client's bytes, and move on behind it."""
        stage = StageUpload(
            self._key,
            self._owner,
            self._takes_over,
            self._restart,
            self._staged_bytes,
            self._staged_bytes + length,
            self._replaced_bytes,
            chunks,
            int(self._storage.seconds()),
            self._compression,
        )
        self._staged_bytes += length
        self._staged_chunks += len(chunks)
        self._replaced_bytes = 0
        self._restart = False
        return stage

    def _take(self, length: int) -> list[memoryview]:
        """Remove the first ``length`` bytes from the buffer, without copying."""
        taken: list[memoryview] = []
        left = length
        for index, piece in enumerate(self._buffer):
            if left < len(piece):
                taken.append(piece[:left])
                self._buffer = [piece[left:], *self._buffer[index + 1 :]]
                break
            taken.append(piece)
            left -= len(piece)
        else:
            self._buffer = []
        self._buffered -= length
        return taken

    @override
    async def finish(self) -> None:
        await self.publish(lambda _: self._digest)

    async def publish(self, expect: Callable[[Digest], Digest]) -> Digest:
        """Verify the bytes and make the blob visible, durably.

        Args:
            expect: Given the digest of the bytes, returns the digest that they have to have.

        Raises:
            LatheError: As ``Upload.finish`` does.
        """
        try:
            self._check_hold()
            await self._settle()
            self._check_hold()
            length = self._buffered
            pieces = self._take(length)
            chunks = await self._hash_and_cut(pieces, length)
            found = self._found(self._staged_bytes + length)
            expected = expect(found)
            if found != expected:
                raise DigestMismatchError(expected, str(found))
            if not found.size_bytes:
                return found
            if (seed := chunk_seed(found.key)) != self._seed:
                # Nobody told the hash before, so the checksums are those of another key.
                if self._staged_bytes:
                    await self._move(found, pieces)
                    return found
                self._seed = seed
                chunks = self._cut(pieces)
            last = self._next_stage(chunks, length)
            await self._storage.writer.submit(PublishUpload(found.key, found.size_bytes, last))
            return found
        except InvalidArgumentError:
            await self._drop()
            raise
        finally:
            self.release()

    def _found(self, received_bytes: int) -> Digest:
        """Return the digest of all that came.

        Raises:
            InvalidArgumentError: It cannot be a blob.
        """
        return Digest(self._hasher.hexdigest(), received_bytes, self._digest.function)

    async def _move(self, found: Digest, rest: list[memoryview]) -> None:
        """Write what is staged once more, under the key that it turned out to have: checksums are made for one key.

        Args:
            found: What the bytes are.
            rest: Those that are not staged.
        """
        copy = await begin_upload(LmdbUpload(self._storage, self._active, _secret_name(found)), restart=True)
        await LmdbUnnamedUpload(copy, found.hash).take_all(self._all_bytes(rest))
        await self._drop()

    async def _all_bytes(self, rest: list[memoryview]) -> AsyncIterator[memoryview]:
        """Yield what is staged, in whole chunks, and then the rest."""
        at_once = STAGE_BYTES // records.CHUNK_BYTES
        for first in range(0, self._staged_chunks, at_once):
            count = min(at_once, self._staged_chunks - first)
            data = await self._loop.run_in_executor(self._storage.executor, self._read_staged, first, count)
            yield memoryview(data)
        for piece in rest:
            yield piece

    def _read_staged(self, first: int, count: int) -> bytes:
        """Read whole chunks of this upload; in a thread."""
        environment = self._storage.environment
        with environment.read() as txn:
            value = txn.get(self._key, db=environment.uploads)
            if value is None:
                raise AbortedError("the upload was cleared away while it was written")
            storage_id = records.UploadRecord.unpack(value).storage_id
            return b"".join(read_chunks(txn, environment.chunks, storage_id, self._seed, first, count))

    @override
    async def suspend(self, pieces: Sequence[memoryview] = (), length: int = 0) -> int:
        try:
            self._check_hold()
            self._buffer.extend(pieces)
            self._buffered += length
            await self._settle()
            if self._buffered != self._replaced_bytes:
                length = self._buffered
                self._submit_stage(await self._cut_rest(self._take(length), length), length)
                await self._settle()
                return self._staged_bytes
            return self._staged_bytes + self._buffered
        finally:
            self.release()

    async def _cut_rest(self, pieces: list[memoryview], length: int) -> list[Chunk]:  # noqa: ARG002
        """Turn into chunks what is kept for a later stream, which hashes the part chunk at its end."""
        return self._cut(pieces)

    @override
    def suspend_soon(self, pieces: Sequence[memoryview] = (), length: int = 0) -> None:
        self._ending = asyncio.create_task(suspend_quietly(self, self._digest, pieces, length))

    @override
    async def abandon(self) -> None:
        try:
            # A stage that was refused changes nothing: what was staged before it has to go all the same.
            with contextlib.suppress(LatheError):
                await self._settle()
            await self._drop()
        finally:
            self.release()

    def abandon_soon(self) -> None:
        """Do what ``abandon`` does, in the background."""
        self._active.setdefault(self._key, self)
        self._ending = asyncio.create_task(self._abandon_quietly())

    async def _abandon_quietly(self) -> None:
        try:
            await self.abandon()
        except LatheError as error:
            # It goes when its time is over, like all that nobody finished.
            _log.info("upload_not_forgotten", digest=str(self._digest), error=str(error))

    async def _drop(self) -> None:
        # Until it stages something, the stream that took the upload over goes on with a record of this one.
        if self._lost is None:
            await self._storage.writer.submit(DropUpload(self._key, (self._owner, self._takes_over)))

    async def give_up(self) -> None:
        """Lose the upload to another stream; returns when nothing more will be written for this one."""
        if self._ending is not None:
            await asyncio.shield(self._ending)
            return
        self._lost = self._lost or AbortedError("another stream took this upload over")
        try:
            await self._settle()
        except LatheError as error:
            _log.info("upload_not_kept", digest=str(self._digest), error=str(error))
        finally:
            self.release()

    def release(self) -> None:
        """Let another stream have the upload."""
        if self._active.get(self._key) is self:
            del self._active[self._key]

    def _check_hold(self) -> None:
        if self._lost is not None:
            raise self._lost

    async def _settle_hashing(self) -> None:
        if self._hashing is not None:
            await asyncio.shield(self._hashing)
            self._hashing = None

    async def _settle(self) -> None:
        """Wait until all that was handed on is durable.

        Raises:
            LatheError: Part of it was refused.
        """
        await self._settle_hashing()
        while self._stages:
            await self._settle_first_stage()

    async def _settle_first_stage(self) -> None:
        """Wait for the oldest stage; one that was refused stays, so that whoever asks is told."""
        stage = self._stages[0]
        await asyncio.shield(stage)
        # A stream that takes the upload over waits for the same stages, at the same time.
        if self._stages and self._stages[0] is stage:
            del self._stages[0]


class LmdbUnnamedUpload(UnnamedUpload):
    """An upload whose digest is known at its end; made by ``open_unnamed_lmdb_upload``.

    Args:
        upload: What it is an upload like any other to.
        expected_hash: What the hash has to be; None if any will do.
    """

    def __init__(self, upload: LmdbUpload, expected_hash: str | None) -> None:
        self._upload = upload
        self._expected_hash = expected_hash

    @override
    async def append(self, pieces: Sequence[memoryview], length: int) -> None:
        await self._upload.append(pieces, length)

    @override
    async def finish(self) -> Digest:
        # What a named upload would keep for a second try is of no use to anybody here.
        async with abandoned_on_failure(self._upload):
            return await self._upload.publish(self._expected)

    def _expected(self, found: Digest) -> Digest:
        return Digest(self._expected_hash or found.hash, found.size_bytes, found.function)

    @override
    async def abandon(self) -> None:
        await self._upload.abandon()

    @override
    def abandon_soon(self) -> None:
        self._upload.abandon_soon()


def _retrieve(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()
