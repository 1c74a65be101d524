"""Qualifiers: what a Fetch request says of its content beside where it is.

Spec: Remote Asset API, message Qualifier and the qualifier lexicon; Bazel's GrpcRemoteDownloader for its own names.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override

from lathe_protos import rpc
from lathe_shared.digest import DigestFunction
from lathe_shared.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import betterproto

    from lathe_protos import asset

CHECKSUM = "checksum.sri"
DIRECTORY = "directory"
CANONICAL_ID = "bazel.canonical_id"
AUTH_HEADERS = "bazel.auth_headers"
HEADER_PREFIX = "http_header:"
HEADER_OF_URL_PREFIX = "http_header_url:"

_ALGORITHMS = {
    "sha256": DigestFunction.SHA256,
    "sha384": DigestFunction.SHA384,
    "sha512": DigestFunction.SHA512,
    "blake3": DigestFunction.BLAKE3,
    "sha1": DigestFunction.SHA1,
}
"""Spec: W3C, Subresource Integrity, "cryptographic hash functions", has the first three. Bazel's ``integrity`` takes
all of them, and Bazel sends what it was given."""

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
"""Spec: RFC 9110 section 5.6.2, token."""

_OWN_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "host",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that say how a request travels or which host is meant: not a client's affair, and the last is a way around
the list of hosts."""


class Checksum(NamedTuple):
    """One hash that content may have."""

    function: DigestFunction
    hash: str


@dataclass(frozen=True, slots=True)
class FetchTerms:
    """What qualifiers ask for.

    Attributes:
        checksums: The content must have one of them; none means that any content will do.
        headers: Sent with the request, by address.
        subdirectory: Part of an archive that is wanted; empty means all.
    """

    checksums: tuple[Checksum, ...] = ()
    headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    subdirectory: tuple[str, ...] = ()


class UnsupportedQualifiersError(InvalidArgumentError):
    """Qualifiers that nothing is known of, so that nobody can tell whether content meets them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__("qualifiers.name", ", ".join(f'"{name}" not supported' for name in names))
        self._names = names

    @property
    @override
    def details(self) -> Sequence[betterproto.Message]:
        # Spec: Fetch.FetchBlob, on unsupported qualifiers: one violation each, in these words.
        violations = [
            rpc.BadRequestFieldViolation(field="qualifiers.name", description=f'"{name}" not supported')
            for name in self._names
        ]
        return (rpc.BadRequest(field_violations=violations),)


def identity(qualifiers: Sequence[asset.Qualifier]) -> tuple[tuple[str, str], ...]:
    """Return qualifiers in a form that is equal when they say the same.

    Raises:
        InvalidArgumentError: A name is empty or comes twice.
    """
    pairs = sorted((qualifier.name, qualifier.value) for qualifier in qualifiers)
    names = [name for name, _ in pairs]
    if "" in names:
        raise InvalidArgumentError("qualifiers.name", "is empty")
    for name, following in itertools.pairwise(names):
        if name == following:
            raise InvalidArgumentError("qualifiers.name", f"{name!r} comes twice")
    return tuple(pairs)


def fetch_terms(pairs: Sequence[tuple[str, str]], uris: Sequence[str], *, with_directory: bool) -> FetchTerms:
    """Understand the qualifiers of a Fetch request.

    Args:
        pairs: What ``identity`` returned.
        uris: The request's addresses.
        with_directory: Whether a directory is asked for, and so a part of it may be.

    Raises:
        UnsupportedQualifiersError: Some are not known.
        InvalidArgumentError: A value is malformed.
    """
    checksums: tuple[Checksum, ...] = ()
    subdirectory: tuple[str, ...] = ()
    headers: dict[str, dict[str, str]] = {uri: {} for uri in uris}
    unknown: list[str] = []
    for name, value in pairs:
        if name == CHECKSUM:
            checksums = parse_integrity(value)
        elif name == DIRECTORY and with_directory:
            subdirectory = _subdirectory(value)
        elif name == AUTH_HEADERS:
            for uri, more in _auth_headers(value).items():
                headers.setdefault(uri, {}).update(more)
        elif name.startswith(HEADER_PREFIX):
            for of_uri in headers.values():
                of_uri |= _header(name, name.removeprefix(HEADER_PREFIX), value)
        elif name.startswith(HEADER_OF_URL_PREFIX):
            index, _, header = name.removeprefix(HEADER_OF_URL_PREFIX).partition(":")
            if not (index.isascii() and index.isdigit() and len(index) < 6 and int(index) < len(uris)):
                raise InvalidArgumentError("qualifiers.name", f"{name!r} names none of the {len(uris)} uris")
            headers[uris[int(index)]] |= _header(name, header, value)
        elif name != CANONICAL_ID:
            unknown.append(name)
    if unknown:
        raise UnsupportedQualifiersError(unknown)
    return FetchTerms(checksums, headers, subdirectory)


def parse_integrity(value: str) -> tuple[Checksum, ...]:
    """Read Subresource Integrity metadata; what is of an unknown algorithm is passed over, as the specification says.

    Raises:
        InvalidArgumentError: There is none that can be verified.
    """
    checksums = []
    for word in value.split():
        algorithm, _, encoded = word.partition("?")[0].partition("-")
        function = _ALGORITHMS.get(algorithm)
        if function is None:
            continue
        try:
            hash_ = base64.b64decode(encoded, validate=True).hex()
        except binascii.Error:
            hash_ = ""
        if len(hash_) != function.hash_length:
            raise InvalidArgumentError(f"qualifiers.{CHECKSUM}", f"{word[:140]!r} is not a {algorithm} hash in base64")
        checksums.append(Checksum(function, hash_))
    if not checksums:
        raise InvalidArgumentError(
            f"qualifiers.{CHECKSUM}", f"{value[:140]!r} has no checksum by {', '.join(_ALGORITHMS)}"
        )
    return tuple(checksums)


def _subdirectory(value: str) -> tuple[str, ...]:
    parts = tuple(value.split("/"))
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidArgumentError(f"qualifiers.{DIRECTORY}", f"{value[:140]!r} is not a relative path")
    return parts


def _auth_headers(value: str) -> dict[str, dict[str, str]]:
    """Read Bazel's form: a JSON object of headers for each address."""
    try:
        by_uri = json.loads(value)
    except (ValueError, RecursionError):
        by_uri = None
    if not isinstance(by_uri, dict) or not all(isinstance(headers, dict) for headers in by_uri.values()):
        # Never shows the value: it holds passwords.
        raise InvalidArgumentError(f"qualifiers.{AUTH_HEADERS}", "is not a JSON object of objects")
    found: dict[str, dict[str, str]] = {}
    for uri, headers in by_uri.items():
        found[uri] = {}
        for header, text in headers.items():
            found[uri] |= _header(AUTH_HEADERS, header, text)
    return found


def _header(qualifier: str, name: str, value: object) -> dict[str, str]:
    if not _HEADER_NAME.fullmatch(name) or name.lower() in _OWN_HEADERS:
        raise InvalidArgumentError(f"qualifiers.{qualifier}", f"{name[:140]!r} is no header that may be set")
    if not isinstance(value, str) or not all(character.isprintable() or character == "\t" for character in value):
        raise InvalidArgumentError(f"qualifiers.{qualifier}", f"the value of {name!r} is not a line of text")
    return {name: value}
