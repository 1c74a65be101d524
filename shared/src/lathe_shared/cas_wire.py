"""Requests and responses of the CAS, ByteStream and ActionCache, read and written as bytes.

These pass by the thousand each second or carry megabytes; as message objects they would cost more than the work itself
(docs/adr/0004-bytes-on-the-hot-paths.md has the figures). Where a client's message comes back in a response, the bytes
that arrived come back.

Spec: REAPI, ContentAddressableStorage and ActionCache; google/bytestream/bytestream.proto.
"""

from __future__ import annotations

import re
import struct
from binascii import unhexlify
from typing import TYPE_CHECKING, NamedTuple

from lathe_shared.digest import Digest, DigestFunction, select_function
from lathe_shared.wire import (
    MalformedMessageError,
    bytes_field,
    message_field,
    read_varint,
    scan,
    signed_32,
    signed_64,
    string_field,
    text,
    varint,
    varint_field,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

ALL_FUNCTIONS = tuple(DigestFunction)

# A length-delimited field 2 that holds a SHA-256 Digest as every client writes it: the hash, then the size unless zero.
# The length byte says how long the size's varint is (66 without one), so it is spelled out for one to five bytes; sizes
# of 32 GiB and more take the general path. That the hashes are hexadecimal is checked over all of them at once.
_DIGEST_ITEM = (
    rb"\x12(?:\x45\x0a\x40.{64}\x10[\x80-\xff][\x01-\x7f]"
    rb"|\x46\x0a\x40.{64}\x10[\x80-\xff]{2}[\x01-\x7f]"
    rb"|\x44\x0a\x40.{64}\x10[\x01-\x7f]"
    rb"|\x47\x0a\x40.{64}\x10[\x80-\xff]{3}[\x01-\x7f]"
    rb"|\x48\x0a\x40.{64}\x10[\x80-\xff]{4}[\x01-\x7f]"
    rb"|\x42\x0a\x40.{64})"
)
_PLAIN_DIGESTS = re.compile(rb"(?:" + _DIGEST_ITEM + rb")*+", re.DOTALL)
# Only ever run over what _PLAIN_DIGESTS matched whole, where each item begins at the previous one's end. In an item the
# hash stands from byte 4 to 68, and the size's field behind it: slices of items cost less than groups.
_DIGEST_ITEMS = re.compile(rb"\x12.\x0a\x40.{64}(?:\x10[\x80-\xff]*[\x01-\x7f])?", re.DOTALL)
_LOWER_HEXADECIMAL = b"0123456789abcdef"
_SHA256_KEY_PREFIX = bytes((DigestFunction.SHA256,))
_SHA256_PREFIX = _SHA256_KEY_PREFIX.hex().encode()
_SHA256_KEYS = struct.Struct("33s")

# What has one digest is matched whole: name, digest, and what follows in each request. That the name has the length it
# claims is checked afterwards.
_ONE_DIGEST = rb"(?:\x0a([\x01-\x7f])(.{1,127}?))?(" + _DIGEST_ITEM + rb")"
_FIND_ONE = re.compile(_ONE_DIGEST + rb"(?:\x18\x01)?", re.DOTALL)
_GET_ACTION_RESULT = re.compile(_ONE_DIGEST + rb"(\x18\x01)?(\x20\x01)?(?:\x30\x01)?", re.DOTALL)
_ONE_DIGEST_BYTES = 2 + 127 + 75 + 6
"""No request with one digest is longer, and behind more bytes these patterns need not look for one."""


class RequestedBlob(NamedTuple):
    """One digest out of a request, ready for look-up and for the response.

    Attributes:
        item: The field as it stood in the request: tag, length and Digest. Field 2 in the request, it is field 2 of
            FindMissingBlobsResponse, too.
        key: ``Digest.key``.
        size_bytes: The Digest's size.
    """

    item: bytes
    key: bytes
    size_bytes: int


class FindMissingRequest(NamedTuple):
    """FindMissingBlobsRequest, checked."""

    instance_name: str
    function: DigestFunction
    blobs: Sequence[RequestedBlob] | Sequence[tuple[bytes, bytes, int]]


def read_find_missing(data: bytes, offered: Collection[DigestFunction] = ALL_FUNCTIONS) -> FindMissingRequest:
    """Read a FindMissingBlobsRequest.

    Args:
        data: The serialized request.
        offered: The digest functions that the service offers.

    Raises:
        MalformedMessageError: The bytes are no such message.
        InvalidArgumentError: A digest is malformed, or its function is not offered.
    """
    return _read_plain_find_missing(data, offered) or _read_any_find_missing(data, offered)


def _read_plain_find_missing(data: bytes, offered: Collection[DigestFunction]) -> FindMissingRequest | None:
    """Read a request of the form that clients send: name, SHA-256 digests, function. None if it has another form."""
    if DigestFunction.SHA256 not in offered:
        return None
    if len(data) <= _ONE_DIGEST_BYTES and (match := _FIND_ONE.fullmatch(data)) is not None:
        return _find_one(match)
    start, end = 0, len(data)
    name = ""
    if data[:1] == b"\x0a" and end > 1 and data[1] < 0x80:
        start = 2 + data[1]
        if start > end:
            return None
        name = text(data, 2, start)
    if data[-2:] == b"\x18\x01" and end - start >= 2:
        end -= 2
    if start == end or not _PLAIN_DIGESTS.fullmatch(data, start, end):
        return None
    items = _DIGEST_ITEMS.findall(data, start, end)
    hashes = _SHA256_PREFIX + _SHA256_PREFIX.join([item[4:68] for item in items])
    if hashes.translate(None, _LOWER_HEXADECIMAL):
        return None
    keys = [key for (key,) in _SHA256_KEYS.iter_unpack(unhexlify(hashes))]
    sizes = [_PLAIN_SIZES[item[68:]] for item in items]
    return FindMissingRequest(name, DigestFunction.SHA256, list(zip(items, keys, sizes, strict=True)))


def _find_one(match: re.Match[bytes]) -> FindMissingRequest | None:
    name_length, name, item = match.groups()
    hash_ = item[4:68]
    if (name and name_length[0] != len(name)) or hash_.translate(None, _LOWER_HEXADECIMAL):
        return None
    blob = (item, _SHA256_KEY_PREFIX + unhexlify(hash_), _PLAIN_SIZES[item[68:]])
    return FindMissingRequest(text(name, 0, len(name)) if name else "", DigestFunction.SHA256, [blob])


class _PlainSizes(dict[bytes, int]):
    """Sizes by their fields, decoded when first seen: a build asks for the same blobs over and over.

    The bound keeps a client that asks for ever new sizes from growing it.
    """

    _LIMIT = 1 << 16

    def __missing__(self, field: bytes) -> int:
        if len(self) >= self._LIMIT:
            self.clear()
        value = self[field] = read_varint(field, 1, len(field))[0] if field else 0
        return value


_PLAIN_SIZES = _PlainSizes()


def _read_any_find_missing(data: bytes, offered: Collection[DigestFunction]) -> FindMissingRequest:
    name = ""
    function_value = 0
    raw: list[bytes] = []
    for tag, a, b in scan(data):
        if tag == 0x12:
            raw.append(data[a:b])
        elif tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x18:
            function_value = signed_32(a)
    parsed = [read_digest(item) for item in raw]
    function = _function(function_value, (hash_ for hash_, _ in parsed), offered)
    blobs = []
    for index, ((hash_, size_bytes), item) in enumerate(zip(parsed, raw, strict=True)):
        digest = Digest.parse(hash_, size_bytes, function, f"blob_digests[{index}]")
        blobs.append(RequestedBlob(message_field(2, item), digest.key, size_bytes))
    return FindMissingRequest(name, function, blobs)


def read_digest(data: bytes, start: int = 0, end: int | None = None) -> tuple[str, int]:
    """Read a Digest message into hash and size, both unchecked.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    hash_, size_bytes = "", 0
    for tag, a, b in scan(data, start, end):
        if tag == 0x0A:
            hash_ = text(data, a, b)
        elif tag == 0x10:
            size_bytes = signed_64(a)
    return hash_, size_bytes


def _function(value: int, hashes: Iterable[str], offered: Collection[DigestFunction]) -> DigestFunction:
    """Choose the digest function of a request with many digests: as named, else by the first hash."""
    first = next(iter(hashes), None)
    if first is None and not value:
        return next(iter(offered))
    return select_function(value, len(first or ""), offered, "blob_digests[0]")


class BatchUpdateItem(NamedTuple):
    """One blob of a BatchUpdateBlobsRequest; hash and size are unchecked, since each blob gets a status of its own."""

    digest_wire: bytes
    hash: str
    size_bytes: int
    data: memoryview
    compressor: int


class BatchUpdateRequest(NamedTuple):
    """BatchUpdateBlobsRequest."""

    instance_name: str
    function_value: int
    items: Sequence[BatchUpdateItem]


def read_batch_update(data: bytes) -> BatchUpdateRequest:
    """Read a BatchUpdateBlobsRequest; the blobs' bytes stay views into it.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    name = ""
    function_value = 0
    items = []
    view = memoryview(data)
    for tag, a, b in scan(data):
        if tag == 0x12:
            items.append(_read_batch_update_item(data, view, a, b))
        elif tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x28:
            function_value = signed_32(a)
    return BatchUpdateRequest(name, function_value, items)


def _read_batch_update_item(data: bytes, view: memoryview, start: int, end: int) -> BatchUpdateItem:
    digest = b""
    blob = view[0:0]
    compressor = 0
    for tag, a, b in scan(data, start, end):
        if tag == 0x0A:
            digest += data[a:b]
        elif tag == 0x12:
            blob = view[a:b]
        elif tag == 0x18:
            compressor = signed_32(a)
    hash_, size_bytes = read_digest(digest)
    return BatchUpdateItem(digest, hash_, size_bytes, blob, compressor)


class BatchReadRequest(NamedTuple):
    """BatchReadBlobsRequest; each digest as its serialized bytes, hash and size, unchecked."""

    instance_name: str
    function_value: int
    digests: Sequence[tuple[bytes, str, int]]
    acceptable_compressors: Sequence[int]


def read_batch_read(data: bytes) -> BatchReadRequest:
    """Read a BatchReadBlobsRequest.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    name = ""
    function_value = 0
    digests = []
    compressors: list[int] = []
    for tag, a, b in scan(data):
        if tag == 0x12:
            digests.append((data[a:b], *read_digest(data, a, b)))
        elif tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x18:
            compressors.append(signed_32(a))
        elif tag == 0x1A:
            compressors.extend(_packed(data, a, b))
        elif tag == 0x20:
            function_value = signed_32(a)
    return BatchReadRequest(name, function_value, digests, compressors)


def _packed(data: bytes, position: int, end: int) -> list[int]:
    values = []
    while position < end:
        value, position = read_varint(data, position, end)
        values.append(signed_32(value))
    return values


class ActionResultRequest(NamedTuple):
    """GetActionResultRequest, checked; what it asks to have inlined is a wish that a server may decline."""

    instance_name: str
    digest: Digest
    inline_stdout: bool
    inline_stderr: bool
    inline_output_files: Sequence[str]


def read_get_action_result(data: bytes, offered: Collection[DigestFunction] = ALL_FUNCTIONS) -> ActionResultRequest:
    """Read a GetActionResultRequest.

    Raises:
        MalformedMessageError: The bytes are no such message.
        InvalidArgumentError: The digest is malformed, or its function is not offered.
    """
    return _read_plain_get_action_result(data, offered) or _read_any_get_action_result(data, offered)


def _read_plain_get_action_result(data: bytes, offered: Collection[DigestFunction]) -> ActionResultRequest | None:
    """Read a request of the form that clients send. None if it has another form."""
    if DigestFunction.SHA256 not in offered or len(data) > _ONE_DIGEST_BYTES:
        return None
    match = _GET_ACTION_RESULT.fullmatch(data)
    if match is None:
        return None
    name_length, name, item, inline_stdout, inline_stderr = match.groups()
    hash_ = item[4:68]
    if (name and name_length[0] != len(name)) or hash_.translate(None, _LOWER_HEXADECIMAL):
        return None
    digest = Digest(hash_.decode(), _PLAIN_SIZES[item[68:]])
    decoded_name = text(name, 0, len(name)) if name else ""
    return ActionResultRequest(decoded_name, digest, inline_stdout is not None, inline_stderr is not None, [])


def _read_any_get_action_result(data: bytes, offered: Collection[DigestFunction]) -> ActionResultRequest:
    name, digest = "", b""
    function_value = 0
    inline_stdout = inline_stderr = False
    inline_output_files = []
    for tag, a, b in scan(data):
        if tag == 0x12:
            digest += data[a:b]
        elif tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x18:
            inline_stdout = a != 0
        elif tag == 0x20:
            inline_stderr = a != 0
        elif tag == 0x2A:
            inline_output_files.append(text(data, a, b))
        elif tag == 0x30:
            function_value = signed_32(a)
    checked = _checked_digest(digest, function_value, offered, "action_digest")
    return ActionResultRequest(name, checked, inline_stdout, inline_stderr, inline_output_files)


class UpdateActionResultRequest(NamedTuple):
    """UpdateActionResultRequest, its digest checked and its ActionResult as the bytes that arrived."""

    instance_name: str
    digest: Digest
    action_result: bytes


def read_update_action_result(
    data: bytes, offered: Collection[DigestFunction] = ALL_FUNCTIONS
) -> UpdateActionResultRequest:
    """Read an UpdateActionResultRequest.

    Raises:
        MalformedMessageError: The bytes are no such message. The ActionResult inside is not looked at.
        InvalidArgumentError: The digest is malformed or its function not offered, or there is no action result.
    """
    name, digest, result = "", b"", b""
    has_result = False
    function_value = 0
    for tag, a, b in scan(data):
        if tag == 0x1A:
            result += data[a:b]
            has_result = True
        elif tag == 0x12:
            digest += data[a:b]
        elif tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x22:
            _check_message(data, a, b)
        elif tag == 0x28:
            function_value = signed_32(a)
    if not has_result:
        raise MalformedMessageError("action_result is absent")
    return UpdateActionResultRequest(name, _checked_digest(digest, function_value, offered, "action_digest"), result)


def _check_message(data: bytes, start: int, end: int) -> None:
    for _ in scan(data, start, end):
        pass


class GetTreeRequest(NamedTuple):
    """GetTreeRequest, its digest checked."""

    instance_name: str
    root_digest: Digest
    page_size: int
    page_token: str


def read_get_tree(data: bytes, offered: Collection[DigestFunction] = ALL_FUNCTIONS) -> GetTreeRequest:
    """Read a GetTreeRequest.

    Raises:
        MalformedMessageError: The bytes are no such message.
        InvalidArgumentError: The digest is malformed, or its function is not offered.
    """
    name, token, digest = "", "", b""
    page_size = function_value = 0
    for tag, a, b in scan(data):
        if tag == 0x12:
            digest += data[a:b]
        elif tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x18:
            page_size = signed_32(a)
        elif tag == 0x22:
            token = text(data, a, b)
        elif tag == 0x28:
            function_value = signed_32(a)
    return GetTreeRequest(name, _checked_digest(digest, function_value, offered, "root_digest"), page_size, token)


def _checked_digest(digest: bytes, function_value: int, offered: Collection[DigestFunction], field: str) -> Digest:
    hash_, size_bytes = read_digest(digest)
    function = select_function(function_value, len(hash_), offered, field)
    return Digest.parse(hash_, size_bytes, function, field)


class ReadRequest(NamedTuple):
    """google.bytestream.ReadRequest."""

    resource_name: str
    read_offset: int
    read_limit: int


def read_read_request(data: bytes) -> ReadRequest:
    """Read a ByteStream ReadRequest.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    name, offset, limit = "", 0, 0
    for tag, a, b in scan(data):
        if tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x10:
            offset = signed_64(a)
        elif tag == 0x18:
            limit = signed_64(a)
    return ReadRequest(name, offset, limit)


class WriteRequest(NamedTuple):
    """google.bytestream.WriteRequest; ``data`` is a view into the message."""

    resource_name: str
    write_offset: int
    finish_write: bool
    data: memoryview


def read_write_request(data: bytes) -> WriteRequest:
    """Read a ByteStream WriteRequest.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    name, offset, finish = "", 0, False
    start = end = 0
    for tag, a, b in scan(data):
        if tag == 0x52:
            start, end = a, b
        elif tag == 0x0A:
            name = text(data, a, b)
        elif tag == 0x10:
            offset = signed_64(a)
        elif tag == 0x18:
            finish = a != 0
    return WriteRequest(name, offset, finish, memoryview(data)[start:end])


def read_query_write_status(data: bytes) -> str:
    """Read a QueryWriteStatusRequest and return its resource name.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    name = ""
    for tag, a, b in scan(data):
        if tag == 0x0A:
            name = text(data, a, b)
    return name


def write_request(resource_name: str, write_offset: int, finish_write: bool, data: bytes) -> bytes:
    """Write a ByteStream WriteRequest; a client names the resource in the first message only."""
    head = string_field(1, resource_name) + varint_field(2, write_offset) + varint_field(3, finish_write)
    return b"".join((head, b"\x52", varint(len(data)), data)) if data else head


def read_request(resource_name: str, read_offset: int = 0, read_limit: int = 0) -> bytes:
    """Write a ByteStream ReadRequest."""
    return string_field(1, resource_name) + varint_field(2, read_offset) + varint_field(3, read_limit)


def read_response_prefix(length: int) -> bytes:
    """Return what stands before ``length`` data bytes in a ReadResponse, so that they need not be copied."""
    return b"\x52" + varint(length)


def read_response_data(message: bytes) -> memoryview:
    """Return the data of a ReadResponse as a view into it.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    start = end = 0
    for tag, a, b in scan(message):
        if tag == 0x52:
            start, end = a, b
    return memoryview(message)[start:end]


def write_response(committed_size: int) -> bytes:
    """Write a ByteStream WriteResponse."""
    return varint_field(1, committed_size)


def query_write_status_response(committed_size: int, complete: bool) -> bytes:
    """Write a QueryWriteStatusResponse."""
    return varint_field(1, committed_size) + varint_field(2, complete)


def committed_size(response: bytes) -> int:
    """Return ``committed_size`` of a WriteResponse or a QueryWriteStatusResponse.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    size = 0
    for tag, a, _ in scan(response):
        if tag == 0x08:
            size = signed_64(a)
    return size


def find_missing_request(instance_name: str, digests: Iterable[Digest]) -> bytes:
    """Write a FindMissingBlobsRequest for digests that share one function."""
    parts = [string_field(1, instance_name)]
    function = DigestFunction.SHA256
    for digest in digests:
        parts.append(message_field(2, digest.wire))
        function = digest.function
    parts.append(varint_field(3, function))
    return b"".join(parts)


def find_missing_response_digests(response: bytes) -> list[tuple[str, int]]:
    """Return hash and size of each digest in a FindMissingBlobsResponse.

    Raises:
        MalformedMessageError: The bytes are no such message.
    """
    return [read_digest(response, a, b) for tag, a, b in scan(response) if tag == 0x12]


def rpc_status(code: int, message: str = "") -> bytes:
    """Write a google.rpc.Status without details."""
    return varint_field(1, code) + string_field(2, message)


def batch_read_response_item(digest_wire: bytes, data: bytes, status: bytes, compressor: int = 0) -> bytes:
    """Write one entry of BatchReadBlobsResponse.responses, with its tag, ready to be joined.

    Args:
        digest_wire: The Digest's bytes as requested.
        data: The blob; empty if ``status`` is an error.
        status: A serialized google.rpc.Status; empty for OK.
        compressor: The form of ``data``, zero for plain.
    """
    return message_field(
        1,
        b"".join(
            (message_field(1, digest_wire), bytes_field(2, data), message_field(3, status), varint_field(4, compressor))
        ),
    )


def batch_update_response_item(digest_wire: bytes, status: bytes) -> bytes:
    """Write one entry of BatchUpdateBlobsResponse.responses, with its tag, ready to be joined."""
    return message_field(1, message_field(1, digest_wire) + message_field(2, status))
