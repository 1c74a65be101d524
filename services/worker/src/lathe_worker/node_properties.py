"""NodeProperties: modification time and mode of files and directories, when a client cares.

Spec: REAPI, NodeProperties and Command.output_node_properties.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lathe_shared.wire import message_field, scan, signed_32, signed_64, varint_field

if TYPE_CHECKING:
    from collections.abc import Collection

_NANOSECONDS = 1_000_000_000


def read(properties: bytes) -> tuple[int | None, int | None]:
    """Return modification time, in nanoseconds since the epoch, and mode; None for what is absent.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    mtime_ns = mode = None
    for tag, a, b in scan(properties):
        if tag == 0x12:
            parts = {inner: value for inner, value, _ in scan(properties, a, b)}
            mtime_ns = signed_64(parts.get(0x08, 0)) * _NANOSECONDS + signed_32(parts.get(0x10, 0))
        elif tag == 0x1A:
            mode = {inner: value for inner, value, _ in scan(properties, a, b)}.get(0x08, 0)
    return mtime_ns, mode


def apply(path: str, properties: bytes) -> None:
    """Give a file or directory what its node says; set-uid and its like are not for a client to set.

    Raises:
        MalformedMessageError: The bytes are no such message.
        OSError: The disk refuses.
    """
    mtime_ns, mode = read(properties)
    if mode is not None:
        os.chmod(path, mode & 0o777)
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))


def write(status: os.stat_result, wanted: Collection[str]) -> bytes:
    """Serialize those properties of a node that a client wants.

    Args:
        status: Of the node.
        wanted: Names from ``Command.output_node_properties``; of those, ``mtime`` and ``unix_mode`` are known.
    """
    result = b""
    if "mtime" in wanted:
        seconds, nanos = divmod(status.st_mtime_ns, _NANOSECONDS)
        result += message_field(2, varint_field(1, seconds) + varint_field(2, nanos))
    if "unix_mode" in wanted:
        result += message_field(3, varint_field(1, status.st_mode & 0o7777))
    return result
