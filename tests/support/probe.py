"""Actions of the workspace that try what an action must not be able to do."""

from __future__ import annotations

from pathlib import Path

from tests.support.bazel import Bazel


class Probe:
    """Runs one of the probing actions and gives what it reported.

    Args:
        bazel: The client, in a workspace whose ``write_probe`` was called.
    """

    def __init__(self, bazel: Bazel) -> None:
        self._bazel = bazel

    def run(self, name: str) -> list[str]:
        """Run one of the targets of ``//odd`` that end in a report; return its lines."""
        assert self._bazel.build(f"//odd:{name}").spawns.get("remote", 1) == 1
        return self._bazel.output_file(f"odd/{name}.txt").read_text().splitlines()


def processes_with(argument: str) -> list[int]:
    """List the processes of this machine, its containers included, that have this argument on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended while we looked
            continue
        if argument.encode() in arguments:
            found.append(int(folder.name))
    return found
