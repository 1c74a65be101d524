"""Group commit without threads: operations in, one transaction, outcomes out.

Every batch does a bounded piece of the store's upkeep beside the operations: touches are written, the least recently
used goes when the high watermark is passed or its time is over, garbage is freed, abandoned uploads are cleared, the
access log is swept.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import lmdb
import structlog

from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_batch import BatchReport, RoomNotYetError, WaitingWrite, WriteBatch
from lathe_cas.stores.lmdb_environment import PAGE_ERRORS
from lathe_cas.stores.lmdb_eviction import EvictionEffort, evict, sweep_log
from lathe_shared.errors import LatheError, ResourceExhaustedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lathe_cas.eviction_policy import EvictionPolicy
    from lathe_cas.stores.access_touches import Touches
    from lathe_cas.stores.lmdb_environment import LmdbEnvironment
    from lathe_cas.stores.lmdb_operations import Operation

# The upkeep of one batch is cut so that it adds little: some two microseconds per touched record, two to five per freed
# chunk, twenty for what is evicted.
MAX_TOUCHES = 2048
MAX_EVICTED_BYTES = 32 << 20
MAX_EVICTED_ENTRIES = 1024
MAX_FREED_CHUNKS = 512
MAX_SWEPT_GROUPS = 4
MAX_UPLOADS_CHECKED = 256

UPLOAD_CHECK_SECONDS = 60
"""How often abandoned uploads are looked for."""

SUPERFLUOUS_AFTER_SECONDS = 600
"""When an upload whose blob is there is forgotten, since nobody can need it: longer than streams may pause, so that one
which goes on finds out by itself."""

AGE_CHECK_SECONDS = 60
"""How often the store looks whether something has become too old."""

READER_CHECK_SECONDS = 60
"""How often the snapshots of readers that died are released."""

_LOG_SLACK_ENTRIES = 4096

_BUGS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, struct.error)
"""What a bug raises, and damage to an index that nobody thought of."""

_SHORT_WRITE = os.strerror(errno.EIO)
_SHORT_WRITE_BYTES = 64 << 20
"""No write of one transaction asks for more than this, so one that ended early left less."""

_FULL = (os.strerror(errno.EDQUOT), os.strerror(errno.EFBIG))
"""Limits of the user or of the process. LMDB's binding has no type for them, and no number."""

_log = structlog.get_logger(__name__)


class Outcome(NamedTuple):
    """What became of an operation: its result, or the error that kept it from happening.

    Or nothing yet: it is put off, to be done in the next transaction before all that came later, because room has to
    be made for it.
    """

    result: Any
    error: BaseException | None = None
    is_put_off: bool = False


_PUT_OFF = Outcome(None, is_put_off=True)


class _OperationFailedError(Exception):
    """An operation raised after it had begun to change things: the whole transaction must go."""

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__(f"operation {index}: {error}")
        self.index = index
        self.error = error


class _UpkeepFailedError(Exception):
    """The upkeep of a batch came upon something that makes no sense: the batch must do without."""


