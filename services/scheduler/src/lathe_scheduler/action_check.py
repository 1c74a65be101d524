"""What happens between Execute and the queue: cache look-up, Action and Command, input tree.

The answer is an event for the queue: the action may be queued, or the request is answered already.

Spec: REAPI, Execution.Execute and its errors; messages Action and Command.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog

from lathe_scheduler.execution_wire import read_action, read_command
from lathe_scheduler.queue_events import CheckEnded, CheckPassed
from lathe_scheduler.task import ActionSpec, Outcome, OutcomeKind
from lathe_shared.action_result_wire import execute_response
from lathe_shared.digest import Digest
from lathe_shared.errors import InternalError, InvalidArgumentError, LatheError, MissingInputsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lathe_scheduler.cas import Cas
    from lathe_scheduler.execution_wire import RawDigest
    from lathe_scheduler.input_tree import InputTrees
    from lathe_scheduler.platform_key import PlatformProperties
    from lathe_scheduler.task import ActionKey, Task
    from lathe_shared.clock import Clock

MessageT = TypeVar("MessageT")

MAX_MESSAGE_BYTES = 6 << 20
"""Largest Action and largest Command: both go to a worker in one message, which must stay below gRPC's limits. The
longest command lines that an operating system takes are a third of this."""

MAX_MISSING_LISTED = 10_000
"""Missing blobs that one answer lists: 1.2 MB, below the 4 MB that gRPC clients accept by default. Bazel asks for the
rest itself when it uploads."""

_log = structlog.get_logger("lathe.scheduler")


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """Bounds on what is checked.

    Attributes:
        max_action_timeout_seconds: Longest timeout that an action may ask for.
        max_concurrent_checks: Checks under way at once; others wait.
    """

    max_action_timeout_seconds: float
    max_concurrent_checks: int


class ActionChecker:
    """Checks actions before they are queued."""

    def __init__(
        self, cas: Cas, trees: InputTrees, properties: PlatformProperties, clock: Clock, limits: CheckLimits
    ) -> None:
        self._cas = cas
        self._trees = trees
        self._properties = properties
        self._clock = clock
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_concurrent_checks)

    async def check(self, task: Task, on_cache_miss: Callable[[], None]) -> CheckPassed | CheckEnded:
        """Check one task; never raises but for its cancellation.

        Args:
            task: A task that is CHECKING.
            on_cache_miss: Called when the cache has been asked, or need not be, and the inputs come next.
        """
        try:
            async with self._slots:
                return await self._check(task, on_cache_miss)
        except MissingInputsError as error:
            return CheckEnded(task.id, Outcome(OutcomeKind.MISSING_INPUTS, error=error))
        except LatheError as error:
            return CheckEnded(task.id, Outcome(OutcomeKind.REJECTED, error=error))
        except Exception as error:  # noqa: BLE001 -- a client must get an answer even if this is a bug
            error_id = secrets.token_hex(6)
            _log.error("action_check_failed", action_digest=str(task.key.digest), error_id=error_id, exc_info=error)
            shown = InternalError(f"internal error {error_id}; the scheduler's log has the details under this id")
            return CheckEnded(task.id, Outcome(OutcomeKind.REJECTED, error=shown))

    async def _check(self, task: Task, on_cache_miss: Callable[[], None]) -> CheckPassed | CheckEnded:
        key = task.key
        _check_size(key.digest, "action")
        result, data = await self._look_up(key, task.skip_cache_lookup)
        action = _read(read_action, f"action {key.digest}", data) if data is not None else None
        # What must not be cached must not come from a cache either, whoever put it there.
        if result is not None and not (action is not None and action.do_not_cache):
            response = execute_response(result, cached_result=True)
            return CheckEnded(task.id, Outcome(OutcomeKind.CACHED, response))
        on_cache_miss()
        if action is None or data is None:
            raise MissingInputsError([key.digest])
        command_digest = _digest(action.command_digest, key, "command_digest")
        root_digest = _digest(action.input_root_digest, key, "input_root_digest")
        _check_size(command_digest, "command")
        self._check_timeout(action.timeout_seconds)
        commands, missing = await asyncio.gather(
            self._trees.read(key.instance_name, [command_digest]),
            self._trees.find_missing(key.instance_name, root_digest),
        )
        command_data = commands.get(command_digest)
        if command_data is None:
            missing.add(command_digest)
        if missing:
            raise MissingInputsError(sorted(missing)[:MAX_MISSING_LISTED])
        assert command_data is not None  # noqa: S101,RUF100 -- told to the type checker: else it was missing
        command = _read(read_command, f"command {command_digest}", command_data)
        if not command.has_arguments:
            raise InvalidArgumentError(f"command {command_digest}: arguments", "there are none, so nothing to execute")
        # Clients before version 2.2 put the platform into the Command.
        platform = self._properties.key(action.platform or command.platform)
        spec = ActionSpec(data, command_data, platform, root_digest, action.do_not_cache, self._clock.now())
        return CheckPassed(task.id, spec)

    async def _look_up(self, key: ActionKey, skip_cache: bool) -> tuple[bytes | None, bytes | None]:
        """Return the cached result and the Action, asked for at the same time."""
        if skip_cache:
            return None, (await self._trees.read(key.instance_name, [key.digest])).get(key.digest)
        result, actions = await asyncio.gather(
            self._cas.get_action_result(key.instance_name, key.digest),
            self._trees.read(key.instance_name, [key.digest]),
        )
        return result, actions.get(key.digest)

    def _check_timeout(self, seconds: float | None) -> None:
        limit = self._limits.max_action_timeout_seconds
        if seconds is not None and not 0 <= seconds <= limit:
            raise InvalidArgumentError("action.timeout", f"{seconds:g} seconds is not from 0 to {limit:g}")


def _read(reader: Callable[[bytes], MessageT], field: str, data: bytes) -> MessageT:
    try:
        return reader(data)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(field, error.message) from None


def _digest(raw: RawDigest, key: ActionKey, field: str) -> Digest:
    return Digest.parse(*raw, key.digest.function, f"action {key.digest}: {field}")


def _check_size(digest: Digest, what: str) -> None:
    if digest.size_bytes > MAX_MESSAGE_BYTES:
        raise InvalidArgumentError(
            f"{what} {digest}", f"has {digest.size_bytes} bytes, more than the {MAX_MESSAGE_BYTES} that one may have"
        )
