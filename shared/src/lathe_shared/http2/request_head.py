"""What the headers of a gRPC request say, and what is wrong with them.

Spec: gRPC over HTTP/2 (doc/PROTOCOL-HTTP2.md, Requests).
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import TYPE_CHECKING, Any, Final

from grpclib.const import Status
from grpclib.metadata import decode_timeout
from multidict import MultiDict, MultiDictProxy, MultiMapping

if TYPE_CHECKING:
    from lathe_shared.http2.header_rules import CheckedHeaders

Metadata = MultiMapping[str | bytes]

_NOT_METADATA: Final = frozenset({"te", "content-type", "user-agent"})
_CONTENT_TYPE: Final = "application/grpc"


class Refusal:
    """An answer to what is no gRPC request that can be served.

    Attributes:
        http_status: The HTTP status.
        grpc_status: The gRPC status; None if the client does not speak gRPC.
        message: The status message.
    """

    __slots__ = ("grpc_status", "http_status", "message")

    def __init__(self, http_status: int, grpc_status: Status | None, message: str) -> None:
        self.http_status = http_status
        self.grpc_status = grpc_status
        self.message = message


UNKNOWN_METHOD: Final = Refusal(200, Status.UNIMPLEMENTED, "Method not found")


class RequestHead:
    """A request's headers as gRPC understands them. Equal requests of one connection share one: it is never changed.

    Args:
        headers: The fields.
        peer: Address of the client, as text.
        content_subtype: The codec's, such as ``proto``.

    Attributes:
        fields: All fields.
        path: The method, such as ``/google.bytestream.ByteStream/Read``.
        peer: As given.
        content_type: As the client says it.
        user_agent: As the client says it.
        encoding: How messages with the compressed flag are compressed.
        timeout_seconds: How long the client waits, from when the request arrived; None if it always does.
        refusal: How to answer what cannot be served.
        memo: Whatever an inline method wants to remember; it comes back with equal requests of the connection.
    """

    __slots__ = (
        "_metadata",
        "content_type",
        "encoding",
        "fields",
        "memo",
        "path",
        "peer",
        "refusal",
        "timeout_seconds",
        "user_agent",
    )

    def __init__(self, headers: CheckedHeaders, peer: str, content_subtype: str) -> None:
        self.fields = headers.fields
        known = dict(headers.fields)
        self.path = known.get(":path", "")
        self.peer = peer
        self.content_type = known.get("content-type", "")
        self.user_agent = known.get("user-agent")
        self.encoding = known.get("grpc-encoding", "")
        self.timeout_seconds: float | None = None
        self.refusal: Refusal | None = None
        self.memo: Any = None
        self._metadata: MultiDictProxy[str | bytes] | None = None
        if known.get(":method") != "POST":
            self.refusal = Refusal(405, None, "")
        elif not _is_grpc(self.content_type, content_subtype):
            self.refusal = Refusal(415, Status.UNKNOWN, "content-type is not application/grpc or one of its kind")
        elif known.get("te") != "trailers":
            self.refusal = Refusal(400, Status.UNKNOWN, "the te header is not trailers")
        elif "grpc-timeout" in known:
            self._set_timeout(known["grpc-timeout"])

    def _set_timeout(self, value: str) -> None:
        # At most eight digits: "TimeoutValue" of the specification.
        if len(value) > 9:
            self.refusal = Refusal(200, Status.INVALID_ARGUMENT, "grpc-timeout has more than eight digits")
            return
        try:
            self.timeout_seconds = decode_timeout(value)
        except ValueError:
            self.refusal = Refusal(200, Status.INVALID_ARGUMENT, "grpc-timeout is no number with a unit")

    @property
    def metadata(self) -> Metadata:
        """The client's own headers; values of ``-bin`` headers are bytes, those that are no base64 are left out."""
        if self._metadata is None:
            self._metadata = MultiDictProxy(decode_metadata(self.fields))
        return self._metadata


def _is_grpc(content_type: str, content_subtype: str) -> bool:
    base, _, subtype = content_type.partition("+")
    if not subtype:
        base = base.partition(";")[0].rstrip()
    return base == _CONTENT_TYPE and subtype.partition(";")[0].rstrip() in ("", content_subtype)


def decode_metadata(fields: list[tuple[str, str]]) -> MultiDict[str | bytes]:
    """Return the fields that are the peer's own metadata.

    Spec: gRPC over HTTP/2, Custom-Metadata; a ``-bin`` value may hold several ones with commas between, and may lack
    its padding.
    """
    metadata: MultiDict[str | bytes] = MultiDict()
    for name, value in fields:
        if name.startswith((":", "grpc-")) or name in _NOT_METADATA:
            continue
        if not name.endswith("-bin"):
            metadata.add(name, value)
            continue
        for part in value.split(","):
            try:
                metadata.add(name, b64decode(part.strip() + "=" * (-len(part.strip()) % 4), validate=True))
            except (binascii.Error, ValueError):
                continue
    return metadata
