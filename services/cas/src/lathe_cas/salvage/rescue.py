"""Who owns which chunks, and whether all of them are there: what is whole goes into the new store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lathe_cas.compression.zstd_decoder import ZstdDecoder
from lathe_cas.compression.zstd_framing import MalformedZstdError
from lathe_cas.fsck.entries import describe_record
from lathe_cas.fsck.findings import MAX_EXAMPLES
from lathe_cas.salvage.entries import by_storage_id
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.access_touches import KIND_BLOB
from lathe_cas.stores.lmdb_chunks import blob_seed, checksum, chunk_seed
from lathe_shared.digest import DigestFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lathe_cas.fsck.external_sort import ExternalSort
    from lathe_cas.fsck.progress import Progress
    from lathe_cas.salvage.entries import Owner, StorageItems
    from lathe_cas.salvage.new_store import NewStore
    from lathe_cas.salvage.page_file import PageFile

_NEVER_REACHED = 1 << 63
"""No size of a blob comes here: a number beyond it is damage."""


class _NotWholeError(Exception):
    """Some of the bytes are not there, or are not what was written; the text says how far they are."""


@dataclass(slots=True)
class Losses:
    """What records say that there was, and what is not whole.

    Attributes:
        blobs: How many blobs.
        blob_bytes: Their bytes, as their records have them.
        action_results: How many action results.
        examples: The first few, in words.
    """

    blobs: int = 0
    blob_bytes: int = 0
    action_results: int = 0
    examples: list[str] = field(default_factory=list)


class Rescue:
    """Copies what is whole. Nothing else counts: not where a record was found, nor what else it says.

    Args:
        file: The old store's file.
        store: The new one.
        last_step: The last touch step that can be right; a record that says a later one is damaged.
        lost: Where to write down what is not whole.
        progress: Where to show how far it is.
    """

    def __init__(self, file: PageFile, store: NewStore, last_step: int, lost: ExternalSort, progress: Progress) -> None:
        self._file = file
        self._store = store
        self._last_step = last_step
        self._lost = lost
        self._progress = progress

    def run(self, items: Iterator[bytes]) -> Losses:
        """Copy all that is whole, in the order of storage ids, which is that in which it was written.

        Args:
            items: What ``Found`` wrote down, in order.

        Returns:
            What is not there of what records were found for.
        """
        for group in by_storage_id(items):
            for owner in group.owners:
                self._save(owner, group)
            self._progress.step(group.chunk_count)
        return self._losses()

    def _save(self, owner: Owner, items: StorageItems) -> None:
        step = min(owner.step, self._last_step)
        # The same blob under another storage id is the same; of action results the one that was written last is true.
        if owner.kind == KIND_BLOB and self._store.has(KIND_BLOB, owner.key):
            self._store.touch_blob(owner.key, step)
            return
        self._store.begin()
        try:
            if owner.kind == KIND_BLOB:
                self._save_blob(owner, step, items)
            else:
                self._save_action_result(owner, step, items)
        except _NotWholeError as error:
            self._store.abandon()
            size_bytes = records.BlobRecord.unpack(owner.value).size_bytes if owner.kind == KIND_BLOB else 0
            size_bytes = size_bytes if size_bytes < _NEVER_REACHED else 0
            self._lost.add(
                bytes((owner.kind, len(owner.key))) + owner.key + records.SIZE.pack(size_bytes) + str(error).encode()
            )

    def _save_blob(self, owner: Owner, step: int, items: StorageItems) -> None:
        record = records.BlobRecord.unpack(owner.value)
        key, size_bytes, compression = owner.key, record.size_bytes, record.compression
        is_known = compression in (records.COMPRESSION_NONE, records.COMPRESSION_ZSTD) and not record.layout
        if not (is_known and size_bytes and (compression or records.chunk_count(size_bytes) == record.chunks)):
            raise _NotWholeError("its record makes no sense")
        lengths = None if compression else _plain_lengths(size_bytes)
        chunks = self._chunks(items, blob_seed(key, compression), record.chunks, lengths)
        hasher = DigestFunction(key[0]).new_hasher()
        for piece in _decoded(chunks, size_bytes) if compression else chunks:
            hasher.update(piece)
        if hasher.hexdigest() != key[1:].hex():
            raise _NotWholeError("its bytes do not match its digest")
        self._store.index_blob(key, size_bytes, step, compression)

    def _save_action_result(self, owner: Owner, step: int, items: StorageItems) -> None:
        record = records.ActionResultRecord.unpack(owner.value)
        payload_bytes = record.payload_bytes
        # An ActionResult of no bytes has no checksum. Its record has no place for damage either: all of it is known.
        is_known = payload_bytes or (record.references, record.disk_bytes) == (0, records.INDEX_OVERHEAD_BYTES)
        if not is_known or records.chunk_count(payload_bytes) != record.chunks:
            raise _NotWholeError("its record makes no sense")
        seed = chunk_seed(record.identity(owner.key))
        for _ in self._chunks(items, seed, record.chunks, _plain_lengths(payload_bytes)):
            pass
        self._store.index_action_result(owner.key, step, record.references, record.flags)

    def _chunks(
        self, items: StorageItems, seed: int, count: int, length_of: Callable[[int], int] | None
    ) -> Iterator[bytes]:
        """Give the chunks of an owner, each verified and put into the new store.

        Raises:
            _NotWholeError: The next one is not there.
        """
        wanted = 0
        for number, digest, place, length in items.places():
            if wanted == count or number > wanted:
                break
            # Of several with one number some may be old, such as the part chunk that an upload began with.
            if number < wanted or (length_of is not None and length_of(number) != length):
                continue
            data = self._file.read(place, length)
            if len(data) == length and checksum(data, seed, number) == digest:
                self._store.put(data, digest)
                wanted += 1
                yield data
        if wanted != count:
            raise _NotWholeError(f"{wanted} of {count} chunks are whole")

    def _losses(self) -> Losses:
        losses = Losses()
        last = b""
        for item in self._lost.sorted():
            kind, key_bytes = item[0], item[1]
            key, rest = item[2 : 2 + key_bytes], item[2 + key_bytes :]
            if item[: 2 + key_bytes] == last or self._store.has(kind, key):
                continue
            last = item[: 2 + key_bytes]
            if kind == KIND_BLOB:
                losses.blobs += 1
                losses.blob_bytes += int.from_bytes(rest[:8], "big")
            else:
                losses.action_results += 1
            if len(losses.examples) < MAX_EXAMPLES:
                losses.examples.append(f"{describe_record(kind, key)}: {rest[8:].decode()}")
        return losses


def _plain_lengths(size_bytes: int) -> Callable[[int], int]:
    """Return what says how long the chunk of a number is."""
    last = records.chunk_count(size_bytes) - 1

    def length_of(number: int) -> int:
        return records.CHUNK_BYTES if number < last else size_bytes - last * records.CHUNK_BYTES

    return length_of


def _decoded(chunks: Iterator[bytes], size_bytes: int) -> Iterator[bytes]:
    decoder = ZstdDecoder(size_bytes, is_verified=True)
    try:
        for chunk in chunks:
            yield from decoder.decode(chunk)
        decoder.finish()
    except MalformedZstdError as error:
        raise _NotWholeError(str(error)) from None
