"""ActionExecutor: one action's life on the worker.

Fetch inputs, build the input root, run the command, upload outputs, put a good result into the action cache. The order
of the last two and of the report that follows them is a promise: whoever hears of a result can fetch what it names.

Spec: REAPI, Execution.Execute.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from lathe_protos import reapi
from lathe_shared.errors import DeadlineExceededError, FailedPreconditionError, LatheError, MissingInputsError
from lathe_shared.status_details import status_of
from lathe_worker import action_metadata, input_root
from lathe_worker.action_outcome import ActionOutcome, OutcomeKind, failed, finished, is_foreseen, new_error_id
from lathe_worker.child_process import despite_cancellation
from lathe_worker.output_collector import CollectedAction
from lathe_worker.output_paths import parents, requested_outputs, working_directory
from lathe_worker.sandbox import ResourceLimits, SandboxResult, SandboxSpec

if TYPE_CHECKING:
    import datetime
    from collections.abc import Callable
    from pathlib import Path

    from lathe_shared.clock import Clock
    from lathe_worker.action_request import ActionRequest
    from lathe_worker.directory_loader import DirectoryLoader
    from lathe_worker.file_cache import FileCache
    from lathe_worker.output_collector import OutputCollector
    from lathe_worker.remote_blobs import RemoteBlobs
    from lathe_worker.sandbox import Sandbox
    from lathe_worker.work_directory import WorkDirectories, WorkDirectory

NETWORK_PROPERTY = "network"
"""Platform property by which an action asks for the network, with the value ``on``; heeded if the operator allows."""

INLINE_DIRECTORIES = 50
"""Input roots of up to so many directories are planned without a thread, whose start takes as long as that."""

KILLED_EXIT_CODE = 137
"""128 + SIGKILL, for a command that was killed and yet managed to end with zero."""

MAX_MISSING_LISTED = 10_000
"""Missing blobs that one answer lists: 1.2 MB, below the 4 MB that gRPC clients accept by default, and far below what
the scheduler takes in one message."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ExecutionSettings:
    """What the operator decides about all actions.

    Attributes:
        worker_name: Stands in every result.
        max_output_bytes: Bound on standard output and on standard error.
        limits: Resource limits of each process.
        network: ``none``, ``on_request`` (see ``NETWORK_PROPERTY``) or ``always``.
    """

    worker_name: str
    max_output_bytes: int = 64 << 20
    limits: ResourceLimits = field(default_factory=ResourceLimits)
    network: str = "none"

    def allows_network(self, request: ActionRequest) -> bool:
        """Tell whether an action gets the machine's network."""
        if self.network == "on_request":
            return request.platform_property(NETWORK_PROPERTY) == "on"
        return self.network == "always"


@dataclass(frozen=True, slots=True)
class ExecutionParts:
    """What an executor works with."""

    sandbox: Sandbox
    blobs: RemoteBlobs
    cache: FileCache
    directories: DirectoryLoader
    collector: OutputCollector
    work: WorkDirectories
    clock: Clock


