"""ByteStream resource names: which blob a Read is for, which upload a Write is for.

The forms, where brackets enclose what may be absent::

    [instance/]blobs/[function/]hash/size[/anything]                             Read
    [instance/]compressed-blobs/compressor/[function/]hash/uncompressed_size     Read
    [instance/]uploads/upload_id/blobs/[function/]hash/size[/anything]           Write, QueryWriteStatus
    [instance/]uploads/upload_id/compressed-blobs/compressor/[function/]hash/uncompressed_size[/anything]

An instance name may hold slashes and a client may append what it likes after the size, so a name is read from its
right end: the last resource word that a well-formed digest follows is the one that counts.

Spec: REAPI, ContentAddressableStorage, resource names of ByteStream.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.instance_name import check_well_formed

if TYPE_CHECKING:
    from collections.abc import Collection

FIELD = "resource_name"
MAX_LENGTH = 4096
"""Longest accepted resource name in characters: the longest instance name and room for the rest."""

_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
# What nearly all clients write: SHA-256 without its segment, nothing after the size, and a size that surely fits. The
# greedy instance name makes the last resource word the one that counts.
_PLAIN_BLOB = r"blobs/([0-9a-f]{64})/(0|[1-9][0-9]{0,17})"
_PLAIN_READ = re.compile(rf"(?:(.+)/)?{_PLAIN_BLOB}", re.ASCII | re.DOTALL)
_PLAIN_WRITE = re.compile(rf"(?:(.+)/)?uploads/([^/]+)/{_PLAIN_BLOB}", re.ASCII | re.DOTALL)
_FUNCTION_SEGMENTS = frozenset(
    {"sha256", "sha1", "md5", "vso", "sha384", "sha512", "murmur3", "sha256tree", "blake3", "gitsha1"}
)
_COMPRESSORS = {compressor.segment: compressor for compressor in Compressor if compressor is not Compressor.IDENTITY}
_SERVED_SEGMENTS = {function.segment: function for function in DigestFunction}


@dataclass(frozen=True, slots=True)
class ReadResource:
    """What a ByteStream.Read names.

    Attributes:
        instance_name: May be empty.
        digest: The blob, always by its uncompressed bytes.
        compressor: The form that the bytes travel in.
    """

    instance_name: str
    digest: Digest
    compressor: Compressor = Compressor.IDENTITY


@dataclass(frozen=True, slots=True)
class WriteResource:
    """What a ByteStream.Write names.

    Attributes:
        instance_name: May be empty.
        upload_id: The client's choice, by which an interrupted upload is found again.
        digest: The blob, always by its uncompressed bytes.
        compressor: The form that the bytes travel in.
    """

    instance_name: str
    upload_id: str
    digest: Digest
    compressor: Compressor = Compressor.IDENTITY


def parse_read(name: str, offered: Collection[DigestFunction] = tuple(DigestFunction)) -> ReadResource:
    """Take apart the resource name of a Read.

    Args:
        name: As it came from the wire.
        offered: The digest functions that the service offers.

    Raises:
        InvalidArgumentError: The name has none of the forms, or a part of it is malformed.
    """
    if DigestFunction.SHA256 in offered and len(name) <= MAX_LENGTH and (plain := _PLAIN_READ.fullmatch(name)):
        instance_name, hash_, size = plain.groups("")
        check_well_formed(instance_name)
        return ReadResource(instance_name, Digest(hash_, int(size)))
    segments = _segments(name)
    first_error: InvalidArgumentError | None = None
    for index in _blob_words(segments):
        try:
            digest, compressor = _blob(name, segments[index:], offered)
            return ReadResource(_instance_name(segments[:index]), digest, compressor)
        except InvalidArgumentError as error:
            first_error = first_error or error
    raise first_error or InvalidArgumentError(FIELD, f"{_shorten(name)} is not [instance/]blobs/[function/]hash/size")


def parse_write(name: str, offered: Collection[DigestFunction] = tuple(DigestFunction)) -> WriteResource:
    """Take apart the resource name of a Write or a QueryWriteStatus.

    Args:
        name: As it came from the wire.
        offered: The digest functions that the service offers.

    Raises:
        InvalidArgumentError: The name has none of the forms, or a part of it is malformed.
    """
    if DigestFunction.SHA256 in offered and len(name) <= MAX_LENGTH and (plain := _PLAIN_WRITE.fullmatch(name)):
        instance_name, upload_id, hash_, size = plain.groups("")
        check_well_formed(instance_name)
        return WriteResource(instance_name, upload_id, Digest(hash_, int(size)))
    segments = _segments(name)
    first_error: InvalidArgumentError | None = None
    for index in _blob_words(segments):
        if index < 2 or segments[index - 2] != "uploads":
            continue
        try:
            digest, compressor = _blob(name, segments[index:], offered)
            upload_id = segments[index - 1]
            if not upload_id:
                raise InvalidArgumentError(FIELD, f"{_shorten(name)} has an empty upload id")
            return WriteResource(_instance_name(segments[: index - 2]), upload_id, digest, compressor)
        except InvalidArgumentError as error:
            first_error = first_error or error
    raise first_error or InvalidArgumentError(
        FIELD, f"{_shorten(name)} is not [instance/]uploads/id/blobs/[function/]hash/size"
    )


def format_read(digest: Digest, instance_name: str = "", compressor: Compressor = Compressor.IDENTITY) -> str:
    """Write the resource name of a Read."""
    return _prefix(instance_name) + _format_blob(digest, compressor)


def format_write(
    digest: Digest, upload_id: str, instance_name: str = "", compressor: Compressor = Compressor.IDENTITY
) -> str:
    """Write the resource name of a Write.

    Args:
        digest: The blob to upload.
        upload_id: One path segment, unique for this upload; usually a UUID.
        instance_name: May be empty.
        compressor: The form that the bytes travel in.
    """
    return f"{_prefix(instance_name)}uploads/{upload_id}/{_format_blob(digest, compressor)}"


def _segments(name: str) -> list[str]:
    if len(name) > MAX_LENGTH:
        raise InvalidArgumentError(FIELD, f"{len(name)} characters are more than {MAX_LENGTH}")
    return name.split("/")


def _blob_words(segments: list[str]) -> list[int]:
    """Return where a blob may begin, the rightmost place first."""
    return [i for i in range(len(segments) - 1, -1, -1) if segments[i] in ("blobs", "compressed-blobs")]


def _blob(name: str, segments: list[str], offered: Collection[DigestFunction]) -> tuple[Digest, Compressor]:
    """Parse ``blobs/…`` or ``compressed-blobs/…`` into a digest and a compressor."""
    rest = segments[1:]
    compressor = Compressor.IDENTITY
    if segments[0] == "compressed-blobs" and rest:
        segment = rest.pop(0)
        if segment not in _COMPRESSORS:
            known = ", ".join(_COMPRESSORS)
            raise InvalidArgumentError(FIELD, f"{_shorten(name)}: compressor {segment[:40]!r} is not one of {known}")
        compressor = _COMPRESSORS[segment]
    if len(rest) < 2 or (rest[0] in _FUNCTION_SEGMENTS and len(rest) < 3):
        raise InvalidArgumentError(FIELD, f"{_shorten(name)} ends before its hash and size")
    if rest[0] in _FUNCTION_SEGMENTS:
        named = _SERVED_SEGMENTS.get(rest[0])
        if named is None or named not in offered:
            known = ", ".join(sorted(function.segment for function in offered))
            raise InvalidArgumentError(FIELD, f"digest function {rest[0]!r} is not one of {known}")
        function = named
        rest = rest[1:]
    else:
        function = _infer(name, rest[0], offered)
    if not _SIZE.fullmatch(rest[1]):
        raise InvalidArgumentError(
            FIELD, f"{_shorten(name)} has the size {rest[1][:40]!r}, which is no number of bytes"
        )
    return Digest.parse(rest[0], int(rest[1]), function, FIELD), compressor


def _infer(name: str, hash_: str, offered: Collection[DigestFunction]) -> DigestFunction:
    try:
        return select_function(0, len(hash_), offered)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(FIELD, f"{_shorten(name)}: {error.reason}") from None


def _instance_name(segments: list[str]) -> str:
    name = "/".join(segments)
    if segments and not name:
        raise InvalidArgumentError(FIELD, "begins with a slash; an empty instance name has none after it")
    check_well_formed(name)
    return name


def _prefix(instance_name: str) -> str:
    return f"{instance_name}/" if instance_name else ""


def _format_blob(digest: Digest, compressor: Compressor) -> str:
    word = "blobs" if compressor is Compressor.IDENTITY else f"compressed-blobs/{compressor.segment}"
    function = "" if digest.function.is_told_by_length else f"{digest.function.segment}/"
    return f"{word}/{function}{digest}"


def _shorten(name: str) -> str:
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}… ({len(name)} characters)"
