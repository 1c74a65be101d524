"""ActionRequest: one action as the scheduler hands it out, taken apart and checked."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_protos import reapi
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.message_decoding import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lathe_protos import worker_v1

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
"""PATH of an action whose Command sets none: some clients send no environment at all and expect to find their tools."""


@dataclass(frozen=True, slots=True)
class ActionRequest:
    """One action to run.

    Attributes:
        lease_id: The scheduler's name for this attempt.
        instance_name: Where blobs are read and written, and part of the action cache's key.
        digest: Of the Action; its function is that of all digests.
        action: The Action.
        command: The Command.
        input_root: Digest of the root Directory.
        queued_at: When the first client asked for it.
        request_metadata: Serialized RequestMetadata of that client.
        cacheable: Whether a good result goes into the action cache.
        inline_output_files: Outputs whose contents are wanted in the result.
        timeout_seconds: Time that the command may take; None for no limit.
    """

    lease_id: str
    instance_name: str
    digest: Digest
    action: reapi.Action
    command: reapi.Command
    input_root: Digest
    queued_at: datetime.datetime
    request_metadata: bytes
    cacheable: bool
    inline_output_files: Sequence[str]
    timeout_seconds: float | None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the command sees: its own over a default PATH, and nothing else."""
        variables = {"PATH": DEFAULT_PATH}
        variables.update({variable.name: variable.value for variable in self.command.environment_variables})
        return variables

    def platform_property(self, name: str) -> str:
        """Return the value of a platform property, the Action's before the Command's; empty if there is none."""
        for platform in (self.action.platform, self.command.platform):
            for item in platform.properties:
                if item.name == name:
                    return item.value
        return ""


def read_request(start: worker_v1.StartAction) -> ActionRequest:
    """Take apart what the scheduler sent.

    Raises:
        InvalidArgumentError: Action or Command are malformed, or cannot be run as they are.
    """
    function = select_function(start.digest_function, len(start.action_digest.hash), tuple(DigestFunction))
    action = decode(reapi.Action, start.action)
    command = decode(reapi.Command, start.command)
    _check_command(command)
    # betterproto gives an absent Duration as zero; a timeout of zero would be of no use to anyone.
    timeout = action.timeout or start.default_timeout
    return ActionRequest(
        lease_id=start.lease_id,
        instance_name=start.instance_name,
        digest=Digest.from_message(start.action_digest, function, "action_digest"),
        action=action,
        command=command,
        input_root=Digest.from_message(action.input_root_digest, function, "action.input_root_digest"),
        queued_at=start.queued_timestamp,
        request_metadata=start.request_metadata,
        cacheable=not (start.do_not_cache or action.do_not_cache),
        inline_output_files=tuple(start.inline_output_files),
        timeout_seconds=max(timeout.total_seconds(), 0.0) or None,
    )


def _check_command(command: reapi.Command) -> None:
    if not command.arguments or not command.arguments[0]:
        raise InvalidArgumentError("command.arguments", "there is no program to run")
    if any("\0" in argument for argument in command.arguments):
        raise InvalidArgumentError("command.arguments", "an argument holds a NUL character")
    for variable in command.environment_variables:
        if not variable.name or "=" in variable.name or "\0" in variable.name + variable.value:
            raise InvalidArgumentError("command.environment_variables", f"{variable.name[:100]!r} cannot be a variable")
