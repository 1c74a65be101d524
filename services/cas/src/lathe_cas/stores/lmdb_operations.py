"""What can be asked of the writer: each operation is applied whole or not at all.

An operation checks first and changes afterwards; when it raises, it has changed nothing. What takes processor time
(hashes, checksums, cutting) was done before it came here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from typing_extensions import override

from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_ACTION_RESULT, KIND_BLOB
from lathe_cas.stores.lmdb_chunks import length_of
from lathe_shared.errors import AbortedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_cas.blob_store import UploadName
    from lathe_cas.stores.lmdb_batch import WriteBatch
    from lathe_cas.stores.lmdb_chunks import Chunk

T = TypeVar("T")

_INDEX = records.INDEX_OVERHEAD_BYTES


class Operation(ABC, Generic[T]):
    """A change to the store, applied by the writer among others in one transaction."""

    @property
    def cost_bytes(self) -> int:
        """Bytes that this operation keeps in memory until it is done."""
        return 0

    @property
    def touches(self) -> int:
        """How many blobs this operation touches beside what it is about."""
        return 0

    @property
    def order_key(self) -> bytes | None:
        """Operations with the same key are applied in the order in which they came; others may overtake each other."""
        return None

    @abstractmethod
    def apply(self, batch: WriteBatch) -> T:
        """Make the change.

        Raises:
            LatheError: It cannot be made, and nothing was changed.
            RoomNotYetError: Likewise, but it can be made later.
        """


class Nothing(Operation[None]):
    """Wait for a batch, and with it for a step of the store's own upkeep."""

    @override
    def apply(self, batch: WriteBatch) -> None:
        pass


@dataclass(slots=True)
class NewBlob:
    """A whole, verified blob, cut into chunks."""

    key: bytes
    size_bytes: int
    chunks: Sequence[Chunk]
    compression: int = records.COMPRESSION_NONE


@dataclass(slots=True)
class PutBlob(Operation[None]):
    """Store a blob."""

    blob: NewBlob

    @property
    @override
    def cost_bytes(self) -> int:
        return self.blob.size_bytes

    @override
    def apply(self, batch: WriteBatch) -> None:
        blob = self.blob
        if not batch.has_blob(blob.key, blob.size_bytes):
            batch.reserve(sum(chunk.disk_bytes for chunk in blob.chunks) + _INDEX)
            batch.add_blob(blob.key, blob.size_bytes, blob.chunks, blob.compression)


@dataclass(slots=True)
class PutUpload(Operation[None]):
    """Store a blob that came as a whole, and forget what is staged of it under the same name.

    Attributes:
        name: The upload.
        blob: What to store.
    """

    name: UploadName
    blob: NewBlob

    @property
    @override
    def cost_bytes(self) -> int:
        return self.blob.size_bytes

    @override
    def apply(self, batch: WriteBatch) -> None:
        blob = self.blob
        if not batch.has_blob(blob.key, blob.size_bytes):
            batch.reserve(sum(chunk.disk_bytes for chunk in blob.chunks) + _INDEX)
            batch.add_blob(blob.key, blob.size_bytes, blob.chunks, blob.compression)
        if batch.totals.staged_bytes:
            name = self.name
            upload_key = records.upload_key(
                name.instance_name, name.upload_id, blob.key, blob.size_bytes, name.compressor
            )
            staged = batch.upload(upload_key)
            if staged is not None:
                batch.drop_upload(upload_key, staged)


@dataclass(slots=True)
class RenewLeases(Operation[bool]):
    """Note that things are used now, durably; returns whether all of them were there.

    The action results first, so that none of them counts as used later than what it names.
    """

    action_results: Sequence[bytes]
    blobs: Sequence[bytes]

    @override
    def apply(self, batch: WriteBatch) -> bool:
        all_are_there = True
        for kind, keys in ((KIND_ACTION_RESULT, self.action_results), (KIND_BLOB, self.blobs)):
            for key in keys:
                all_are_there &= batch.touch(kind, key)
        return all_are_there


