"""ActionResult and ExecuteResponse, read and written as bytes.

An ActionResult is stored, returned and wrapped as the bytes that arrived; this module finds what it refers to.

Spec: REAPI, messages ActionResult, OutputFile, OutputDirectory and ExecuteResponse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_shared.cas_wire import read_digest
from lathe_shared.wire import bytes_field, message_field, scan, signed_32, text, varint_field

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class ActionResultReferences:
    """The blobs that an ActionResult names, each as hash and size, unchecked.

    Attributes:
        blobs: Output files, stdout and stderr.
        trees: Tree messages of output directories; their files count as referred to, too.
        root_directories: Directory messages at the root of output directories; likewise.
        exit_code: The action's exit code.
    """

    blobs: Sequence[tuple[str, int]]
    trees: Sequence[tuple[str, int]]
    root_directories: Sequence[tuple[str, int]]
    exit_code: int


def read_references(data: bytes) -> ActionResultReferences:
    """Find what an ActionResult refers to, checking the whole message on the way.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    blobs: list[tuple[str, int]] = []
    trees: list[tuple[str, int]] = []
    roots: list[tuple[str, int]] = []
    streams: dict[int, bytes] = {}
    exit_code = 0
    for tag, a, b in scan(data):
        if tag == 0x12:
            blobs.append(_output_file(data, a, b))
        elif tag == 0x1A:
            _output_directory(data, a, b, trees, roots)
        elif tag == 0x20:
            exit_code = signed_32(a)
        elif tag in (0x32, 0x42):
            streams[tag] = streams.get(tag, b"") + data[a:b]
        elif tag in (0x4A, 0x52, 0x5A, 0x62):
            _check_message(data, a, b)
    blobs.extend(read_digest(streams[tag]) for tag in sorted(streams))
    return ActionResultReferences(blobs, trees, roots, exit_code)


def _output_file(data: bytes, start: int, end: int) -> tuple[str, int]:
    digest = b""
    for tag, a, b in scan(data, start, end):
        if tag == 0x12:
            digest += data[a:b]
        elif tag == 0x0A:
            text(data, a, b)
        elif tag == 0x3A:
            _check_message(data, a, b)
    return read_digest(digest)


def _output_directory(
    data: bytes, start: int, end: int, trees: list[tuple[str, int]], roots: list[tuple[str, int]]
) -> None:
    tree: bytes | None = None
    root: bytes | None = None
    for tag, a, b in scan(data, start, end):
        if tag == 0x1A:
            tree = (tree or b"") + data[a:b]
        elif tag == 0x2A:
            root = (root or b"") + data[a:b]
        elif tag == 0x0A:
            text(data, a, b)
    if tree is not None:
        trees.append(read_digest(tree))
    if root is not None:
        roots.append(read_digest(root))


def _check_message(data: bytes, start: int, end: int) -> None:
    for _ in scan(data, start, end):
        pass


def execute_response(
    result: bytes | None, *, cached_result: bool = False, status: bytes = b"", message: str = ""
) -> bytes:
    """Write an ExecuteResponse around an ActionResult's own bytes.

    Args:
        result: The serialized ActionResult; None if there is none.
        cached_result: Whether it came from the action cache.
        status: A serialized google.rpc.Status; empty for OK.
        message: Freeform text that the client shows to its user.
    """
    return b"".join(
        (
            message_field(1, result) if result is not None else b"",
            varint_field(2, cached_result),
            message_field(3, status) if status else b"",
            bytes_field(5, message.encode()),
        )
    )
