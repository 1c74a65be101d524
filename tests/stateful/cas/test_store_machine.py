"""Any order of requests leaves the LMDB stores consistent, and they hold what was put and not evicted.

What is leased is never evicted, whatever the clocks do, and what is refused for want of room is refused rightly.

The stores run with chunks of a hundred bytes, so that everything that otherwise begins with megabytes (several chunks,
staging, threads, garbage, full log groups) happens with blobs of a few hundred.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.contract.cas.blob_making import blob, missing_soon, read, upload_name
from tests.contract.cas.lmdb_store import STEP_SECONDS, UPLOAD_MAX_AGE_SECONDS, LmdbStore
from tests.stateful.cas.store_model import Model, ModelResult, ModelUpload, Session
from typing_extensions import override

from lathe_cas.action_result_store import FoundActionResult, StoredActionResult
from lathe_cas.blob_store import UploadName
from lathe_cas.soon import settled
from lathe_cas.stores import (
    lmdb_access_log,
    lmdb_batch,
    lmdb_blob_store,
    lmdb_chunks,
    lmdb_committer,
    lmdb_compressed_reads,
    lmdb_compressing_upload,
    lmdb_quick_work,
    lmdb_reads,
    lmdb_records,
    lmdb_stored_form,
    lmdb_upload,
)
from lathe_cas.stores.lmdb_committer import AGE_CHECK_SECONDS, SUPERFLUOUS_AFTER_SECONDS
from lathe_shared.digest import Digest
from lathe_shared.errors import (
    AbortedError,
    BlobNotFoundError,
    DigestMismatchError,
    LatheError,
    OutOfRangeError,
    ResourceExhaustedError,
)

T = TypeVar("T")

CHUNK_BYTES = 100
LIMIT_BYTES = 9_000
BLOBS = dict(blob(size) for size in (1, 99, 100, 101, 250, 330, 800, 1_600, 1_900, 2_200, 2_500))
DIGESTS = sorted(BLOBS)
NAMES = [
    upload_name(Digest.of(blob(size)[1]), upload_id)
    for size, upload_ids in ((101, "u"), (330, "uv"), (800, "uvwx"))
    for upload_id in upload_ids
]
LEASE_SECONDS = 450
"""No multiple of a step, so that rounding counts."""
MAX_AGE_SECONDS = 3_000
FAR_AWAY_SECONDS = 40 * 365 * 86_400
ACTIONS = [("", Digest.of(b"a")), ("main", Digest.of(b"a")), ("main", Digest.of(b"b"))]
EMPTY = Digest.of(b"")

digests = st.lists(st.sampled_from([*DIGESTS, EMPTY]), min_size=1, max_size=6)
picks = st.integers(0, 999)
"""Which of the things that are there at that time a rule is about.

