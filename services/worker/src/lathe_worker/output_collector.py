"""OutputCollector: what an action has made, uploaded and named in an ActionResult.

Spec: REAPI, ActionResult, OutputDirectory, Command.output_directory_format, ExecuteRequest.inline_output_files.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lathe_protos import reapi
from lathe_shared.digest import Digest
from lathe_shared.errors import FailedPreconditionError
from lathe_worker.directory_wire import write_tree
from lathe_worker.output_paths import OutputKind, RequestedOutput, requested_outputs
from lathe_worker.output_scan import OutputScanner, ScannedDirectory, ScannedFile, ScannedSymlink, hash_file

if TYPE_CHECKING:
    from collections.abc import Collection

    from lathe_shared.digest import DigestFunction
    from lathe_worker.remote_blobs import RemoteBlobs

INLINE_LOG_BYTES = 4096
"""Standard output and error up to this size are in the result itself and spare the client a round trip. Most are empty
or a compiler warning."""

MAX_INLINE_BYTES = 1 << 20
"""Bound on the contents of output files in one result, asked for by ``inline_output_files``: a result travels as one
gRPC message, which clients limit to 4 MiB, and is stored."""

MAX_RESULT_BYTES = 14 << 20
"""Bound on what outputs take in a result beside inline contents. It travels to the scheduler in one message, which
may have 16 MiB: one that is larger would never arrive, however often it was sent."""

ENTRY_OVERHEAD_BYTES = 100
"""What an output takes beside its path, target and hashes, at most: sizes, node properties, the wire format's own."""


@dataclass(frozen=True, slots=True)
class CollectedAction:
    """Where one action's outputs are.

    Attributes:
        command: Names the outputs.
        exec_root: Host path of the input root.
        stdout_path: Standard output; absent if there was none.
        stderr_path: Standard error; absent if there was none.
        inline_output_files: Outputs whose contents are wanted in the result.
    """

    command: reapi.Command
    exec_root: Path
    stdout_path: Path
    stderr_path: Path
    inline_output_files: Collection[str] = ()


@dataclass(slots=True)
class _Collected:
    """A result under construction, and the blobs that it names."""

    result: reapi.ActionResult = field(default_factory=reapi.ActionResult)
    blobs: dict[Digest, bytes | Path] = field(default_factory=dict)
    inline_room_bytes: int = MAX_INLINE_BYTES
    result_room_bytes: int = MAX_RESULT_BYTES

    def take_room(self, *texts: str) -> None:
        """Account for an output in the result.

        Raises:
            FailedPreconditionError: The result becomes larger than what can be sent.
        """
        self.result_room_bytes -= ENTRY_OVERHEAD_BYTES + sum(len(text.encode()) for text in texts)
        if self.result_room_bytes < 0:
            raise FailedPreconditionError(
                f"the outputs' paths and symlink targets make a result of more than {MAX_RESULT_BYTES} bytes; an "
                "output directory has room for any number of files"
            )


class OutputCollector:
    """Turns a finished action's files into an ActionResult.

    Args:
        blobs: Where outputs go.
        seen_root: Path of the input root as actions see it; see ``OutputScanner``.
    """

    def __init__(self, blobs: RemoteBlobs, seen_root: str = "") -> None:
        self._blobs = blobs
        self._seen_root = seen_root

    async def collect(
        self, instance_name: str, action: CollectedAction, function: DigestFunction
    ) -> reapi.ActionResult:
        """Upload outputs and logs, and return a result that names them; exit code and metadata are left to the caller.

        Outputs that were not made are not in the result: that is for the client to judge.

        Raises:
            InvalidArgumentError: A path that the Command names cannot be.
            FailedPreconditionError: An output is something that no client can receive.
            LatheError: The upload failed.
            OSError: The disk failed.
        """
        collected = await asyncio.to_thread(self._gather, action, function)
        await self._blobs.upload(instance_name, collected.blobs)
        return collected.result

    async def collect_logs(
        self, instance_name: str, action: CollectedAction, function: DigestFunction
    ) -> reapi.ActionResult:
        """Upload standard output and error only, when the outputs themselves cannot be had."""
        collected = _Collected()
        await asyncio.to_thread(_add_logs, collected, action, function)
        await self._blobs.upload(instance_name, collected.blobs)
        return collected.result

    def _gather(self, action: CollectedAction, function: DigestFunction) -> _Collected:
        collected = _Collected()
        scanner = OutputScanner(
            action.exec_root, function, self._seen_root, frozenset(action.command.output_node_properties)
        )
        for output in requested_outputs(action.command):
            try:
                found = scanner.scan(output)
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise FailedPreconditionError(
                        f"output {output.path[:200]!r} holds a path that is too long"
                    ) from None
                raise
            if isinstance(found, ScannedFile):
                _add_file(collected, output, found, inline=output.path in action.inline_output_files)
            elif isinstance(found, ScannedDirectory):
                _add_directory(collected, output, found, action.command.output_directory_format, function)
            elif isinstance(found, ScannedSymlink):
                _add_symlink(collected, output, found)
        _add_logs(collected, action, function)
        return collected


