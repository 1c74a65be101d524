"""ExecuteRequest, Action and Command, read as bytes.

Each execution brings one of each; as message objects they took more of the scheduler's time than all the rest. Only
what the scheduler looks at is taken out; the worker gets the bytes as they came. What a worker would stumble over is
found here, because here it can be said to the client: every nested message and string is looked at.

Spec: REAPI, messages ExecuteRequest, Action, Command and Platform.
"""

from __future__ import annotations

from dataclasses import dataclass

from lathe_shared.cas_wire import read_digest
from lathe_shared.wire import scan, signed_32, signed_64, text

RawDigest = tuple[str, int]
"""Hash and size, neither checked."""


@dataclass(frozen=True, slots=True)
class ExecuteRequest:
    """What the scheduler wants to know of an ExecuteRequest; nothing is checked but the wire format."""

    instance_name: str
    skip_cache_lookup: bool
    action_digest: RawDigest
    priority: int
    digest_function: int
    inline_output_files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Action:
    """What the scheduler wants to know of an Action; ``timeout_seconds`` is None if there is none."""

    command_digest: RawDigest
    input_root_digest: RawDigest
    timeout_seconds: float | None
    do_not_cache: bool
    platform: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Command:
    """What the scheduler wants to know of a Command."""

    has_arguments: bool
    platform: tuple[tuple[str, str], ...]


def read_execute_request(data: bytes) -> ExecuteRequest:
    """Read an ExecuteRequest.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    instance_name, digest, policy = "", b"", b""
    skip = False
    function = 0
    inline: list[str] = []
    for tag, a, b in scan(data):
        if tag == 0x0A:
            instance_name = text(data, a, b)
        elif tag == 0x18:
            skip = a != 0
        elif tag == 0x32:
            digest += data[a:b]
        elif tag == 0x3A:
            policy += data[a:b]
        elif tag == 0x42:
            _check_message(data, a, b)
        elif tag == 0x48:
            function = signed_32(a)
        elif tag == 0x62:
            inline.append(text(data, a, b))
    priority = 0
    for tag, a, _ in scan(policy):
        if tag == 0x08:
            priority = signed_32(a)
    return ExecuteRequest(instance_name, skip, read_digest(digest), priority, function, tuple(inline))


def read_action(data: bytes) -> Action:
    """Read an Action.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    command, root, platform = b"", b"", b""
    timeout: bytes | None = None
    do_not_cache = False
    for tag, a, b in scan(data):
        if tag == 0x0A:
            command += data[a:b]
        elif tag == 0x12:
            root += data[a:b]
        elif tag == 0x32:
            timeout = (timeout or b"") + data[a:b]
        elif tag == 0x38:
            do_not_cache = a != 0
        elif tag == 0x52:
            platform += data[a:b]
    seconds = None if timeout is None else _duration_seconds(timeout)
    return Action(read_digest(command), read_digest(root), seconds, do_not_cache, _read_platform(platform))


def read_command(data: bytes) -> Command:
    """Read a Command.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    has_arguments = False
    platform = b""
    for tag, a, b in scan(data):
        if tag == 0x0A:
            has_arguments = True
            text(data, a, b)
        elif tag == 0x12:
            _read_pair(data, a, b)
        elif tag == 0x2A:
            platform += data[a:b]
        elif tag in (0x1A, 0x22, 0x32, 0x3A, 0x42):
            text(data, a, b)
    return Command(has_arguments, _read_platform(platform))


def _read_platform(data: bytes) -> tuple[tuple[str, str], ...]:
    return tuple(_read_pair(data, a, b) for tag, a, b in scan(data) if tag == 0x0A)


def _read_pair(data: bytes, start: int, end: int) -> tuple[str, str]:
    """Read a Platform.Property or an EnvironmentVariable: a name and a value."""
    name = value = ""
    for tag, a, b in scan(data, start, end):
        if tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x12:
            value = text(data, a, b)
    return name, value


def _duration_seconds(data: bytes) -> float:
    """Read a google.protobuf.Duration."""
    seconds = nanos = 0
    for tag, a, _ in scan(data):
        if tag == 0x08:
            seconds = signed_64(a)
        elif tag == 0x10:
            nanos = signed_32(a)
    return seconds + nanos / 1e9


def _check_message(data: bytes, start: int, end: int) -> None:
    for _ in scan(data, start, end):
        pass
