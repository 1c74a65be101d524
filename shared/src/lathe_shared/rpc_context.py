"""What a handler may know about the RPC that it serves, beside the request.

``current_rpc`` is how the log and our own clients find the RPC that the running task works for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from lathe_shared.http2.ended_by import EndedBy
from lathe_shared.request_metadata import NO_METADATA, REQUEST_METADATA_KEY, RequestMetadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpclib.metadata import Deadline

__all__ = ["NO_HEADERS", "EndedBy", "RpcContext", "bind_request_metadata", "current_rpc"]

NO_HEADERS: Mapping[str, str | bytes] = MappingProxyType({})


@dataclass(slots=True)
class RpcContext:
    """One RPC, as its handler sees it.

    Attributes:
        method: Full name, such as ``/google.bytestream.ByteStream/Read``.
        peer: Address of the client, for the log.
        metadata: The client's headers, without those of HTTP/2 and gRPC; values of ``-bin`` headers are bytes.
        deadline: When the client stops waiting; None if it never does.
    """

    method: str
    peer: str = ""
    metadata: Mapping[str, str | bytes] = field(default_factory=lambda: NO_HEADERS)
    deadline: Deadline | None = None
    find_ended_by: Callable[[], EndedBy | None] = field(default=lambda: None, repr=False)
    _request_metadata: RequestMetadata | None = field(default=None, repr=False)

    @property
    def request_metadata_wire(self) -> bytes:
        """The serialized RequestMetadata as the client sent it; empty if it sent none."""
        value = self.metadata.get(REQUEST_METADATA_KEY, b"")
        return value if isinstance(value, bytes) else b""

    @property
    def request_metadata(self) -> RequestMetadata:
        """The client's RequestMetadata, decoded when first asked for."""
        if self._request_metadata is None:
            data = self.request_metadata_wire
            self._request_metadata = RequestMetadata.parse(data) if data else NO_METADATA
        return self._request_metadata

    @property
    def ended_by(self) -> EndedBy | None:
        """Why the handler is being cancelled; None while nothing has ended the RPC.

        Meant for ``except asyncio.CancelledError`` and ``finally``: a cancelled Execute frees its action at once,
        while a lost connection gives the client time to come back.
        """
        ended_by = self.find_ended_by()
        if ended_by is None and self.deadline is not None and self.deadline.time_remaining() <= 0:
            return EndedBy.DEADLINE
        return ended_by


current_rpc: ContextVar[RpcContext | None] = ContextVar("current_rpc", default=None)
"""The RPC that the running task works for. Tasks started by a handler inherit it."""


def bind_request_metadata(wire: bytes) -> None:
    """Let the running task work for a client whose RequestMetadata came by another way than a header.

    Its log lines then name that client's invocation and action, and our clients pass the metadata on.

    Args:
        wire: The serialized RequestMetadata.
    """
    current_rpc.set(RpcContext(method="", metadata={REQUEST_METADATA_KEY: wire} if wire else NO_HEADERS))