class LmdbCommitter:
    """Applies operations in transactions. Not thread-safe: one thread at a time.

    Args:
        environment: The store.
        policy: The size limit.
        touches: What was used since the last batch.
        seconds: The store's clock, for the age of unfinished uploads and for what is done every so often.
        upload_max_age_seconds: Unfinished uploads that got nothing for so long are cleared.

    Attributes:
        is_given_up: Whether LMDB does nothing more with the environment, not even read, since it could not write the
            page that says which transaction was the last one. What was committed is there for another process.
    """

    def __init__(
        self,
        environment: LmdbEnvironment,
        policy: EvictionPolicy,
        touches: Touches,
        seconds: Callable[[], float],
        upload_max_age_seconds: int,
    ) -> None:
        self.report = BatchReport()
        self.commits = 0
        self.failed_commits = 0
        self.is_given_up = False
        self._environment = environment
        self._policy = policy
        self._touches = touches
        self._seconds = seconds
        self._upload_max_age_seconds = upload_max_age_seconds
        self._upkeep_failed = False
        self._waiting: WaitingWrite | None = None
        self._evicting = False
        self._ageing = False
        self._next_age_check = 0.0
        self._sweep_after = b""
        self._sweeping = False
        self._garbage_left = False
        self._upload_after = b""
        self._next_upload_check = 0.0
        self._next_reader_check = 0.0

    def commit(self, operations: Sequence[Operation[Any]]) -> list[Outcome]:
        """Apply operations in one transaction, durable when this returns.

        An operation that fails fails alone. When the transaction fails as a whole (disk full, map full), it is
        tried again in halves, so that one which needs too much does not take the others with it. One for which room
        has to be made may be put off: the caller brings it again, with the next ones and before them.

        Returns:
            One outcome per operation, in order.
        """
        self._check_readers()
        return self._commit(operations, upkeep=True)

    def _commit(self, operations: Sequence[Operation[Any]], *, upkeep: bool) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        pending = list(range(len(operations)))
        while len(outcomes) < len(operations) or upkeep:
            chosen = [operations[index] for index in pending]
            try:
                results = self._commit_once(chosen, upkeep=upkeep)
            except _OperationFailedError as failure:
                outcomes[pending.pop(failure.index)] = Outcome(None, failure.error)
                continue
            except (lmdb.Error, _UpkeepFailedError) as error:
                results = self._after_failure(chosen, error, upkeep=upkeep)
            outcomes.update(zip(pending, results, strict=True))
            break
        return [outcomes[index] for index in range(len(operations))]

    def _after_failure(self, operations: Sequence[Operation[Any]], error: Exception, *, upkeep: bool) -> list[Outcome]:
        """Try again what failed as a whole: first without upkeep, then in halves, down to single operations."""
        self.failed_commits += 1
        self.is_given_up |= isinstance(error, lmdb.PanicError)
        _log.warning("commit_failed", error=str(error), operations=len(operations))
        if upkeep:
            # Not pressing any more, or a full disk would have the writer's thread try again without a pause.
            self._evicting = self._ageing = self._sweeping = self._garbage_left = False
            self._upkeep_failed = True
            return self._commit(operations, upkeep=False)
        if len(operations) == 1:
            return [Outcome(None, to_lathe_error(error, self._environment.free_bytes()))]
        middle = len(operations) // 2
        return self._commit(operations[:middle], upkeep=False) + self._commit(operations[middle:], upkeep=False)

    def _commit_once(self, operations: Sequence[Operation[Any]], *, upkeep: bool) -> list[Outcome]:
        touches = self._touches
        taken = touches.take(MAX_TOUCHES) if upkeep else []
        environment = self._environment
        try:
            with environment.env.begin(write=True) as txn:
                batch = WriteBatch(environment, txn, touches.step(), self._policy, self._waiting)
                for kind, key in taken:
                    batch.touch(kind, key)
                outcomes = _apply_all(operations, batch)
                if upkeep:
                    try:
                        self._keep_up(batch)
                    except _BUGS as error:
                        raise _UpkeepFailedError(f"upkeep: {error!r}") from error
                batch.finish()
        except BaseException as error:
            # Lost if LMDB cannot go somewhere: one of them may lead there, and would keep all upkeep from happening.
            if not isinstance(error, PAGE_ERRORS):
                touches.give_back(taken)
            raise
        self.commits += 1
        self._upkeep_failed &= not upkeep
        self._waiting = batch.waiting
        self.report.add(batch.report)
        return outcomes

    # Upkeep

    @property
    def has_pressing_upkeep(self) -> bool:
        """Whether upkeep was begun that should go on at once, whether or not operations come."""
        return (
            self._evicting
            or self._ageing
            or self._sweeping
            or self._garbage_left
            or (len(self._touches) >= MAX_TOUCHES and not self._upkeep_failed)
        )

    @property
    def has_upkeep(self) -> bool:
        """Whether a batch without operations would have something to do."""
        return (
            self.has_pressing_upkeep
            or bool(self._touches)
            or bool(self._upload_after)
            or self._seconds() >= self._next_upload_check
            or self._is_age_check_due()
        )

    def _keep_up(self, batch: WriteBatch) -> None:
        totals = batch.totals
        excess = self._policy.excess_in_background(totals.kept_bytes, evicting=self._evicting)
        if excess:
            entries = totals.log_entries
            # What was evicted for writes in this batch is part of the same work.
            for_room = batch.evicted_for_room
            freed = evict(batch, min(excess, MAX_EVICTED_BYTES), EvictionEffort(MAX_EVICTED_ENTRIES - for_room))
            # No entry less: only what is leased; another batch will see.
            self._evicting = (totals.log_entries < entries or for_room > 0) and freed < excess
        else:
            self._evicting = False
        self._evict_what_is_too_old(batch)
        if totals.garbage_bytes:
            batch.free_garbage(MAX_FREED_CHUNKS)
        self._garbage_left = totals.garbage_bytes > 0
        self._sweep(batch)
        self._expire_uploads(batch)

    def _is_age_check_due(self) -> bool:
        return self._policy.max_age_seconds is not None and self._seconds() >= self._next_age_check

    def _evict_what_is_too_old(self, batch: WriteBatch) -> None:
        if not (self._ageing or self._is_age_check_due()):
            return
        self._next_age_check = self._seconds() + AGE_CHECK_SECONDS
        entries = batch.totals.log_entries
        before_step = self._policy.first_young_step(batch.step)
        evict(batch, MAX_EVICTED_BYTES, EvictionEffort(MAX_EVICTED_ENTRIES), before_step)
        self._ageing = batch.totals.log_entries < entries

    def _sweep(self, batch: WriteBatch) -> None:
        totals = batch.totals
        too_long = totals.log_entries > 2 * (totals.blobs + totals.action_results) + _LOG_SLACK_ENTRIES
        if not (self._sweeping or too_long):
            return
        for _ in range(MAX_SWEPT_GROUPS):
            self._sweep_after = sweep_log(batch, self._sweep_after)
            self._sweeping = bool(self._sweep_after)
            if not self._sweeping:
                break

    def _expire_uploads(self, batch: WriteBatch) -> None:
        now = self._seconds()
        if now < self._next_upload_check and not self._upload_after:
            return
        self._next_upload_check = now + UPLOAD_CHECK_SECONDS
        oldest = int(now) - self._upload_max_age_seconds
        idle = int(now) - SUPERFLUOUS_AFTER_SECONDS
        cursor = batch.txn.cursor(self._environment.uploads)
        found = cursor.set_range(self._upload_after) if self._upload_after else cursor.first()
        expired: list[tuple[bytes, records.UploadRecord]] = []
        checked = 0
        while found and checked < MAX_UPLOADS_CHECKED:
            record = records.UploadRecord.unpack(cursor.value())
            if record.updated_at < oldest or (record.updated_at < idle and batch.is_superfluous(cursor.key())):
                expired.append((cursor.key(), record))
            checked += 1
            found = cursor.next()
        self._upload_after = cursor.key() if found else b""
        for key, record in expired:
            batch.drop_upload(key, record)
            batch.report.expired_uploads += 1

    def _check_readers(self) -> None:
        now = self._seconds()
        if now >= self._next_reader_check:
            self._next_reader_check = now + READER_CHECK_SECONDS
            self._environment.env.reader_check()