@dataclass(slots=True)
class RemoveBlobs(Operation[int]):
    """Make blobs vanish, whatever their age; returns how many were there."""

    blobs: Sequence[tuple[bytes, int]]

    @override
    def apply(self, batch: WriteBatch) -> int:
        removed = 0
        for key, size_bytes in self.blobs:
            record = batch.blob(key)
            if record is not None and record.size_bytes == size_bytes:
                batch.drop_blob(key, record)
                removed += 1
        return removed


@dataclass(slots=True)
class DropDamagedBlob(Operation[bool]):
    """Make a blob vanish whose bytes were found damaged, unless it was written anew meanwhile.

    Attributes:
        key: The blob.
        storage_id: Where its damaged bytes are.
        unreadable: Whether LMDB cannot go where they are, and so cannot delete them.
    """

    key: bytes
    storage_id: int
    unreadable: bool = False

    @override
    def apply(self, batch: WriteBatch) -> bool:
        record = batch.blob(self.key)
        if record is None or record.storage_id != self.storage_id:
            return False
        batch.drop_blob(self.key, record, keep_chunks=self.unreadable)
        return True


@dataclass(slots=True)
class StageUpload(Operation[None]):
    """Store the next chunks of an unfinished upload.

    Attributes:
        upload_key: Which upload.
        owner: The session that writes.
        takes_over: The session whose work it goes on with, as its record said; None for a new upload.
        restart: Whether what is staged is to be forgotten; only together with ``takes_over``.
        offset_bytes: Bytes committed before this operation, without a part chunk that this one replaces.
        committed_bytes: Bytes committed afterwards; what the chunks hold may be other bytes.
        replaced_bytes: Length of the part chunk that the first of ``chunks`` replaces; zero if none.
        chunks: What to write.
        now: Wall clock seconds, for clearing abandoned uploads by age.
        compression: Whether the chunks hold the client's bytes or a stream that these are decoded from.
    """

    upload_key: bytes
    owner: int
    takes_over: int | None
    restart: bool
    offset_bytes: int
    committed_bytes: int
    replaced_bytes: int
    chunks: Sequence[Chunk]
    now: int
    compression: int = records.COMPRESSION_NONE

    @property
    @override
    def cost_bytes(self) -> int:
        return length_of(self.chunks)

    @property
    @override
    def order_key(self) -> bytes:
        return self.upload_key

    @override
    def apply(self, batch: WriteBatch) -> None:
        record = self.checked_record(batch)
        batch.reserve(sum(chunk.disk_bytes for chunk in self.chunks) + _INDEX)
        self.stage(batch, record)

    def checked_record(self, batch: WriteBatch) -> records.UploadRecord | None:
        """Return the upload's record, having made sure that it is in the state that this session left it in.

        Raises:
            AbortedError: It was cleared away, or another session took it over.
        """
        record = batch.upload(self.upload_key)
        expected = self.offset_bytes + self.replaced_bytes
        if record is None:
            if expected and not self.restart:
                raise AbortedError("the upload was cleared away while it paused; begin it again")
        elif record.owner not in (self.owner, self.takes_over):
            raise AbortedError("another stream took this upload over; ask QueryWriteStatus where to go on")
        elif not self.restart and record.committed_bytes != expected:
            raise AbortedError(
                f"the upload has {record.committed_bytes} bytes where this stream left {expected}; ask QueryWriteStatus"
            )
        return record

    def stage(self, batch: WriteBatch, record: records.UploadRecord | None) -> records.UploadRecord:
        """Write the chunks and the upload's new record. Room is reserved already."""
        if record is not None and self.restart:
            batch.drop_upload(self.upload_key, record)
            record = None
        replaced = 1 if self.replaced_bytes else 0
        first_number = (record.chunks if record else 0) - replaced
        storage_id = batch.new_storage_id() if record is None else record.storage_id
        if replaced:
            batch.unstage_chunk(storage_id, first_number)
        batch.stage_chunks(storage_id, first_number, self.chunks, newest=record is None)
        disk_bytes = sum(chunk.disk_bytes for chunk in self.chunks) - (
            records.chunk_disk_bytes(self.replaced_bytes) if replaced else 0
        )
        new = records.UploadRecord(
            storage_id,
            self.committed_bytes,
            disk_bytes + (record.disk_bytes if record else 0),
            first_number + len(self.chunks),
            self.owner,
            self.now,
            length_of(self.chunks) - self.replaced_bytes + (record.stored_bytes if record else 0),
            self.compression,
        )
        batch.put_upload(self.upload_key, record, new)
        return new


