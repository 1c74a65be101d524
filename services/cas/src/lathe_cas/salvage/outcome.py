"""What was saved, what was not, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_cas.fsck.findings import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lathe_cas.salvage.rescue import Losses
    from lathe_cas.stores.lmdb_records import Totals


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        saved: What the new store counts.
        counted: What the old one counted, if that was found.
        losses: What is not whole of what has a record.
        malformed_records: Records and chunks that make no sense.
        malformed_pages: Pages of the old trees that make no sense.
        malformed_nodes: Entries in its pages that make no sense.
        unreadable_pages: Pages that the disk did not give.
        trees_are_whole: Whether all was found by the old trees.
        state_is_known: Whether what is in the old store can be told from what once was.
        has_id: Whether the new store has the old one's id.
    """

    saved: Totals
    counted: Totals | None
    losses: Losses
    malformed_records: int
    malformed_pages: int
    malformed_nodes: int
    unreadable_pages: int
    trees_are_whole: bool
    state_is_known: bool
    has_id: bool

    @property
    def lost_blobs(self) -> int:
        """Blobs that are lost at least."""
        return max(self.losses.blobs, self._once.blobs - self.saved.blobs)

    @property
    def lost_bytes(self) -> int:
        """Bytes of blobs that are lost at least."""
        return max(self.losses.blob_bytes, self._once.blob_bytes - self.saved.blob_bytes)

    @property
    def lost_action_results(self) -> int:
        """Action results that are lost at least."""
        return max(self.losses.action_results, self._once.action_results - self.saved.action_results)

    @property
    def _once(self) -> Totals:
        """What the old store counted. Where its trees tell all, the count itself may be what is damaged."""
        return self.saved if self.trees_are_whole or self.counted is None else self.counted

    @property
    def is_everything(self) -> bool:
        """Whether nothing is lost, for sure."""
        if self.lost_blobs or self.lost_action_results or self.malformed_records or not self.state_is_known:
            return False
        return self.trees_are_whole or self.counted is not None

    def exit_code(self) -> ExitCode:
        """Return the exit code that says so."""
        return ExitCode.CLEAN if self.is_everything else ExitCode.PROBLEMS

    def summary(self, target: Path) -> str:
        """Compose the report: examples of what is lost, a table, and what it comes to."""
        return "\n".join([*self._examples(), *self._table(), "", *self._conclusions(target), ""])

    def _examples(self) -> Iterator[str]:
        examples = self.losses.examples
        if examples:
            yield "lost:"
            for example in examples:
                yield f"  {example}"
            more = self.losses.blobs + self.losses.action_results - len(examples)
            if more:
                yield f"  and {more:,} more"
            yield ""

    def _table(self) -> Iterator[str]:
        yield f"{'':<40} {'saved':>22} {'lost':>22}"
        yield _row("blobs", self.saved.blobs, self.lost_blobs)
        yield _row("bytes of blobs", self.saved.blob_bytes, self.lost_bytes)
        yield _row("action results", self.saved.action_results, self.lost_action_results)
        damage = {
            "pages that the disk did not give": self.unreadable_pages,
            "pages of the trees that make no sense": self.malformed_pages,
            "entries of pages that make no sense": self.malformed_nodes,
            "records that make no sense": self.malformed_records,
        }
        if any(damage.values()):
            yield ""
            yield "damage"
            for name, count in damage.items():
                if count:
                    yield f"  {name:<38} {count:>22,}"

    def _conclusions(self, target: Path) -> Iterator[str]:
        if self.is_everything:
            yield "everything was saved"
        elif self.state_is_known:
            yield "what is not damaged was saved; clients upload the rest again"
        else:
            yield (
                "what is not damaged was saved. Pages that say what is in use are damaged: among what was saved may be "
                "what had been deleted, and among what is lost, too"
            )
        if not self.has_id:
            yield (
                "the store's id is lost, and the new one has another: of several data_dirs, some of what this one "
                "holds is looked for elsewhere"
            )
        yield f"{target} is a data_dir: start lathe-cas on it, or move its data.mdb to where the old one was"


def _row(name: str, saved: int, lost: int) -> str:
    return f"  {name:<38} {saved:>22,} {lost:>22,}"
