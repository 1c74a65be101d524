"""What HTTP/2 asks of the fields of a message, and the few of them that the connection itself needs.

A message that breaks these rules is malformed: a stream error of type PROTOCOL_ERROR, never a guess at what was meant.

Spec: RFC 9113 sections 8.1 to 8.3.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lathe_shared.http2.hpack import Field, HeaderBlock

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_BAD_VALUE: Final = re.compile(rb"[\x00\r\n]|^[ \t]|[ \t]$")
_CONNECTION_SPECIFIC: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_REQUEST_PSEUDO: Final = frozenset({b":method", b":scheme", b":path", b":authority"})
_RESPONSE_PSEUDO: Final = frozenset({b":status"})
_NO_PSEUDO: Final[frozenset[bytes]] = frozenset()
_NEEDED_OF_REQUEST: Final = (b":method", b":scheme", b":path")

_good_names: Final[set[bytes]] = set()
"""Names that were checked before. Bounded, since peers choose them."""

_MAX_GOOD_NAMES: Final = 1000


class MalformedMessageError(Exception):
    """The fields break a rule; the message says which."""


class CheckedHeaders:
    """Fields that obey the rules.

    Attributes:
        fields: Names and values as text, pseudo-header fields first.
        pseudo: The pseudo-header fields.
        content_length: What content-length says; -1 without one.
    """

    __slots__ = ("content_length", "fields", "pseudo")

    def __init__(self, fields: list[tuple[str, str]], pseudo: dict[bytes, bytes], content_length: int) -> None:
        self.fields = fields
        self.pseudo = pseudo
        self.content_length = content_length

    @property
    def is_informational(self) -> bool:
        """Whether this is a response with a status of 1xx, which another one follows."""
        return self.pseudo.get(b":status", b"").startswith(b"1")


def check_request(block: HeaderBlock) -> CheckedHeaders:
    """Return the fields of a request.

    Raises:
        MalformedMessageError: They break a rule.
    """
    if block.checked is None:
        checked = _check(block.fields, _REQUEST_PSEUDO)
        pseudo = checked.pseudo
        if pseudo.get(b":method") == b"CONNECT":
            if b":scheme" in pseudo or b":path" in pseudo or not pseudo.get(b":authority"):
                raise MalformedMessageError("CONNECT takes an authority only")
        else:
            for name in _NEEDED_OF_REQUEST:
                if not pseudo.get(name):
                    raise MalformedMessageError(f"request without {name.decode()}")
        block.checked = checked
    return _typed(block.checked)


def check_response(block: HeaderBlock) -> CheckedHeaders:
    """Return the fields of a response.

    Raises:
        MalformedMessageError: They break a rule.
    """
    if block.checked is None:
        checked = _check(block.fields, _RESPONSE_PSEUDO)
        status = checked.pseudo.get(b":status", b"")
        if len(status) != 3 or not status.isdigit():
            raise MalformedMessageError("response without a :status of three digits")
        if status == b"101":
            raise MalformedMessageError("HTTP/2 has no 101")
        block.checked = checked
    return _typed(block.checked)


def check_trailers(block: HeaderBlock) -> CheckedHeaders:
    """Return the fields of trailers.

    Raises:
        MalformedMessageError: They break a rule.
    """
    # Not kept in ``checked``: the same block as a request's would not be malformed.
    return _check(block.fields, _NO_PSEUDO)


def _typed(checked: object) -> CheckedHeaders:
    if not isinstance(checked, CheckedHeaders):
        raise TypeError(checked)
    return checked


def _check(fields: list[Field], allowed_pseudo: frozenset[bytes]) -> CheckedHeaders:
    pseudo: dict[bytes, bytes] = {}
    text: list[tuple[str, str]] = []
    content_length = -1
    regular = False
    for name, value in fields:
        if name.startswith(b":"):
            if regular:
                raise MalformedMessageError("pseudo-header field after a regular one")
            if name not in allowed_pseudo or name in pseudo:
                raise MalformedMessageError(f"pseudo-header field {name[:40]!r} unknown here, or twice")
            pseudo[name] = value
        else:
            regular = True
            if name not in _good_names:
                _check_name(name)
            if name == b"te" and value != b"trailers" and allowed_pseudo is not _REQUEST_PSEUDO:
                # In a request it is left to gRPC, which answers with HTTP 400 as section 8.1.1 allows.
                raise MalformedMessageError("te other than trailers")
            if name == b"content-length":
                content_length = _parse_length(value, content_length)
        if _BAD_VALUE.search(value):
            raise MalformedMessageError(f"forbidden character in the value of {name[:40]!r}")
        text.append((name.decode("latin-1"), value.decode("latin-1")))
    return CheckedHeaders(text, pseudo, content_length)


def _check_name(name: bytes) -> None:
    if _NAME.fullmatch(name) is None:
        raise MalformedMessageError(f"forbidden character in the field name {name[:40]!r}")
    if name in _CONNECTION_SPECIFIC:
        raise MalformedMessageError(f"connection-specific field {name.decode()}")
    if len(_good_names) < _MAX_GOOD_NAMES and len(name) <= 64:
        _good_names.add(name)


def _parse_length(value: bytes, earlier: int) -> int:
    if not value.isdigit() or len(value) > 18:
        raise MalformedMessageError("content-length that is no number")
    length = int(value)
    if earlier not in (-1, length):
        raise MalformedMessageError("two different content-length fields")
    return length