@dataclass(slots=True)
class PublishUpload(Operation[None]):
    """Turn an upload whose bytes were verified into a blob.

    Attributes:
        key: The blob.
        size_bytes: Its size.
        last: What is not staged yet; its ``committed_bytes`` is the blob's size.
    """

    key: bytes
    size_bytes: int
    last: StageUpload

    @property
    @override
    def cost_bytes(self) -> int:
        return self.last.cost_bytes

    @property
    @override
    def order_key(self) -> bytes:
        return self.last.upload_key

    @override
    def apply(self, batch: WriteBatch) -> None:
        record = self.last.checked_record(batch)
        if batch.has_blob(self.key, self.size_bytes):
            if record is not None:
                batch.drop_upload(self.last.upload_key, record)
            return
        batch.reserve(sum(chunk.disk_bytes for chunk in self.last.chunks) + _INDEX)
        if record is None:
            batch.add_blob(self.key, self.size_bytes, self.last.chunks, self.last.compression)
            return
        if self.last.chunks or self.last.restart:
            record = self.last.stage(batch, record)
        batch.publish_upload(self.key, self.size_bytes, self.last.upload_key, record)


@dataclass(slots=True)
class DropUpload(Operation[None]):
    """Forget an upload, if it still belongs to one of these sessions."""

    upload_key: bytes
    owners: tuple[int | None, ...]

    @property
    @override
    def order_key(self) -> bytes:
        return self.upload_key

    @override
    def apply(self, batch: WriteBatch) -> None:
        record = batch.upload(self.upload_key)
        if record is not None and record.owner in self.owners:
            batch.drop_upload(self.upload_key, record)


@dataclass(slots=True)
class PutActionResult(Operation[bool]):
    """Store an action result in place of what was there, and touch what it names so that it does not go first.

    Returns whether it is stored.

    Attributes:
        key: The action result.
        payload_bytes: Length of its payload.
        chunks: The payload.
        blobs: What it names, as far as that is known.
        references: How many of them the payload begins with.
        flags: Of its record.
        only_in_step: The touch step in which it may be stored, since what it names was touched before; None for any.
    """

    key: bytes
    payload_bytes: int
    chunks: Sequence[Chunk]
    blobs: Sequence[bytes]
    references: int
    flags: int = field(default=0)
    only_in_step: int | None = None

    @property
    @override
    def cost_bytes(self) -> int:
        return self.payload_bytes

    @property
    @override
    def touches(self) -> int:
        return len(self.blobs)

    @override
    def apply(self, batch: WriteBatch) -> bool:
        if self.only_in_step not in (None, batch.step):
            return False
        for key in self.blobs:
            batch.touch(KIND_BLOB, key)
        batch.reserve(sum(chunk.disk_bytes for chunk in self.chunks) + _INDEX)
        batch.put_action_result(self.key, self.payload_bytes, self.chunks, self.references, self.flags)
        return True


@dataclass(slots=True)
class DropDamagedActionResult(Operation[bool]):
    """Make an action result vanish whose bytes were found damaged, unless it was written anew meanwhile.

    The attributes are those of ``DropDamagedBlob``.
    """

    key: bytes
    storage_id: int
    unreadable: bool = False

    @override
    def apply(self, batch: WriteBatch) -> bool:
        record = batch.action_result(self.key)
        if record is None or record.storage_id != self.storage_id:
            return False
        batch.drop_action_result(self.key, record, keep_chunks=self.unreadable)
        return True
