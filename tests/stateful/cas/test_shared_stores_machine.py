"""Clients that do several things at the same time, stores on several disks, and another process at work in them.

What one of them is told holds for all: what is said to be there is there, and stays for its lease, whoever makes room;
what is said to be missing is; an action result that is returned is complete. The machine judges every round by what the
stores then hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.contract.cas.blob_making import blob, feed, missing_soon, upload_name
from tests.contract.cas.lmdb_store import STEP_SECONDS
from tests.contract.cas.recount import recount
from tests.contract.cas.sharded_store import SHARDS, ShardedStore
from typing_extensions import override

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.blob_store import BlobStore
from lathe_cas.soon import settled
from lathe_cas.stores import lmdb_records
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_chunks import chunk_seed, cut
from lathe_cas.stores.lmdb_committer import LmdbCommitter, Outcome
from lathe_cas.stores.lmdb_operations import NewBlob, PutBlob
from lathe_shared.digest import Digest
from lathe_shared.errors import BlobNotFoundError, LatheError, ResourceExhaustedError

LEASE_SECONDS = 1_000
"""No multiple of a step, and longer than two: some leases are renewed durably, and others are not."""
LIMIT_BYTES = 400_000
"""Of one disk: three or four of the largest blobs."""
BLOBS = dict(blob(size, seed) for size in (50, 5_000, 70_000, 130_000) for seed in range(6))
DIGESTS = sorted(BLOBS)
ACTIONS = [Digest.of(name) for name in (b"a", b"b", b"c")]
LARGE = [digest for digest in DIGESTS if digest.size_bytes > 65_520]

some_digests = st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=5, unique=True)


@dataclass
class Round:
    """What was done at the same time, and what was answered.

    Attributes:
        put: What was acknowledged.
        tried: What somebody tried to put, with or without success.
        there: What was said to be there.
        missing: What was said to be missing.
        results: Action results that were stored, by action; several for one may race.
    """

    put: set[Digest] = field(default_factory=set)
    tried: set[Digest] = field(default_factory=set)
    there: set[Digest] = field(default_factory=set)
    missing: set[Digest] = field(default_factory=set)
    results: dict[Digest, list[tuple[bytes, list[Digest]]]] = field(default_factory=dict)


class SharedStoresMachine(RuleBasedStateMachine):
    """Rounds of several clients each, between which time passes and the service is restarted."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.store = ShardedStore(Path(self.folder.name), lease_seconds=LEASE_SECONDS)
        self.used_at: dict[Digest, float] = {}
        self.results: dict[Digest, list[tuple[bytes, list[Digest]]]] = {}
        self.held: dict[Digest, int] = {}
        self.serial = 0

    @property
    def now(self) -> float:
        return self.store.shards[0].now

    @initialize()
    def open(self) -> None:
        for shard in self.store.shards:
            shard.set_policy(limit_bytes=LIMIT_BYTES)
        self.runner.run(self.store.open())

    # ---- what clients do

    async def put(self, round_: Round, digests: list[Digest]) -> None:
        round_.tried.update(digests)
        outcomes = await self.store.blobs.put_many([(digest, memoryview(BLOBS[digest])) for digest in digests])
        for digest, outcome in zip(digests, outcomes, strict=True):
            self.note_put(round_, digest, outcome)

    async def upload(self, round_: Round, digest: Digest, name: str) -> None:
        round_.tried.add(digest)
        blobs: BlobStore = self.store.blobs
        try:
            upload = await blobs.open_upload(upload_name(digest, name), restart=True)
            try:
                await feed(upload, BLOBS[digest], 40_000)
            except LatheError:
                await upload.abandon()
                raise
            await upload.finish()
        except ResourceExhaustedError as error:
            self.note_put(round_, digest, error)
        else:
            self.note_put(round_, digest, None)

    async def put_elsewhere(self, round_: Round, digests: list[Digest]) -> None:
        """Put blobs as another process does, which knows nothing of what this one has in memory."""
        round_.tried.update(digests)
        for digest in digests:
            shard = self.store.shards[self.store.shard_map.place(digest.key)]
            storage = shard.storage
            touches = Touches(storage.step)
            committer = LmdbCommitter(storage.environment, shard.options.policy, touches, storage.seconds, 86_400)
            new = NewBlob(digest.key, digest.size_bytes, cut(BLOBS[digest], chunk_seed(digest.key)))
            outcome = Outcome(None, is_put_off=True)
            while outcome.is_put_off:
                (outcome,) = await asyncio.to_thread(committer.commit, [PutBlob(new)])
            self.note_put(round_, digest, outcome.error)

    @staticmethod
    def note_put(round_: Round, digest: Digest, error: BaseException | None) -> None:
        if error is None:
            round_.put.add(digest)
        else:
            assert isinstance(error, ResourceExhaustedError)

    async def find(self, round_: Round, digests: list[Digest]) -> None:
        missing = set(await missing_soon(self.store.blobs, *digests))
        round_.missing |= missing
        round_.there |= set(digests) - missing

    async def size(self, round_: Round, digests: list[Digest]) -> None:
        sizes = await settled(self.store.blobs.find_sizes([digest.key for digest in digests]))
        for digest, size_bytes in zip(digests, sizes, strict=True):
            assert size_bytes in {None, digest.size_bytes}
            (round_.missing if size_bytes is None else round_.there).add(digest)

    async def read(self, round_: Round, digests: list[Digest]) -> None:
        for digest, data in zip(digests, await self.store.blobs.read_many(digests), strict=True):
            assert data in {None, BLOBS[digest]}
            if data is None:
                round_.missing.add(digest)

    async def stream(self, round_: Round, digest: Digest) -> None:
        try:
            pieces = [piece async for piece in self.store.blobs.read(digest)]
        except BlobNotFoundError:
            round_.missing.add(digest)
        else:
            assert b"".join(pieces) == BLOBS[digest]

    async def put_result(self, round_: Round, action: Digest, references: list[Digest]) -> None:
        self.serial += 1
        payload = b"result %d" % self.serial
        stored = StoredActionResult(payload, [(digest.key, digest.size_bytes) for digest in references])
        round_.results.setdefault(action, []).append((payload, references))
        with contextlib.suppress(ResourceExhaustedError):
            await self.store.results.put("main", action, stored)

    async def get_result(self, round_: Round, action: Digest) -> None:
        found = await settled(self.store.results.get("main", action))
        if found is None:
            return
        known = dict((*self.results.get(action, []), *round_.results.get(action, [])))
        assert found.action_result in known, "a result that nobody put"
        round_.there.update(known[found.action_result])

    # ---- rounds

    @rule(
        data=st.data(),
        kinds=st.lists(
            st.sampled_from(
                ["put", "upload", "elsewhere", "find", "find", "size", "read", "stream", "put_result", "get_result"]
            ),
            min_size=1,
            max_size=6,
        ),
    )
    def at_the_same_time(self, data: st.DataObject, kinds: list[str]) -> None:
        round_ = Round()
        draw = data.draw
        # Drawn before anything begins: a draw may end the example.
        chosen: dict[str, Callable[[], Callable[[], Awaitable[None]]]] = {
            "put": lambda: partial(self.put, round_, draw(some_digests)),
            "upload": lambda: partial(self.upload, round_, draw(st.sampled_from(LARGE)), draw(st.sampled_from("uv"))),
            "elsewhere": lambda: partial(self.put_elsewhere, round_, draw(some_digests)),
            "find": lambda: partial(self.find, round_, draw(some_digests)),
            "size": lambda: partial(self.size, round_, draw(some_digests)),
            "read": lambda: partial(self.read, round_, draw(some_digests)),
            "stream": lambda: partial(self.stream, round_, draw(st.sampled_from(DIGESTS))),
            "put_result": lambda: partial(self.put_result, round_, draw(st.sampled_from(ACTIONS)), draw(some_digests)),
            "get_result": lambda: partial(self.get_result, round_, draw(st.sampled_from(ACTIONS))),
        }
        begin = [chosen[kind]() for kind in kinds]

        async def run() -> None:
            await asyncio.gather(*[each() for each in begin])

        self.runner.run(run())
        before = set(self.held)
        self.look()
        held = set(self.held)
        assert round_.put | round_.there <= held, "said to be there, and gone"
        assert round_.missing & before & held <= round_.tried, "said to be missing, and there all the time"
        assert held - before <= round_.tried, "nobody put it"
        for digest in round_.put | round_.there:
            self.used_at[digest] = self.now
        for action, results in round_.results.items():
            self.results.setdefault(action, []).extend(results)

    def look(self) -> None:
        """Count what the stores hold, after what goes on in the background."""
        self.held = {}
        for shard in self.store.shards:
            count = self.runner.run(shard.recount())
            self.held |= count.blobs

    @rule(seconds=st.sampled_from([1, STEP_SECONDS, LEASE_SECONDS - 400, LEASE_SECONDS, 3 * LEASE_SECONDS]))
    def wait(self, seconds: int) -> None:
        for shard in self.store.shards:
            shard.now += seconds

    @rule()
    def restart(self) -> None:
        self.runner.run(self.store.reopen())

    @invariant()
    def what_is_leased_is_there(self) -> None:
        if not hasattr(self.store, "blobs"):
            return
        leased = {digest for digest, used_at in self.used_at.items() if used_at > self.now - LEASE_SECONDS}
        assert leased <= self.held.keys()
        for shard in self.store.shards:
            count = recount(shard.storage.environment)
            assert count.totals.kept_bytes <= LIMIT_BYTES
            counters = shard.blobs.status().counters
            assert counters["damaged_blobs"] == counters["failed_commits"] == 0

    @override
    def teardown(self) -> None:
        try:
            if hasattr(self.store, "blobs"):
                self.runner.run(self.store.close())
        finally:
            self.runner.close()
            self.folder.cleanup()


assert sum(lmdb_records.blob_disk_bytes(digest.size_bytes) for digest in DIGESTS) > SHARDS * LIMIT_BYTES, "they evict"

TestSharedStoresMachine = SharedStoresMachine.TestCase
TestSharedStoresMachine.settings = settings(max_examples=60, stateful_step_count=25)
