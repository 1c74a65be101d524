"""What a check says at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_cas.fsck.findings import ExitCode, Findings, Note, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

_WHAT_TO_DO = (
    "Look at the disk and the memory first. Then stop lathe-cas, and copy what is whole into a new store: "
    "lathe-cas fsck --salvage NEW_DIR. Or move data.mdb and lock.mdb away and start it again; builds fill the cache"
)
_CONCLUSIONS = {
    ExitCode.CLEAN: "the store is clean",
    ExitCode.PROBLEMS: "problems were found, and nothing was changed; --repair drops what is bad",
    ExitCode.REPAIRED: "problems were found, and what was bad was dropped; clients upload it again",
    ExitCode.BROKEN: (
        f"the file's own pages are damaged, which no repair mends, and the rest was not checked. {_WHAT_TO_DO}"
    ),
    ExitCode.CRASHED: (
        "LMDB came upon a page that it cannot cope with, and the check ended there; the same page ends the service. "
        f"No repair mends that. {_WHAT_TO_DO}"
    ),
}


def summary(findings: Findings, code: ExitCode) -> str:
    """Compose the report: examples of what is bad, a table, and what it comes to."""
    return "\n".join([*_examples(findings), *_table(findings), "", _CONCLUSIONS[code], ""])


def _examples(findings: Findings) -> Iterator[str]:
    for problem, examples in findings.examples.items():
        yield f"{problem.value}:"
        for example in examples:
            yield f"  {example}"
        more = findings.problems[problem] - len(examples)
        if more:
            yield f"  and {more:,} more"
        yield ""


def _table(findings: Findings) -> Iterator[str]:
    yield f"{'checked':<66} {'count':>14} {'bytes':>20}"
    for name, count in findings.checked.items():
        yield _row(name, count, findings.checked_bytes.get(name))
    yield ""
    yield "found"
    for problem in Problem:
        if findings.problems[problem]:
            yield _row(problem.value, findings.problems[problem], findings.problem_bytes[problem] or None)
    if not findings.problems.total():
        yield "  nothing bad"
    noted = [note for note in Note if findings.notes[note]]
    if noted:
        yield ""
        yield "in order, and counted"
        for note in noted:
            yield _row(note.value, findings.notes[note])
    if findings.repairs.total():
        yield ""
        yield "done"
        for name, count in findings.repairs.items():
            if count:
                yield _row(name, count)


def _row(name: str, count: int, size_bytes: int | None = None) -> str:
    return f"  {name:<64} {count:>14,} {'' if size_bytes is None else f'{size_bytes:,}':>20}".rstrip()
