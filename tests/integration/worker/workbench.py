"""A whole worker but for its connections: real sandbox, real files, blobs in memory."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.unit.worker.memory_blobs import MemoryBlobs

from lathe_protos import reapi, worker_v1
from lathe_shared.clock import SystemClock
from lathe_shared.digest import Digest
from lathe_shared.testing.builders import BlobSet, FileContent
from lathe_worker.action_executor import ActionExecutor, ExecutionParts, ExecutionSettings
from lathe_worker.action_outcome import ActionOutcome
from lathe_worker.action_request import ActionRequest, read_request
from lathe_worker.directory_loader import DirectoryLoader
from lathe_worker.file_cache import FileCache
from lathe_worker.output_collector import OutputCollector
from lathe_worker.work_directory import WorkDirectories

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lathe_worker.sandbox import Sandbox

QUEUED_AT = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)


@dataclass
class Ran:
    """An action that was run.

    Attributes:
        outcome: What the scheduler would hear.
        response: The same, parsed.
        blobs: Where its outputs are.
    """

    outcome: ActionOutcome
    response: reapi.ExecuteResponse
    blobs: MemoryBlobs

    @property
    def result(self) -> reapi.ActionResult:
        return self.response.result

    @property
    def exit_code(self) -> int:
        assert self.response.status.code == 0, self.response.status
        return self.result.exit_code

    @property
    def stdout(self) -> bytes:
        return self.read(self.result.stdout_digest)

    @property
    def stderr(self) -> bytes:
        return self.read(self.result.stderr_digest)

    def read(self, digest: reapi.Digest) -> bytes:
        return self.blobs.blobs[Digest.from_message(digest)] if digest.hash else b""

    def file(self, path: str) -> bytes:
        [found] = [file for file in self.result.output_files if file.path == path]
        return self.read(found.digest)


class Workbench:
    """Runs actions that tests describe in a line."""

    def __init__(self, sandbox: Sandbox, directory: Path, settings: ExecutionSettings | None = None) -> None:
        self.directory = directory
        self.blobs = MemoryBlobs()
        self.cache_directory = directory / "cache"
        self.cache = FileCache(self.cache_directory, 1 << 30, self.blobs)
        self.cache.open()
        self.cache_directory.chmod(0o700)
        self.work = WorkDirectories(directory / "work", sandbox.action_user)
        self.work.purge()
        self.sandbox = sandbox
        self.started: list[datetime.datetime] = []
        self.executor = ActionExecutor(
            settings or ExecutionSettings("bench", max_output_bytes=1 << 20),
            ExecutionParts(
                sandbox=sandbox,
                blobs=self.blobs,
                cache=self.cache,
                directories=DirectoryLoader(self.blobs),
                collector=OutputCollector(self.blobs, sandbox.seen_root),
                work=self.work,
                clock=SystemClock(),
            ),
        )

    async def close(self) -> None:
        await self.cache.close()
        await self.work.close()

    def request(
        self,
        *arguments: str,
        inputs: Mapping[str, FileContent] | None = None,
        symlinks: Mapping[str, str] | None = None,
        start: Mapping[str, Any] | None = None,
        **command: Any,
    ) -> ActionRequest:
        """Describe an action and store its blobs; one argument is a shell script."""
        blobs = BlobSet()
        root = blobs.directory(inputs or {}, symlinks)
        argv = arguments if len(arguments) > 1 else ("/bin/sh", "-c", arguments[0])
        digest = blobs.action(argv, input_root=root, **command)
        self.blobs.blobs.update(blobs.blobs)
        action = blobs.blobs[digest]
        command_digest = Digest.from_message(reapi.Action().parse(action).command_digest)
        message = worker_v1.StartAction(
            lease_id="lease",
            instance_name="main",
            action_digest=digest.to_message(),
            action=action,
            command=blobs.blobs[command_digest],
            queued_timestamp=QUEUED_AT,
            **(start or {}),
        )
        return read_request(message)

    async def execute(self, request: ActionRequest) -> Ran:
        outcome = await self.executor.execute(request, self.started.append)
        return Ran(outcome, reapi.ExecuteResponse().parse(outcome.execute_response), self.blobs)

    async def run(self, *arguments: str, **options: Any) -> Ran:
        return await self.execute(self.request(*arguments, **options))