Threads share the work out differently each time, so the store may evict another blob in the next run of the same
requests. What is drawn must not depend on that, or Hypothesis takes the test itself for unreliable: a number is drawn,
and which blob, upload or stream that is, `picked` says when the rule runs. For the same reason no precondition asks
what is there.
"""


def picked(pick: int, things: Sequence[T]) -> T:
    return things[pick % len(things)]


def disk_bytes(size_bytes: int) -> int:
    return lmdb_records.blob_disk_bytes(size_bytes) + lmdb_records.INDEX_OVERHEAD_BYTES


class StoreMachine(RuleBasedStateMachine):
    """Clients that do anything at any time, with a clock that is set and a process that is restarted."""

    compress_stored = False

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(lmdb_records, "CHUNK_BYTES", CHUNK_BYTES)
        self.patch.setattr(lmdb_chunks, "CHUNK_BYTES", CHUNK_BYTES)
        self.patch.setattr(lmdb_upload, "STAGE_BYTES", 2 * CHUNK_BYTES)
        self.patch.setattr(lmdb_upload, "INLINE_HASH_BYTES", CHUNK_BYTES)
        for module in (lmdb_blob_store, lmdb_reads, lmdb_quick_work):
            self.patch.setattr(module, "INLINE_BYTES", 4 * CHUNK_BYTES)
        self.patch.setattr(lmdb_reads, "SEGMENT_CHUNKS", 2)
        self.patch.setattr(lmdb_blob_store, "SHARED_FROM_BYTES", 2 * CHUNK_BYTES)
        self.patch.setattr(lmdb_stored_form, "MIN_COMPRESSED_BYTES", CHUNK_BYTES)
        self.patch.setattr(lmdb_compressed_reads, "_SEGMENT_CHUNKS", 2)
        self.patch.setattr(lmdb_compressing_upload, "_GROUP_CHUNKS", 2)
        self.patch.setattr(lmdb_batch, "FREE_AT_ONCE_CHUNKS", 2)
        self.patch.setattr(lmdb_committer, "MAX_FREED_CHUNKS", 3)
        self.patch.setattr(lmdb_committer, "MAX_UPLOADS_CHECKED", 2)
        self.patch.setattr(lmdb_committer, "_LOG_SLACK_ENTRIES", 2)
        self.patch.setattr(lmdb_access_log, "MAX_GROUP_ENTRIES", 3)
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.store = LmdbStore(Path(self.folder.name) / "store", LIMIT_BYTES, compress_stored=self.compress_stored)
        self.model = Model()
        self.evicted_before = 0
        self.clock_ahead_seconds = 0.0
        self.max_age_seconds: int | None = None
        self.newest_step = 0

    # ---- plumbing

    def do(self, awaitable: Awaitable[T]) -> T:
        async def run() -> T:
            try:
                return await awaitable
            finally:
                # What an append left to a thread would be staged, and push out blobs, at any time from here on.
                for upload in list(self.store.blobs.active_uploads.values()):
                    await upload._settle_hashing()

        return self.runner.run(run())

    @property
    def now(self) -> float:
        """The time as the store should see it."""
        return self.store.now + self.clock_ahead_seconds

    @property
    def step(self) -> int:
        return int(self.now) // STEP_SECONDS

    def leased_bytes(self) -> int:
        """Bytes on disk of what the store may still have to keep: the lease, and two steps for its rounding."""
        if not self.model.lease_seconds:
            return 0
        since = self.now - self.model.lease_seconds - 2 * STEP_SECONDS
        leased = sum(
            disk_bytes(digest.size_bytes) for digest, used_at in self.model.used_at.items() if used_at >= since
        )
        return leased + sum(
            self.result_bytes(result) for result in self.model.results.values() if result.used_at >= since
        )

    @staticmethod
    def result_bytes(result: ModelResult) -> int:
        return disk_bytes(len(result.action_result) + 41 * len(result.references))

    def staged_bytes(self) -> int:
        return self.store.storage.environment.read_totals().staged_bytes

    def use(self, *used: Digest) -> None:
        for digest in used:
            if digest in self.model.blobs:
                self.model.use(digest, self.step, self.now)

    def may_be_cleared(self, digest: Digest, since: int) -> bool:
        """Whether an upload that was last written then may be gone: by age, or because its blob came by another way."""
        there_until = self.model.there_until.get(digest, 0.0)
        return self.now - since > UPLOAD_MAX_AGE_SECONDS or there_until - since >= SUPERFLUOUS_AFTER_SECONDS

    @initialize(
        lease_seconds=st.sampled_from([0, LEASE_SECONDS]), max_age_seconds=st.sampled_from([None, MAX_AGE_SECONDS])
    )
    def open(self, lease_seconds: int, max_age_seconds: int | None) -> None:
        self.model.lease_seconds = lease_seconds
        self.max_age_seconds = max_age_seconds
        self.store.set_policy(lease_seconds=lease_seconds, max_age_seconds=max_age_seconds)
        self.do(self.store.open())

    # ---- blobs

    @rule(wanted=digests, wrong=st.sets(st.integers(0, 5), max_size=1))
    def put(self, wanted: list[Digest], wrong: set[int]) -> None:
        sent = [BLOBS.get(digest, b"") + b"x" * (number in wrong) for number, digest in enumerate(wanted)]
        staged_bytes = self.staged_bytes()
        refused: list[Digest] = []
        outcomes = self.do(
            self.store.blobs.put_many([(digest, memoryview(data)) for digest, data in zip(wanted, sent, strict=True)])
        )
        for number, (digest, outcome) in enumerate(zip(wanted, outcomes, strict=True)):
            if number in wrong:
                assert isinstance(outcome, DigestMismatchError)
            elif outcome is not None:
                assert isinstance(outcome, ResourceExhaustedError)
                refused.append(digest)
            elif not digest.is_empty:
                self.model.use(digest, self.step, self.now)

        for digest in refused:
            assert staged_bytes + self.leased_bytes() + disk_bytes(digest.size_bytes) > LIMIT_BYTES

    @precondition(lambda self: self.model.lease_seconds)
    @rule(
        sent=st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=3),
        wait_seconds=st.sampled_from([0, LEASE_SECONDS, 2 * LEASE_SECONDS]),
        action=st.sampled_from(ACTIONS),
        order=st.permutations(["put", "find", "size", "result"]),
    )
    def do_at_the_same_time(
        self, sent: list[Digest], wait_seconds: int, action: tuple[str, Digest], order: list[str]
    ) -> None:
        """What is told to be there stays, whatever is put at the same time; what is told to be missing is."""
        self.store.now += wait_seconds
        blobs = self.store.blobs
        keys = [digest.key for digest in DIGESTS]
        clients: dict[str, Callable[[], Awaitable[object]]] = {
            "put": lambda: blobs.put_many([(digest, memoryview(BLOBS[digest])) for digest in sent]),
            "find": lambda: missing_soon(blobs, *DIGESTS),
            "size": lambda: settled(blobs.find_sizes(keys)),
            "result": lambda: settled(self.store.results.get(*action)),
        }

        async def all_together() -> dict[str, object]:
            return dict(zip(order, await asyncio.gather(*(clients[name]() for name in order)), strict=True))

        answers = cast("dict[str, Any]", self.do(all_together()))
        put = {digest for digest, outcome in zip(sent, answers["put"], strict=True) if outcome is None}
        sized = [digest for digest, size_bytes in zip(DIGESTS, answers["size"], strict=True) if size_bytes is not None]
        told = {*sized, *(set(DIGESTS) - set(answers["find"]))}
        stored = self.model.results.get(self.result_key(*action))
        if answers["result"] is not None:
            assert stored is not None
            assert answers["result"] == FoundActionResult(stored.action_result, stored.expanded)
            told |= {digest for digest in stored.references if not digest.is_empty}
            stored.step, stored.used_at = self.step, self.now
        count = self.do(self.store.recount())
        assert told <= count.blobs.keys(), "answered as present, and gone"
        for untold in (set(answers["find"]), set(DIGESTS) - set(sized)):
            assert (untold & count.blobs.keys()) <= put, "answered as missing, and there"
        for digest in put | told:
            self.model.use(digest, self.step, self.now)

    @rule(digest=st.sampled_from(DIGESTS), is_wrong=st.booleans())
    def put_unnamed(self, digest: Digest, is_wrong: bool) -> None:
        staged_bytes = self.staged_bytes()

        async def upload() -> Digest:
            upload = await self.store.blobs.open_unnamed_upload(digest.function, "0" * 64 if is_wrong else digest.hash)
            try:
                for start in range(0, digest.size_bytes, 170):
                    piece = memoryview(BLOBS[digest])[start : start + 170]
                    await upload.append([piece], len(piece))
            except LatheError:
                await upload.abandon()
                raise
            return await upload.finish()

        try:
            assert self.do(upload()) == digest
        except DigestMismatchError:
            assert is_wrong
        except ResourceExhaustedError:
            assert staged_bytes + self.leased_bytes() + 2 * disk_bytes(digest.size_bytes) > LIMIT_BYTES
        else:
            assert not is_wrong
            self.model.use(digest, self.step, self.now)
        # The others are for an instance that has a name.
        environment = self.store.storage.environment
        with environment.read() as txn, txn.cursor(environment.uploads) as cursor:
            left = [key for key in cursor.iternext(values=False) if key.startswith(lmdb_records.name_hash(""))]
        assert not left, "something is left of it"

    @rule(wanted=digests)
    def find_missing(self, wanted: list[Digest]) -> None:
        assert self.do(missing_soon(self.store.blobs, *wanted)) == self.model.missing(wanted)
        self.use(*wanted)

    @rule(wanted=digests)
    def read_many(self, wanted: list[Digest]) -> None:
        expected = [BLOBS.get(digest, b"") if self.model.has(digest) else None for digest in wanted]
        assert self.do(self.store.blobs.read_many(wanted)) == expected
        self.use(*wanted)

    @rule(digest=st.sampled_from([*DIGESTS, EMPTY]), offset=st.integers(0, 900), limit=st.integers(0, 900))
    def read(self, digest: Digest, offset: int, limit: int) -> None:
        try:
            data = self.do(read(self.store.blobs, digest, offset, limit))
        except BlobNotFoundError:
            assert not self.model.has(digest)
        except OutOfRangeError:
            assert self.model.has(digest)
            assert offset > digest.size_bytes
        else:
            assert self.model.has(digest)
            assert data == BLOBS.get(digest, b"")[offset : offset + limit if limit else None]
        self.use(digest)

    @rule()
    def use_everything(self) -> None:
        """As builds do, time and again: this is what fills the access log with stale entries."""
        self.store.now += STEP_SECONDS
        self.find_missing(DIGESTS)

    @rule(wanted=st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=2))
    def remove(self, wanted: list[Digest]) -> None:
        there = {digest for digest in wanted if digest in self.model.blobs}
        assert self.do(self.store.blobs.remove(wanted)) == len(there)
        for digest in there:
            self.model.there_until[digest] = self.now
            del self.model.blobs[digest]
            del self.model.used_at[digest]

    # ---- action results

    @rule(
        which=st.lists(picks, max_size=4),
        action=st.sampled_from(ACTIONS),
        dangles=st.sampled_from([False, False, True]),
        expanded=st.booleans(),
        size=st.sampled_from([0, 7, 350]),
    )
    def put_result(
        self, which: list[int], action: tuple[str, Digest], dangles: bool, expanded: bool, size: int
    ) -> None:
        among = DIGESTS if dangles else [*self.model.blobs, EMPTY]
        named = [picked(pick, among) for pick in which]
        instance_name, digest = action
        action_result = bytes(size)
        references = [(digest.key, digest.size_bytes) for digest in named]
        staged_bytes = self.staged_bytes()
        key = self.result_key(instance_name, digest)
        result = ModelResult(action_result, named, expanded, self.step, self.now)
        try:
            self.do(
                self.store.results.put(instance_name, digest, StoredActionResult(action_result, references, expanded))
            )
        except ResourceExhaustedError:
            self.use(*named)
            assert staged_bytes + self.leased_bytes() + self.result_bytes(result) > LIMIT_BYTES
        else:
            self.use(*named)
            self.model.put_result(key, result)

    @rule(action=st.sampled_from(ACTIONS))
    def get_result(self, action: tuple[str, Digest]) -> None:
        found = self.do(settled(self.store.results.get(*action)))
        stored = self.model.results.get(self.result_key(*action))
        if stored is None or self.model.missing(stored.references):
            assert found is None
        else:
            assert found == FoundActionResult(stored.action_result, stored.expanded)
            stored.step = self.step
            stored.used_at = self.now
            self.use(*stored.references)

    @rule(pick=picks)
    def get_known_result(self, pick: int) -> None:
        known = [(name, digest) for name, digest in ACTIONS if self.result_key(name, digest) in self.model.results]
        self.get_result(picked(pick, known or ACTIONS))

    @staticmethod
    def result_key(instance_name: str, digest: Digest) -> bytes:
        return lmdb_records.action_result_key(instance_name, digest.key)

    # ---- uploads

    @rule(name=st.sampled_from(NAMES), restart=st.booleans(), is_wrong=st.sampled_from([False, False, True]))
    def open_upload(self, name: UploadName, restart: bool, is_wrong: bool) -> None:
        """Begin an upload, go on with one, or take one over from a stream that still holds it."""
        previous = self.model.sessions.pop(name, None)
        known = self.model.uploads.get(name, ModelUpload())
        if previous is not None:
            self.model.lost.append(previous)
        try:
            upload = self.do(self.store.blobs.open_upload(name, restart=restart))
        except AbortedError:
            assert not restart
            assert name.digest in self.model.shared, "what others lost"
            return
        committed_bytes = upload.committed_bytes
        if restart:
            assert committed_bytes == 0
        elif not (committed_bytes == 0 and self.may_be_cleared(name.digest, known.updated_at)):
            assert known.low_bytes <= committed_bytes <= known.high_bytes
        data = BLOBS[name.digest]
        if is_wrong and committed_bytes < len(data):
            data = data[:committed_bytes] + bytes((data[committed_bytes] ^ 1,)) + data[committed_bytes + 1 :]
        wrong_before = committed_bytes > 0 and known.may_be_wrong
        written_at = known.updated_at if committed_bytes else int(self.now)
        session = Session(name, upload, data, committed_bytes, written_at, wrong_before)
        self.model.sessions[name] = session
        if len(self.sessions_of(name.digest)) > 1:
            self.model.shared.add(name.digest)

    def sessions_of(self, digest: Digest) -> list[Session]:
        return [session for session in self.model.sessions.values() if session.name.digest == digest]

    @rule(name=st.sampled_from(NAMES))
    def ask_and_resume(self, name: UploadName) -> None:
        """Who is told how much is there can go on from there, whatever others do with the same blob."""
        status = self.do(self.store.blobs.upload_status(name))
        self.use(name.digest)
        if not status.complete and status.committed_bytes:
            self.open_upload(name, restart=False, is_wrong=False)
            assert self.model.sessions[name].upload.committed_bytes >= status.committed_bytes

    @rule(pick=picks)
    def resume_upload(self, pick: int) -> None:
        begun = [name for name, known in self.model.uploads.items() if known.high_bytes]
        self.open_upload(picked(pick, begun or NAMES), restart=False, is_wrong=False)

    def session(self, pick: int) -> Session | None:
        """One of the streams that are open; none if opening one is refused when there is none."""
        if not self.model.sessions:
            self.open_upload(picked(pick, NAMES), restart=False, is_wrong=False)
        return picked(pick, list(self.model.sessions.values())) if self.model.sessions else None

    @rule(pick=picks)
    def append_the_rest_and_finish(self, pick: int) -> None:
        session = self.session(pick)
        if session is None:
            return
        self.feed(session, 3_000)
        if session.name in self.model.sessions:
            self.finish(session)

    @rule(pick=picks, size=st.sampled_from([1, 50, 100, 150, 210, 400, 3_000]))
    def append(self, pick: int, size: int) -> None:
        session = self.session(pick)
        if session is not None:
            self.feed(session, size)

    def feed(self, session: Session, size: int) -> None:
        piece = memoryview(session.data)[session.sent_bytes : session.sent_bytes + size]
        try:
            self.do(session.upload.append([piece[:7], piece[7:]], len(piece)))
        except LatheError as error:
            self.failed(session, error)
            return
        session.sent_bytes += len(piece)
        is_wrong = session.data != BLOBS[session.name.digest] or session.may_be_wrong
        # What is shared is staged under the name of one of those who share it, who may have left.
        is_shared = session.name.digest in self.model.shared
        names = [name for name in NAMES if name.digest == session.name.digest] if is_shared else [session.name]
        for name in names:
            known = self.model.uploads.setdefault(name, ModelUpload())
            # Some of it may be durable by now, all of it if the store liked; none of it if it was begun anew.
            known.low_bytes = 0
            known.high_bytes = max(known.high_bytes, session.sent_bytes)
            known.updated_at = max(known.updated_at, int(self.now))
            known.may_be_wrong |= is_wrong
        if is_shared:
            for other in self.sessions_of(session.name.digest):
                other.may_be_wrong |= is_wrong

    @rule(pick=picks, how=st.sampled_from(["finish", "finish", "suspend", "soon", "abandon"]))
    def end_upload(self, pick: int, how: str) -> None:
        session = self.session(pick)
        if session is None:
            return
        if how == "finish":
            self.finish(session)
        elif how == "abandon":
            self.do(session.upload.abandon())
            self.ended(session, 0)
        else:
            self.suspend(session, in_background=how == "soon")

    def finish(self, session: Session) -> None:
        whole = BLOBS[session.name.digest]
        is_right = session.data[: session.sent_bytes] == whole
        is_shared = session.name.digest in self.model.shared
        try:
            self.do(session.upload.finish())
        except DigestMismatchError:
            assert session.may_be_wrong or not is_right
            self.ended(session, 0)
        except LatheError as error:
            self.failed(session, error)
        else:
            # A lie that others were ahead of is not noticed; what they brought is the blob.
            assert is_right or (is_shared and session.sent_bytes == len(whole)), "a blob that is not whole"
            self.model.use(session.name.digest, self.step, self.now)
            self.ended(session, 0)

    def suspend(self, session: Session, *, in_background: bool) -> None:
        """Suspend with some more bytes, as a stream that ends does."""
        piece = memoryview(session.data)[session.sent_bytes : session.sent_bytes + 30]
        session.sent_bytes += len(piece)

        async def in_the_background() -> int:
            session.upload.suspend_soon([piece], len(piece))
            await asyncio.wait([cast("Any", session.upload)._ending])
            return -1

        try:
            kept_bytes = self.do(in_the_background() if in_background else session.upload.suspend([piece], len(piece)))
        except LatheError as error:
            self.failed(session, error)
            return
        if in_background or session.name.digest in self.model.shared:
            self.ended(session, session.sent_bytes, at_least=0)
        else:
            assert kept_bytes == session.sent_bytes
            self.ended(session, kept_bytes)

    def failed(self, session: Session, error: LatheError) -> None:
        """A stream that failed: no room, its upload was cleared away, or others have spoilt or lost what it shared."""
        if session.name.digest in self.model.shared:
            assert isinstance(error, AbortedError | ResourceExhaustedError)
        elif isinstance(error, AbortedError):
            assert self.may_be_cleared(session.name.digest, session.written_at)
        else:
            assert isinstance(error, ResourceExhaustedError)
            needed = 2 * disk_bytes(session.name.digest.size_bytes)
            assert self.staged_bytes() + self.leased_bytes() + needed > LIMIT_BYTES
        self.do(session.upload.abandon())
        self.ended(session, session.sent_bytes, at_least=0)

    def ended(self, session: Session, kept_bytes: int, at_least: int | None = None) -> None:
        del self.model.sessions[session.name]
        low_bytes = kept_bytes if at_least is None else at_least
        is_wrong = session.may_be_wrong or session.data != BLOBS[session.name.digest]
        if session.name.digest in self.model.shared:
            low_bytes, kept_bytes = 0, session.name.digest.size_bytes
        nothing_new = session.sent_bytes == session.upload.committed_bytes
        updated_at = session.written_at if nothing_new else int(self.now)
        self.model.uploads[session.name] = ModelUpload(low_bytes, kept_bytes, updated_at, is_wrong)

    @rule(pick=picks, how=st.sampled_from(["append", "finish", "suspend", "abandon"]))
    def use_lost_upload(self, pick: int, how: str) -> None:
        """A stream that lost its upload is told so, and cannot harm the one that has it."""
        if not self.model.lost:
            return
        session = self.model.lost.pop(pick % len(self.model.lost))
        if how == "abandon":
            self.do(session.upload.abandon())
            return
        attempts: dict[str, Callable[[], Awaitable[object]]] = {
            "append": lambda: session.upload.append([memoryview(b"x" * 500)], 500),
            "finish": session.upload.finish,
            "suspend": session.upload.suspend,
        }
        with pytest.raises(AbortedError):
            self.do(attempts[how]())

    @rule(name=st.sampled_from(NAMES))
    def upload_status(self, name: UploadName) -> None:
        status = self.do(self.store.blobs.upload_status(name))
        assert status.complete == self.model.has(name.digest)
        self.use(name.digest)
        known = self.model.uploads.get(name, ModelUpload())
        if status.complete:
            assert status.committed_bytes == name.digest.size_bytes
        elif not (status.committed_bytes == 0 and self.may_be_cleared(name.digest, known.updated_at)):
            assert known.low_bytes <= status.committed_bytes <= known.high_bytes

    # ---- the world

    @rule(
        seconds=st.sampled_from(
            [1, 100, STEP_SECONDS, LEASE_SECONDS - 10, 10 * STEP_SECONDS, UPLOAD_MAX_AGE_SECONDS + 200]
        )
    )
    def wait(self, seconds: int) -> None:
        self.store.now += seconds

    @rule(seconds=st.sampled_from([-FAR_AWAY_SECONDS, -700, 700, 86_400, FAR_AWAY_SECONDS]))
    def set_wall_clock(self, seconds: int) -> None:
        """Which nobody notices before the next start."""
        self.store.wall_error_seconds = max(seconds + self.store.wall_error_seconds, -FAR_AWAY_SECONDS)

    @rule()
    def restart(self) -> None:
        self.newest_step = max(self.newest_step, self.step)
        committer = self.store.storage.committer
        self.do(self.store.reopen())
        # The last transactions evict as any others do, and the counters begin anew.
        self.evicted_before -= committer.report.evicted_blobs + committer.report.evicted_action_results
        wall = self.store.wall_seconds()
        seen = [*self.model.blobs.values(), *(result.step for result in self.model.results.values())]
        now = self.store.storage.seconds()
        # What the log's newest entry, stale perhaps, says; or the wall clock if that is later.
        assert now == max(wall, self.step_of_log() * STEP_SECONDS)
        assert max(wall, max(seen, default=0) * STEP_SECONDS) <= now <= max(wall, self.newest_step * STEP_SECONDS)
        self.clock_ahead_seconds = now - self.store.now
        for session in list(self.model.sessions.values()):
            self.model.lost.append(session)
        self.model.sessions.clear()
        self.model.shared.clear()

    def step_of_log(self) -> int:
        environment = self.store.storage.environment
        with environment.read() as txn:
            return lmdb_access_log.newest_step(txn, environment.access)

    # ---- what always holds

    @invariant()
    def the_store_is_what_the_model_says(self) -> None:
        assert self.store.storage.environment.read_totals().kept_bytes <= LIMIT_BYTES, "not even for a moment"
        count = self.do(self.store.recount())
        counters = self.store.blobs.status().counters
        evicted = counters["evicted_blobs"] + counters["evicted_action_results"]
        gone = self.model.learn(count.blobs, count.action_results, self.step, self.now)
        if self.max_age_seconds is not None:
            oldest = min(
                [*self.model.used_at.values(), *(each.used_at for each in self.model.results.values())],
                default=self.now,
            )
            assert self.now - oldest < self.max_age_seconds + 2 * STEP_SECONDS + AGE_CHECK_SECONDS, "too old"
        # Of one batch, a blob may be evicted for the first and put again by the last.
        assert gone <= evicted - self.evicted_before
        self.evicted_before = evicted
        assert counters["damaged_blobs"] == counters["damaged_action_results"] == counters["failed_commits"] == 0

    @override
    def teardown(self) -> None:
        try:
            if self.store.path.exists():
                self.do(self.store.close())
        finally:
            self.runner.close()
            self.folder.cleanup()
            self.patch.undo()


class CompressingStoreMachine(StoreMachine):
    """The same with a store that compresses what is worth it."""

    compress_stored = True


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=40)
TestCompressingStoreMachine = CompressingStoreMachine.TestCase
TestCompressingStoreMachine.settings = settings(max_examples=40, stateful_step_count=40)
