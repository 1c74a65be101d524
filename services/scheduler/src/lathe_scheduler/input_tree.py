"""Find out whether the whole input tree of an action is stored.

An action that starts without all its inputs fails late, on a worker, and costs a slot; a client that is told at once
which blobs are missing uploads them and tries again. So the whole tree is looked at before an action is queued, at a
cost that falls with what is shared: Directories are parsed once, a subtree that was found complete is believed for a
short time, each blob that was found likewise, and what many actions ask for at the same time is asked for once.

Spec: REAPI, Execution.Execute, "missing blobs" as FAILED_PRECONDITION with a MISSING violation for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lathe_scheduler.batching import Batcher
from lathe_scheduler.directory_reader import DirectoryReader, DirectoryReferences
from lathe_scheduler.expiring_memo import ExpiringMemo
from lathe_shared.errors import InvalidArgumentError, LatheError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

    from lathe_scheduler.cas import Cas
    from lathe_shared.clock import Clock
    from lathe_shared.digest import Digest

Answer = TypeVar("Answer")

FIND_MISSING_BATCH = 10_000
"""Digests in one FindMissingBlobs: about 750 kB, well inside what any server takes in one message."""

READ_BATCH_BYTES = 2_000_000
"""Bytes of Directories, Actions and Commands asked for in one batch."""

REQUESTS_IN_FLIGHT = 8
"""Requests of one kind to the storage at once: enough to keep it busy, few enough to leave room to others."""

MAX_TREE_DIGESTS = 2_000_000
"""Distinct blobs in one input tree: some ten times what the largest known actions have; bounds memory."""


class InputTrees:
    """Checks input trees against the storage.

    Args:
        cas: The storage.
        clock: Tells how long something has been believed.
        presence_seconds: How long a blob that was found is believed to be there. Far below the time for which the
            storage promises to keep what it reported.
        max_directory_entries: Files and directories in all remembered Directories.
        max_present: Blobs, and subtrees, remembered as present.
    """

    def __init__(
        self,
        cas: Cas,
        clock: Clock,
        *,
        presence_seconds: float = 60.0,
        max_directory_entries: int = 500_000,
        max_present: int = 1_000_000,
    ) -> None:
        self._clock = clock
        self._presence_seconds = presence_seconds
        self._cas = cas
        # Many clients' questions share a request, so each has its own answer, which may be an error.
        self._finder: Batcher[tuple[str, Digest], bool | LatheError] = Batcher(
            self._fetch_presence, max_weight=FIND_MISSING_BATCH, weigh=lambda _: 1, max_in_flight=REQUESTS_IN_FLIGHT
        )
        self._blobs: Batcher[tuple[str, Digest], bytes | LatheError] = Batcher(
            self._fetch_blobs,
            max_weight=READ_BATCH_BYTES,
            weigh=lambda key: key[1].size_bytes + 100,
            max_in_flight=REQUESTS_IN_FLIGHT,
        )
        self._directories = DirectoryReader(self.read, max_directory_entries)
        self._present: ExpiringMemo[tuple[str, Digest]] = ExpiringMemo(max_present)
        self._complete: ExpiringMemo[tuple[str, Digest]] = ExpiringMemo(max_present)
        self._times_forgotten = 0

    async def read(self, instance_name: str, digests: Collection[Digest]) -> dict[Digest, bytes]:
        """Read small blobs, together with what others read at this moment; those not stored are left out.

        Raises:
            LatheError: The storage is away, or answered one of these blobs with an error.
        """
        found = await self._blobs.get((instance_name, digest) for digest in digests)
        return {digest: _answered(data) for (_, digest), data in found.items()}

    async def find_missing(self, instance_name: str, root: Digest) -> set[Digest]:
        """Return all blobs of an input tree that are not stored.

        Below a Directory that is missing itself nothing can be seen; the client uploads what lies there together with
        it, or is told at its next try.

        Args:
            instance_name: The client's instance.
            root: Digest of the input root.

        Raises:
            InvalidArgumentError: A Directory is malformed; names it.
            UnavailableError: The storage is away.
        """
        now = self._clock.monotonic()
        times_forgotten = self._times_forgotten
        walked, wanted, missing, believed_until = await self._walk(instance_name, root, now)
        unknown = []
        for digest in wanted:
            until = self._present.until((instance_name, digest), now)
            if until is None:
                unknown.append((instance_name, digest))
            else:
                believed_until = min(believed_until, until)
        if unknown:
            present = {key: _answered(answer) for key, answer in (await self._finder.get(unknown)).items()}
            missing.update(key[1] for key in unknown if not present[key])
            if times_forgotten == self._times_forgotten:
                for key in unknown:
                    if present[key]:
                        self._present.add(key, now + self._presence_seconds)
        if not missing and times_forgotten == self._times_forgotten:
            # No longer than the weakest thing that this belief rests on.
            for digest in walked:
                self._complete.add((instance_name, digest), believed_until)
        return missing

    def forget(self) -> None:
        """Believe nothing any more: a worker did not find what was there a moment ago.

        Nor what checks under way have found so far, which may be older than that.
        """
        self._times_forgotten += 1
        self._present.clear()
        self._complete.clear()

    async def close(self) -> None:
        """Give up what is under way."""
        await self._finder.close()
        await self._blobs.close()

    async def _walk(
        self, instance_name: str, root: Digest, now: float
    ) -> tuple[set[Digest], set[Digest], set[Digest], float]:
        """Go through a tree level by level; each Directory once, however often it occurs.

        Returns:
            The Directories that were gone through; these and their files; the Directories that are not stored; until
            when the subtrees that were left out are believed to be complete.
        """
        believed_until = now + self._presence_seconds
        walked: set[Digest] = set()
        wanted: set[Digest] = set()
        missing: set[Digest] = set()
        level = {root}
        while level:
            ahead = []
            for digest in level:
                until = self._complete.until((instance_name, digest), now)
                if until is None:
                    ahead.append(digest)
                else:
                    believed_until = min(believed_until, until)
            found = await self._directories.get(instance_name, [digest for digest in ahead if not digest.is_empty])
            level = set()
            for digest in ahead:
                references = found.get(digest, _NOTHING if digest.is_empty else None)
                walked.add(digest)
                if references is None:
                    missing.add(digest)
                    continue
                wanted.add(digest)
                wanted.update(references.files)
                level.update(references.directories)
            level -= walked
            if len(wanted) + len(level) > MAX_TREE_DIGESTS:
                raise InvalidArgumentError("action.input_root_digest", f"more than {MAX_TREE_DIGESTS} distinct blobs")
        return walked, wanted, missing, believed_until

    async def _fetch_presence(
        self, keys: Collection[tuple[str, Digest]]
    ) -> dict[tuple[str, Digest], bool | LatheError]:
        async def ask(instance_name: str, digests: Collection[Digest]) -> Mapping[Digest, bool]:
            missing = await self._cas.find_missing(instance_name, digests)
            return {digest: digest not in missing for digest in digests}

        return await _each_group(keys, ask)

    async def _fetch_blobs(self, keys: Collection[tuple[str, Digest]]) -> dict[tuple[str, Digest], bytes | LatheError]:
        return await _each_group(keys, self._cas.read)


_NOTHING = DirectoryReferences((), ())


def _answered(answer: Answer | LatheError) -> Answer:
    if isinstance(answer, LatheError):
        raise answer
    return answer


async def _each_group(
    keys: Iterable[tuple[str, Digest]],
    ask: Callable[[str, Collection[Digest]], Awaitable[Mapping[Digest, Answer | LatheError]]],
) -> dict[tuple[str, Digest], Answer | LatheError]:
    """Ask for each group of keys; a group that is refused, such as for its instance name, is no other one's error."""
    answer: dict[tuple[str, Digest], Answer | LatheError] = {}
    for (instance_name, _), digests in _grouped(keys).items():
        try:
            found = await ask(instance_name, digests)
        except UnavailableError:
            raise
        except LatheError as error:
            found = dict.fromkeys(digests, error)
        answer.update({(instance_name, digest): value for digest, value in found.items()})
    return answer


def _grouped(keys: Iterable[tuple[str, Digest]]) -> dict[tuple[str, int], list[Digest]]:
    """Sort keys by what one request can carry: one instance, one digest function."""
    groups: dict[tuple[str, int], list[Digest]] = {}
    for instance_name, digest in keys:
        groups.setdefault((instance_name, digest.function), []).append(digest)
    return groups
