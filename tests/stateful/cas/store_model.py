"""What a store should hold, in dicts: the model that the machine checks the store against.

Which data is evicted is the store's choice within bounds: only when it needs room or the data is too old, never while
it is leased, and the least recently used first, in coarse steps. So the model learns from the store what is gone, and
judges whether it may be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lathe_cas.blob_store import Upload, UploadName
from lathe_shared.digest import Digest


@dataclass
class ModelResult:
    """An action result: its bytes, what it names, whether that is all, and the step and time of its last use."""

    action_result: bytes
    references: list[Digest]
    expanded: bool
    step: int
    used_at: float


@dataclass
class ModelUpload:
    """What is known of an unfinished upload's durable bytes: between two bounds, unless it expired; perhaps wrong."""

    low_bytes: int = 0
    high_bytes: int = 0
    updated_at: int = 0
    may_be_wrong: bool = False


@dataclass
class Session:
    """A stream that holds an upload, or held it; ``written_at`` is when anything of it was written, at the earliest."""

    name: UploadName
    upload: Upload
    data: bytes = field(repr=False)
    sent_bytes: int
    written_at: int
    may_be_wrong: bool = False


@dataclass
class Model:
    """Everything at once.

    Attributes:
        lease_seconds: For how long what was used must stay.
        blobs: Touch step of each blob.
        used_at: Time of each blob's last use.
        there_until: Until when each blob was there, at the latest; if it is, when somebody looked last.
        results: By the key that the store files them under.
        uploads: Unfinished uploads.
        sessions: Streams that hold an upload.
        lost: Streams that lost theirs to another one.
        shared: Blobs that several streams have brought at the same time, since the store was opened.
        fresh: What was used since ``learn``. It stays, in whatever step the store notes that.
    """

    lease_seconds: int = 0
    used_at: dict[Digest, float] = field(default_factory=dict)
    there_until: dict[Digest, float] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    results: dict[bytes, ModelResult] = field(default_factory=dict)
    uploads: dict[UploadName, ModelUpload] = field(default_factory=dict)
    sessions: dict[UploadName, Session] = field(default_factory=dict)
    lost: list[Session] = field(default_factory=list)
    shared: set[Digest] = field(default_factory=set)
    fresh: set[Digest | bytes] = field(default_factory=set)

    def use(self, digest: Digest, step: int, now: float) -> None:
        """Note that a blob is used or put."""
        assert step >= self.blobs.get(digest, 0), "time goes on"
        self.blobs[digest] = step
        self.used_at[digest] = self.there_until[digest] = now
        self.fresh.add(digest)

    def put_result(self, key: bytes, result: ModelResult) -> None:
        self.results[key] = result
        self.fresh.add(key)

    def has(self, digest: Digest) -> bool:
        return digest.is_empty or digest in self.blobs

    def missing(self, digests: list[Digest]) -> list[Digest]:
        return [digest for digest in digests if not self.has(digest)]

    def learn(self, blobs: dict[Digest, int], results: dict[bytes, int], now_step: int, now: float) -> int:
        """Take over what the store holds; return how many things were evicted.

        Asserts that nothing appeared from nowhere, that what went was used no later than what stayed, and not within
        its lease, and that no action result was outlived by what it names.
        """
        assert blobs.keys() <= self.blobs.keys(), "a blob that nobody put"
        assert results.keys() <= self.results.keys(), "an action result that nobody put"
        self.there_until.update(dict.fromkeys(self.blobs, now))
        gone = [self.blobs[digest] for digest in self.blobs.keys() - blobs.keys()]
        gone += [self.results[key].step for key in self.results.keys() - results.keys()]
        gone_blobs = self.blobs.keys() - blobs.keys()
        for key, result in self.results.items():
            # Without a lease the blobs of a result may go to make room for it.
            if key in results and self.lease_seconds:
                assert gone_blobs.isdisjoint(result.references), "a blob went before an action result that names it"
        used = [self.used_at[digest] for digest in gone_blobs]
        used += [self.results[key].used_at for key in self.results.keys() - results.keys()]
        if used and self.lease_seconds:
            assert max(used) + self.lease_seconds <= now, "something went that was leased"
        for digest in gone_blobs:
            del self.blobs[digest]
            del self.used_at[digest]
        for key in list(self.results):
            if key not in results:
                del self.results[key]
        stayed = [step for digest, step in self.blobs.items() if digest not in self.fresh]
        stayed += [result.step for key, result in self.results.items() if key not in self.fresh]
        for digest, step in blobs.items():
            # Evicted for the first of a batch and put again by the last, it is as old as the clock says.
            if digest in self.fresh and step == now_step:
                self.blobs[digest] = now_step
        self.fresh.clear()
        if gone and stayed:
            assert max(gone) <= min(stayed), "something went that was used later than something that stayed"
        assert self.blobs == blobs, "touch steps"
        assert {key: result.step for key, result in self.results.items()} == results, "touch steps"
        return len(gone)
