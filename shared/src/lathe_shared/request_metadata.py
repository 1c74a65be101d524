"""RequestMetadata: for which invocation, action and target a client sends a request.

Bazel attaches it to every RPC. It is read from the header's bytes only when somebody asks (a log line, the queue's
fairness), and passed on unread to the services behind.

Spec: REAPI, message RequestMetadata and its header ``build.bazel.remote.execution.v2.requestmetadata-bin``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lathe_shared.wire import MalformedMessageError, scan, text

REQUEST_METADATA_KEY = "build.bazel.remote.execution.v2.requestmetadata-bin"
"""The header's name."""


@dataclass(frozen=True, slots=True)
class RequestMetadata:
    """The fields of RequestMetadata; each is empty if the client did not say.

    Attributes:
        tool_name: ``bazel``, for example.
        tool_version: Its version.
        action_id: The action's digest hash, or another unique id of it.
        tool_invocation_id: One run of the tool.
        correlated_invocations_id: Several runs that belong together.
        action_mnemonic: ``CppCompile``, for example.
        target_id: The target that the action belongs to.
        configuration_id: The configuration that the target was built in.
    """

    tool_name: str = ""
    tool_version: str = ""
    action_id: str = ""
    tool_invocation_id: str = ""
    correlated_invocations_id: str = ""
    action_mnemonic: str = ""
    target_id: str = ""
    configuration_id: str = ""

    @classmethod
    def parse(cls, data: bytes) -> RequestMetadata:
        """Read the serialized message; malformed bytes give an empty one, since nothing depends on it."""
        try:
            return cls(**_fields(data))
        except MalformedMessageError:
            return NO_METADATA

    def log_fields(self) -> dict[str, str]:
        """Return what belongs into a log line, without what is empty."""
        fields = {
            "invocation_id": self.tool_invocation_id,
            "action_id": self.action_id,
            "target_id": self.target_id,
            "mnemonic": self.action_mnemonic,
        }
        return {name: value for name, value in fields.items() if value}


NO_METADATA = RequestMetadata()
"""What a client that sends none means."""

_NAMES = {
    0x12: "action_id",
    0x1A: "tool_invocation_id",
    0x22: "correlated_invocations_id",
    0x2A: "action_mnemonic",
    0x32: "target_id",
    0x3A: "configuration_id",
}
_TOOL_NAMES = {0x0A: "tool_name", 0x12: "tool_version"}


def _fields(data: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    for tag, a, b in scan(data):
        if tag in _NAMES:
            fields[_NAMES[tag]] = text(data, a, b)
        elif tag == 0x0A:
            for inner, c, d in scan(data, a, b):
                if inner in _TOOL_NAMES:
                    fields[_TOOL_NAMES[inner]] = text(data, c, d)
    return fields
