"""ByteStream.Write as a state machine: the rules of the protocol, without I/O.

Messages go in; what comes out is bytes to append and the state that the upload is in. ``upload_runner`` does the rest.
The digest is not this module's affair: the store verifies it. Nor is decoding: of a compressed upload, the bytes here
are those of the compressed stream. Only the first message's offset counts bytes of the blob, and each later one adds
what was sent, whatever that decodes to.

Spec: google/bytestream/bytestream.proto, WriteRequest and ByteStream.Write; REAPI, ContentAddressableStorage, on
uploads.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from lathe_shared.compressor import Compressor
from lathe_shared.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lathe_shared.cas_wire import WriteRequest
    from lathe_shared.resource_name import WriteResource

MAX_PENDING_PIECES = 256
"""Messages gathered before they are handed on: clients that send a few bytes at a time must not cost an object each."""

MAX_PENDING_BYTES = 128 << 10
"""Bytes gathered before they are handed on."""

_JOIN_BELOW_BYTES = 4096
"""Pieces that are smaller than this on average are copied together; larger ones stay views into their messages."""


_COMPRESSED_SLACK_BYTES = 64 << 10


def max_compressed_bytes(size_bytes: int) -> int:
    """Return how long a compressed stream of a blob may be: an eighth more than the blob, for many small blocks.

    More is no compression, but a way to have anything stored beside the blob, since frames may hold what is skipped.
    """
    return size_bytes + size_bytes // 8 + _COMPRESSED_SLACK_BYTES


class UploadState(enum.Enum):
    """Where an upload stands."""

    AWAITING_FIRST = enum.auto()
    """No message has come."""
    OPENING = enum.auto()
    """The first message named the upload; ``opened`` is to say how much of it is there."""
    RECEIVING = enum.auto()
    """Bytes arrive."""
    FINISHED = enum.auto()
    """All bytes are there and the client said so."""
    SPOILT = enum.auto()
    """The client sent what cannot be part of the blob: nothing of it is worth keeping."""


class UploadSession:
    """One Write stream.

    Args:
        parse: Turns a resource name into what it names, or raises InvalidArgumentError.

    Attributes:
        state: Where the upload stands.
        received_bytes: Bytes that are there, as they travel: committed before, and received by this stream.
    """

    def __init__(self, parse: Callable[[str], WriteResource]) -> None:
        self.state = UploadState.AWAITING_FIRST
        self.received_bytes = 0
        self._parse = parse
        self._resource: WriteResource | None = None
        self._resource_name = ""
        self._first: WriteRequest | None = None
        self._next_offset = 0
        self._pieces: list[memoryview] = []
        self._pending_bytes = 0

    @property
    def resource(self) -> WriteResource:
        """What the first message named."""
        if self._resource is None:
            raise RuntimeError("no message has named a resource yet")
        return self._resource

    @property
    def restarts(self) -> bool:
        """Whether the stream begins at the blob's first byte, and so anew whatever had arrived before."""
        return self._first is not None and self._first.write_offset == 0

    @property
    def whole(self) -> memoryview | None:
        """The blob, if the first message brought all of it; None if not, or if it has no bytes."""
        first = self._first
        if first is None or not first.finish_write or first.write_offset or not first.data:
            return None
        return first.data if self._is_compressed or len(first.data) == self.resource.digest.size_bytes else None

    @property
    def committed_size(self) -> int:
        """What WriteResponse says of a finished upload: where the next message would have begun."""
        return self._next_offset

    @property
    def _is_compressed(self) -> bool:
        return self.resource.compressor is not Compressor.IDENTITY

    @property
    def _max_bytes(self) -> int:
        size_bytes = self.resource.digest.size_bytes
        return max_compressed_bytes(size_bytes) if self._is_compressed else size_bytes

    def is_finished(self) -> bool:
        """Whether all bytes are there and the client said so."""
        return self.state is UploadState.FINISHED

    @property
    def has_enough(self) -> bool:
        """Whether ``take`` is due."""
        return self._pending_bytes >= MAX_PENDING_BYTES or len(self._pieces) >= MAX_PENDING_PIECES

    def receive(self, request: WriteRequest) -> None:
        """Take in one message. After the first one ``opened`` must follow.

        Raises:
            InvalidArgumentError: It breaks the protocol.
        """
        if self.state is UploadState.AWAITING_FIRST:
            self._begin(request)
        elif self.state is UploadState.RECEIVING:
            if request.resource_name and request.resource_name != self._resource_name:
                raise InvalidArgumentError("resource_name", "changes in the middle of a stream")
            self._check_offset(request.write_offset)
            self._add(request)
        elif self.state is UploadState.FINISHED:
            raise InvalidArgumentError("finish_write", "was set in an earlier message; nothing may follow it")
        else:
            raise RuntimeError(f"no message is expected while {self.state.name}")

    def _begin(self, request: WriteRequest) -> None:
        if not request.resource_name:
            raise InvalidArgumentError("resource_name", "the first message must have one")
        self._resource = self._parse(request.resource_name)
        self._resource_name = request.resource_name
        size_bytes = self._resource.digest.size_bytes
        if not 0 <= request.write_offset <= size_bytes:
            raise InvalidArgumentError("write_offset", f"{request.write_offset} is not within 0 and {size_bytes}")
        self._first = request
        self.state = UploadState.OPENING

    def opened(self, committed_bytes: int) -> None:
        """Learn how many bytes are there already, and take in what the first message brought.

        A stream may begin before that: what a client was told of an upload, by QueryWriteStatus, may have grown since.
        Bytes that are there already are passed over; the digest covers them anyway.

        Raises:
            InvalidArgumentError: The stream begins behind that, and so would leave a gap.
        """
        if self.state is not UploadState.OPENING or self._first is None:
            raise RuntimeError(f"nothing to open while {self.state.name}")
        first = self._first
        self.received_bytes = 0 if self.restarts else committed_bytes
        if first.write_offset > self.received_bytes:
            raise InvalidArgumentError(
                "write_offset", f"{first.write_offset} leaves a gap: {self.received_bytes} bytes are committed"
            )
        self.state = UploadState.RECEIVING
        self._next_offset = first.write_offset
        self._add(first)

    def _check_offset(self, offset: int) -> None:
        if offset != self._next_offset:
            raise InvalidArgumentError(
                "write_offset", f"{offset} where {self._next_offset} is due, after the bytes sent before"
            )

    def _add(self, request: WriteRequest) -> None:
        size_bytes = self.resource.digest.size_bytes
        end = self._next_offset + len(request.data)
        if end > self._max_bytes:
            self.state = UploadState.SPOILT
            if self._is_compressed:
                raise InvalidArgumentError("data", f"{end} bytes are too many to be {size_bytes} compressed")
            raise InvalidArgumentError("data", f"{end} bytes are more than the {size_bytes} of the digest")
        if end > self.received_bytes:
            new = request.data[self.received_bytes - end :]
            self._pieces.append(new)
            self._pending_bytes += len(new)
            self.received_bytes = end
        self._next_offset = end
        if request.finish_write:
            if end != size_bytes and not self._is_compressed:
                self.state = UploadState.SPOILT
                raise InvalidArgumentError("finish_write", f"set after {end} bytes, where the digest has {size_bytes}")
            self.state = UploadState.FINISHED

    def take(self) -> tuple[list[memoryview], int]:
        """Hand on what was gathered, as pieces and their length together."""
        pieces, length = self._pieces, self._pending_bytes
        self._pieces = []
        self._pending_bytes = 0
        if len(pieces) > 1 and length < len(pieces) * _JOIN_BELOW_BYTES:
            pieces = [memoryview(b"".join(pieces))]
        return pieces, length

    def end_of_stream(self) -> None:
        """Learn that no message follows.

        Raises:
            InvalidArgumentError: There was none at all.
        """
        if self.state is UploadState.AWAITING_FIRST:
            raise InvalidArgumentError("resource_name", "the stream ended before its first message")