class ActionExecutor:
    """Runs actions; any number at once.

    Args:
        settings: The operator's.
        parts: What it works with.
    """

    def __init__(self, settings: ExecutionSettings, parts: ExecutionParts) -> None:
        self._settings = settings
        self._parts = parts

    async def execute(self, request: ActionRequest, on_started: Callable[[datetime.datetime], None]) -> ActionOutcome:
        """Run one action and describe how it ended; whatever goes wrong is described, too.

        Args:
            request: The action.
            on_started: Called with the time when its inputs are in place and the command is about to run.

        Cancellation: all processes are dead when it is raised.
        """
        metadata = action_metadata.begun(self._settings.worker_name, request.queued_at, self._parts.clock.now())
        work: WorkDirectory | None = None
        try:
            work = self._parts.work.make()
            return await self._run(request, work, metadata, on_started)
        except Exception as error:  # noqa: BLE001 -- the outermost boundary of an action: no error may take the worker down
            if not is_foreseen(error):
                _log.exception("action_error", lease_id=request.lease_id, error_id=new_error_id(error))
            return failed(error, self._settings.worker_name)
        finally:
            if work is not None:
                self._parts.work.discard(work)

    async def _run(
        self,
        request: ActionRequest,
        work: WorkDirectory,
        metadata: reapi.ExecutedActionMetadata,
        on_started: Callable[[datetime.datetime], None],
    ) -> ActionOutcome:
        clock = self._parts.clock
        metadata.input_fetch_start_timestamp = clock.now()
        await self._make_input_root(request, work.exec_root)
        metadata.input_fetch_completed_timestamp = clock.now()
        metadata.execution_start_timestamp = clock.now()
        on_started(metadata.execution_start_timestamp)
        ended = await self._parts.sandbox.run(self._spec(request, work))
        metadata.execution_completed_timestamp = clock.now()
        action_metadata.add_execution(metadata, ended)
        message = _add_explanation(ended, request, self._settings.max_output_bytes, work.stderr)
        metadata.output_upload_start_timestamp = clock.now()
        result, error = await self._collect(request, work)
        metadata.output_upload_completed_timestamp = clock.now()
        metadata.worker_completed_timestamp = clock.now()
        result.execution_metadata = metadata
        result.exit_code = ended.exit_code
        if ended.exceeded_output and result.exit_code == 0:
            result.exit_code = KILLED_EXIT_CODE
        # What the action did itself comes first: outputs that nobody can receive are no news of one that failed.
        if ended.timed_out:
            return finished(OutcomeKind.TIMED_OUT, result, status_of(DeadlineExceededError(message)), message)
        if result.exit_code != 0:
            return finished(OutcomeKind.FAILED, result, None, message or (error.message if error else ""))
        if error is not None:
            return finished(OutcomeKind.REFUSED, result, status_of(error), error.message)
        await self._remember(request, result)
        return finished(OutcomeKind.SUCCEEDED, result, None, "")

    async def _make_input_root(self, request: ActionRequest, exec_root: Path) -> None:
        parts = self._parts
        outputs = requested_outputs(request.command)
        extra = [working_directory(request.command), *parents(outputs)]
        tree = await parts.directories.load(request.instance_name, request.input_root)
        if len(tree.directories) <= INLINE_DIRECTORIES:
            plan = input_root.plan(tree, extra)
        else:
            plan = await asyncio.to_thread(input_root.plan, tree, extra)
        missing = list(tree.missing)
        try:
            async with parts.cache.hold(request.instance_name, plan.cache_names):
                if not missing:
                    # Not left alone when cancelled: nobody may remove what a thread still builds.
                    await despite_cancellation(
                        asyncio.to_thread(input_root.build, plan, exec_root, parts.cache, parts.sandbox.action_user)
                    )
                    return
        except MissingInputsError as error:
            missing += error.digests
        raise MissingInputsError(missing[:MAX_MISSING_LISTED])

    def _spec(self, request: ActionRequest, work: WorkDirectory) -> SandboxSpec:
        return SandboxSpec(
            argv=request.command.arguments,
            environment=request.environment,
            exec_root=work.exec_root,
            temporary_directory=work.temporary,
            stdout_path=work.stdout,
            stderr_path=work.stderr,
            working_directory="/".join(working_directory(request.command)),
            timeout_seconds=request.timeout_seconds,
            max_output_bytes=self._settings.max_output_bytes,
            limits=self._settings.limits,
            network=self._settings.allows_network(request),
        )

    async def _collect(
        self, request: ActionRequest, work: WorkDirectory
    ) -> tuple[reapi.ActionResult, LatheError | None]:
        """Upload what the action made; if that is more than a client can receive, at least what it said."""
        collected = CollectedAction(
            request.command, work.exec_root, work.stdout, work.stderr, frozenset(request.inline_output_files)
        )
        collector, function = self._parts.collector, request.digest.function
        try:
            return await collector.collect(request.instance_name, collected, function), None
        except FailedPreconditionError as error:
            return await collector.collect_logs(request.instance_name, collected, function), error

    async def _remember(self, request: ActionRequest, result: reapi.ActionResult) -> None:
        """Put a good result into the action cache; without that, it is still a good result."""
        if not request.cacheable:
            return
        try:
            await self._parts.blobs.update_action_result(request.instance_name, request.digest, bytes(result))
        except LatheError as error:
            _log.warning("action_result_not_stored", lease_id=request.lease_id, error=error.message)


def _add_explanation(ended: SandboxResult, request: ActionRequest, max_output_bytes: int, stderr: Path) -> str:
    """Say why the worker killed an action, to the client and in the action's own log; empty if it did not."""
    if ended.timed_out:
        return f"the action was killed after its timeout of {request.timeout_seconds} s"
    if not ended.exceeded_output:
        return ""
    message = f"the action was killed: it wrote more than {max_output_bytes} bytes to {ended.exceeded_output}"
    with contextlib.suppress(OSError), stderr.open("a") as log:
        log.write(f"\nlathe: {message}\n")
    return message