def _apply_all(operations: Sequence[Operation[Any]], batch: WriteBatch) -> list[Outcome]:
    """Apply operations one after the other; with one that is put off, those that have to come after it are, too."""
    outcomes: list[Outcome] = []
    put_off: set[bytes] = set()
    for index, operation in enumerate(operations):
        order_key = operation.order_key
        outcome = _PUT_OFF if order_key in put_off else _apply(index, operation, batch)
        if outcome.is_put_off and order_key is not None:
            put_off.add(order_key)
        outcomes.append(outcome)
    return outcomes


def _apply(index: int, operation: Operation[Any], batch: WriteBatch) -> Outcome:
    changes = batch.changes
    try:
        return Outcome(operation.apply(batch))
    except RoomNotYetError:
        return _PUT_OFF
    except lmdb.Error:
        raise
    except LatheError as error:
        if batch.changes != changes:
            raise _OperationFailedError(index, error) from error
        return Outcome(None, error)
    except _BUGS as error:
        # A bug. It must not fail the operations of other clients that happen to share the transaction.
        raise _OperationFailedError(index, error) from error


def to_lathe_error(error: Exception, free_bytes: int) -> LatheError:
    """Tell a client why a transaction failed.

    Args:
        error: Why.
        free_bytes: What the file system had left then.
    """
    if isinstance(error, PAGE_ERRORS):
        return UnavailableError(
            f"the store's file is damaged, nothing was written: {error}; stop lathe-cas and run lathe-cas fsck"
        )
    if isinstance(error, lmdb.MapFullError):
        return ResourceExhaustedError(f"the store's map is full, nothing was written: {error}")
    text = str(error)
    # The last bytes of a disk are taken by a write that ends early, which LMDB reports as EIO (mdb_page_flush).
    is_short_write = _SHORT_WRITE in text and free_bytes < _SHORT_WRITE_BYTES
    if isinstance(error, lmdb.DiskError) or is_short_write or any(full in text for full in _FULL):
        return ResourceExhaustedError(f"the disk is full, nothing was written: {error}")
    if isinstance(error, lmdb.MemoryError | lmdb.TxnFullError):
        return ResourceExhaustedError(f"not enough memory for the transaction, nothing was written: {error}")
    return UnavailableError(f"the store failed, nothing was written: {error}")
