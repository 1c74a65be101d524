"""What a check can find, how bad it is, and what it all comes to."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

MAX_EXAMPLES = 10
"""Findings of one kind that are shown one by one; the others are only counted."""


class ExitCode(enum.IntEnum):
    """What the exit code of ``lathe-cas fsck`` says."""

    CLEAN = 0
    PROBLEMS = 1
    """Something is bad, and nothing was changed."""
    CANNOT_CHECK = 2
    """Wrong usage or settings, no store, a store of another format, or one in use that was to be repaired."""
    REPAIRED = 3
    """Something was bad; it was dropped, and the store is clean now."""
    BROKEN = 4
    """The file's own pages are damaged. No repair mends that; what is whole can be salvaged."""
    CRASHED = 5
    """LMDB ended the process of the check, which only damaged pages have it do."""


class Problem(enum.Enum):
    """What is bad, in the words of the summary."""

    CRASH = "damage that ended the check"
    PAGES = "damage to the file's own pages"
    CHUNK_DAMAGED = "chunks that do not match their checksum"
    CHUNKS_WRONG = "chunks that are missing, too many or of the wrong length"
    CHUNK_KEY = "chunks under malformed keys"
    ORPHANS = "chunks that nothing refers to"
    SHARED = "records that refer to the chunks of another record"
    RECORD = "malformed records"
    DIGEST = "blobs that do not match their digest"
    LOG_GROUP = "malformed groups of the access log"
    LOG_ENTRY = "records that eviction does not see"
    TOTALS = "totals that do not match what is there"


class Note(enum.Enum):
    """What is counted beside that, and belongs to the life of a store."""

    INCOMPLETE = "action results that name a blob that is gone, and so answer nobody"
    STALE = "stale entries of the access log"
    UPLOADS = "unfinished uploads"
    GARBAGE = "dropped blobs whose chunks wait to be freed"


@dataclass(slots=True)
class Findings:
    """All that was found so far; bounded, however much that is.

    Attributes:
        problems: How many of each kind.
        problem_bytes: Bytes of chunks that they concern.
        examples: The first few of each kind, in words.
        notes: How many of each kind.
        checked: What was looked at, by its name in the summary.
        checked_bytes: Bytes of chunks among it.
        repairs: What was done, by its name in the summary.
    """

    problems: Counter[Problem] = field(default_factory=Counter)
    problem_bytes: Counter[Problem] = field(default_factory=Counter)
    examples: dict[Problem, list[str]] = field(default_factory=dict)
    notes: Counter[Note] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    checked_bytes: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)

    def add(self, problem: Problem, text: str, size_bytes: int = 0) -> None:
        """Note something bad."""
        self.problems[problem] += 1
        self.problem_bytes[problem] += size_bytes
        examples = self.examples.setdefault(problem, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(text)

    def exit_code(self) -> ExitCode:
        """Return the exit code that says what was found and done."""
        if self.problems[Problem.CRASH]:
            return ExitCode.CRASHED
        if self.problems[Problem.PAGES]:
            return ExitCode.BROKEN
        if not self.problems.total():
            return ExitCode.CLEAN
        return ExitCode.REPAIRED if self.repairs.total() else ExitCode.PROBLEMS
