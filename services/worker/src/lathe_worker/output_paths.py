"""Which outputs a Command asks for, and where in the input root they are.

Spec: REAPI, Command.output_files, output_directories, output_paths and working_directory.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_shared.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lathe_protos import reapi


class OutputKind(enum.Enum):
    """What a client expects an output to be; before REAPI 2.1 it had to say so."""

    ANY = "output_paths"
    FILE = "output_files"
    DIRECTORY = "output_directories"


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One output that a client wants.

    Attributes:
        path: As the client wrote it; the result uses the same.
        components: Names from the input root to the output; none for the input root itself.
        kind: What it is expected to be.
    """

    path: str
    components: tuple[str, ...]
    kind: OutputKind


def working_directory(command: reapi.Command) -> tuple[str, ...]:
    """Return the names from the input root to the working directory.

    Raises:
        InvalidArgumentError: It is absolute or outside of the input root.
    """
    return _components((), command.working_directory, "command.working_directory")


def requested_outputs(command: reapi.Command) -> list[RequestedOutput]:
    """Return what a Command asks for, each path once.

    Raises:
        InvalidArgumentError: A path is absolute or outside of the input root.
    """
    base = working_directory(command)
    if command.output_paths:  # the older fields are then ignored, as the specification has it
        return _outputs(base, command.output_paths, OutputKind.ANY)
    return [
        *_outputs(base, command.output_files, OutputKind.FILE),
        *_outputs(base, command.output_directories, OutputKind.DIRECTORY),
    ]


def parents(outputs: Iterable[RequestedOutput]) -> list[tuple[str, ...]]:
    """Return the directories that must exist before the command runs, for it to make its outputs in."""
    return list(dict.fromkeys(output.components[:-1] for output in outputs if len(output.components) > 1))


def _outputs(base: tuple[str, ...], paths: Sequence[str], kind: OutputKind) -> list[RequestedOutput]:
    field = f"command.{kind.value}"
    return [RequestedOutput(path, _components(base, path, field), kind) for path in dict.fromkeys(paths)]


def _components(base: tuple[str, ...], path: str, field: str) -> tuple[str, ...]:
    """Resolve a path that a client wrote, without looking at any disk."""
    if path.startswith("/") or "\0" in path:
        raise InvalidArgumentError(field, f"{path[:200]!r} is not a path relative to the working directory")
    result = list(base)
    for name in path.split("/"):
        if name == "..":
            if not result:
                raise InvalidArgumentError(field, f"{path[:200]!r} leads out of the input root")
            result.pop()
        elif name not in ("", "."):
            result.append(name)
    return tuple(result)