def _add_file(collected: _Collected, output: RequestedOutput, file: ScannedFile, *, inline: bool) -> None:
    if output.kind is OutputKind.DIRECTORY:
        raise FailedPreconditionError(f"output {output.path!r} was to be a directory and is a file")
    collected.take_room(output.path, file.digest.hash)
    collected.blobs[file.digest] = file.path
    message = reapi.OutputFile(path=output.path, digest=file.digest.to_message(), is_executable=file.is_executable)
    if file.properties:
        message.node_properties = reapi.NodeProperties().parse(file.properties)
    if inline and file.digest.size_bytes <= collected.inline_room_bytes:
        message.contents = file.path.read_bytes()
        collected.inline_room_bytes -= file.digest.size_bytes
    collected.result.output_files.append(message)


def _add_directory(
    collected: _Collected,
    output: RequestedOutput,
    directory: ScannedDirectory,
    directory_format: reapi.CommandOutputDirectoryFormat,
    function: DigestFunction,
) -> None:
    if output.kind is OutputKind.FILE:
        raise FailedPreconditionError(f"output {output.path!r} was to be a file and is a directory")
    collected.take_room(output.path, directory.root.hash, directory.root.hash)
    message = reapi.OutputDirectory(path=output.path)
    if directory_format != reapi.CommandOutputDirectoryFormat.DIRECTORY_ONLY:
        tree = write_tree(directory.directories.values())
        digest = Digest.of(tree, function)
        collected.blobs[digest] = tree
        message.tree_digest = digest.to_message()
        message.is_topologically_sorted = True
    if directory_format != reapi.CommandOutputDirectoryFormat.TREE_ONLY:
        collected.blobs.update(directory.directories)
        message.root_directory_digest = directory.root.to_message()
    collected.blobs.update(directory.files)
    collected.result.output_directories.append(message)


def _add_symlink(collected: _Collected, output: RequestedOutput, symlink: ScannedSymlink) -> None:
    # An output of the older kinds stands in the result twice.
    for _ in range(1 if output.kind is OutputKind.ANY else 2):
        collected.take_room(output.path, symlink.target)
    message = reapi.OutputSymlink(path=output.path, target=symlink.target)
    if symlink.properties:
        message.node_properties = reapi.NodeProperties().parse(symlink.properties)
    collected.result.output_symlinks.append(message)
    # Clients that name outputs in the older fields look for symlinks in the older fields, too.
    if output.kind is OutputKind.FILE:
        collected.result.output_file_symlinks.append(message)
    elif output.kind is OutputKind.DIRECTORY:
        collected.result.output_directory_symlinks.append(message)


def _add_logs(collected: _Collected, action: CollectedAction, function: DigestFunction) -> None:
    result = collected.result
    if action.stdout_path.exists():
        result.stdout_raw, result.stdout_digest = _log(collected, action.stdout_path, function)
    if action.stderr_path.exists():
        result.stderr_raw, result.stderr_digest = _log(collected, action.stderr_path, function)


def _log(collected: _Collected, path: Path, function: DigestFunction) -> tuple[bytes, reapi.Digest]:
    """Return what goes into the result for one log: its bytes, if few, and always its digest."""
    digest = hash_file(path, function)
    collected.blobs[digest] = path
    inline = path.read_bytes() if digest.size_bytes <= INLINE_LOG_BYTES else b""
    return inline, digest.to_message()
