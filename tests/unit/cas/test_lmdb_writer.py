"""The order in which the writer brings operations to the committer, when some of them are put off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import pytest
from typing_extensions import override

from lathe_cas.stores import lmdb_writer
from lathe_cas.stores.access_touches import Touches
from lathe_cas.stores.lmdb_committer import LmdbCommitter, Outcome
from lathe_cas.stores.lmdb_operations import Operation
from lathe_cas.stores.lmdb_writer import LmdbWriter
from lathe_shared.errors import ResourceExhaustedError

if TYPE_CHECKING:
    from lathe_cas.stores.lmdb_batch import WriteBatch


class Named(Operation[None]):
    """An operation of one byte, or of as many as fill a batch if its name has capitals; the first letter orders."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @override
    def cost_bytes(self) -> int:
        return 10 if self.name.isupper() else 1

    @property
    @override
    def order_key(self) -> bytes:
        return self.name[:1].lower().encode()

    @override
    def apply(self, batch: WriteBatch) -> None:
        raise NotImplementedError


class PutsOff:
    """A committer that holds the first batch until it is told to go on, and puts large operations off for a while."""

    has_pressing_upkeep = False
    is_given_up = False
    has_upkeep = False

    def __init__(self, rounds: int) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.batches: list[str] = []
        self._rounds = rounds

    def commit(self, operations: Sequence[Operation[Any]]) -> list[Outcome]:
        self.began.set()
        self.go_on.wait(30)
        names = [operation.name for operation in operations if isinstance(operation, Named)]
        self.batches.append(" ".join(names))
        puts_off = len(self.batches) <= self._rounds
        return [Outcome(None, is_put_off=puts_off and name.isupper()) for name in names]


async def batches_of(names: str, rounds: int) -> list[str]:
    """Return what comes to the committer in each batch."""
    committer = PutsOff(rounds)
    writer = LmdbWriter(cast(LmdbCommitter, committer), Touches(lambda: 1))
    futures = [writer.submit_nowait(Named("first"))]
    await asyncio.to_thread(committer.began.wait, 30)
    futures += [writer.submit_nowait(Named(name)) for name in names.split()]
    committer.go_on.set()
    await asyncio.gather(*futures)
    await writer.aclose()
    return committer.batches[1:]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_writer, "MAX_BATCH_BYTES", 10)


async def test_without_delays_operations_come_in_their_order() -> None:
    batches = await batches_of("A1 b1 B2 c1 C2 d1", 0)
    assert " ".join(batches) == "A1 b1 B2 c1 C2 d1"


async def test_what_is_put_off_comes_again_beside_what_comes_later() -> None:
    batches = await batches_of("A1 B1 c1 c2 D1 d2 e1", 6)
    assert batches[:3] == ["A1", "A1 B1", "A1 c1 c2 D1"]
    # What waits does not fill a batch. d2 has to come after D1, which is not in this one; e1 has not.
    assert batches[3:5] == ["A1 e1", "A1"]
    assert batches[5:] == ["A1", "D1", "B1", "d2"]


async def test_the_writer_ends_when_what_was_put_off_is_done() -> None:
    committer = PutsOff(5)
    writer = LmdbWriter(cast(LmdbCommitter, committer), Touches(lambda: 1))
    future = writer.submit_nowait(Named("A1"))
    closing = asyncio.create_task(writer.aclose())
    await asyncio.sleep(0)
    committer.go_on.set()
    await asyncio.wait_for(closing, 30)
    await future
    assert committer.batches == ["A1"] * 6


class Refuses(PutsOff):
    """A committer that can do nothing."""

    @override
    def commit(self, operations: Sequence[Operation[Any]]) -> list[Outcome]:
        return [Outcome(None, ResourceExhaustedError("full")) for _ in operations]


async def test_who_no_longer_waits_for_several_operations_leaves_no_errors_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cancelled in the moment in which the outcomes are there and not yet taken: asyncio would log each of them."""
    writer = LmdbWriter(cast(LmdbCommitter, Refuses(0)), Touches(lambda: 1))
    submit_together = writer._submit_together

    def submit(operations: Sequence[Operation[None]]) -> list[asyncio.Future[None]]:
        futures.extend(submit_together(operations))
        futures[0].add_done_callback(lambda _: waiting.cancel())
        return futures

    futures: list[asyncio.Future[None]] = []
    monkeypatch.setattr(writer, "_submit_together", submit)
    waiting = asyncio.create_task(writer.submit_each([Named("a"), Named("b"), Named("c")]))
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    await writer.aclose()
    assert [future._log_traceback for future in futures] == [False] * 3
