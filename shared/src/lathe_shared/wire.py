"""Protobuf's wire format by hand: scan and write messages as bytes, without message objects.

This is the floor under ``cas_wire`` and ``tree_wire``, which read the messages that are too frequent or too large to
become objects. Readers accept what google-protobuf accepts: any field order, unknown fields, repeated singular fields
(the last scalar wins, messages merge), groups (skipped), varints longer than needed; a known field number under
another wire type counts as unknown. They refuse what it refuses, always with ``MalformedMessageError``.

Spec: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_shared.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

VARINT = 0
FIXED64 = 1
LENGTH_DELIMITED = 2
START_GROUP = 3
END_GROUP = 4
FIXED32 = 5

MAX_GROUP_DEPTH = 100
"""Nesting that google-protobuf accepts by default."""

MAX_LENGTH_BYTES = 2**31 - 1
"""Longest field that google-protobuf accepts."""

_FIELD_NUMBER_LIMIT = 1 << 29
_MASK_64 = 2**64 - 1
_SIGN_64 = 1 << 63
_SIGN_32 = 1 << 31


class MalformedMessageError(InvalidArgumentError):
    """Bytes that are no message of the type that the RPC takes."""

    def __init__(self, reason: str) -> None:
        super().__init__("message", reason)


def read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Read one varint.

    Args:
        data: The bytes that hold it.
        position: Where it begins.
        end: Where the enclosing message ends.

    Returns:
        The value, unsigned and cut to 64 bits, and the position behind it.

    Raises:
        MalformedMessageError: It runs past ``end`` or past ten bytes.
    """
    value = shift = 0
    limit = min(end, position + 10)
    while position < limit:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK_64, position
        shift += 7
    raise MalformedMessageError(f"a varint does not end before byte {position}")


def scan(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Walk over the fields of one message, in the order they stand.

    Args:
        data: Bytes that hold the message.
        start: Where it begins.
        end: Where it ends; the end of ``data`` if absent.

    Yields:
        ``(tag, a, b)``, ``tag`` being ``number << 3 | wire_type``. For a varint ``a`` is its unsigned value; otherwise
        the payload is ``data[a:b]``. Groups are checked and skipped.

    Raises:
        MalformedMessageError: The bytes are no message.
    """
    position = start
    if end is None:
        end = len(data)
    while position < end:
        tag = data[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = read_varint(data, position, end)
        wire_type = tag & 7
        if not 0 < tag >> 3 < _FIELD_NUMBER_LIMIT:
            raise MalformedMessageError(f"no field has the number {tag >> 3}, at byte {position}")
        if wire_type == LENGTH_DELIMITED:
            if position < end and (length := data[position]) < 0x80:
                position += 1
            else:
                length, position = read_varint(data, position, end)
            stop = position + length
            if stop > end or length > MAX_LENGTH_BYTES:
                raise MalformedMessageError(f"field {tag >> 3} claims {length} bytes where {end - position} are left")
            yield tag, position, stop
            position = stop
        elif wire_type == VARINT:
            value, position = read_varint(data, position, end)
            yield tag, value, 0
        elif wire_type == START_GROUP:
            position = _skip_group(data, position, end, tag >> 3)
        else:
            stop = position + _fixed_width(wire_type)
            if stop > end:
                raise MalformedMessageError(f"field {tag >> 3} is cut off at byte {end}")
            yield tag, position, stop
            position = stop


def _fixed_width(wire_type: int) -> int:
    if wire_type == FIXED64:
        return 8
    if wire_type == FIXED32:
        return 4
    raise MalformedMessageError(f"wire type {wire_type} has no place here")


def _skip_group(data: bytes, position: int, end: int, number: int) -> int:
    """Return the position behind a group whose start tag was just read."""
    open_groups = [number]
    while open_groups:
        tag, position = read_varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        # Zero passes, since google-protobuf does not mind it inside of what it skips.
        if number >= _FIELD_NUMBER_LIMIT:
            raise MalformedMessageError(f"no field has the number {number}, at byte {position}")
        if wire_type == START_GROUP:
            open_groups.append(number)
            if len(open_groups) > MAX_GROUP_DEPTH:
                raise MalformedMessageError(f"groups are nested more than {MAX_GROUP_DEPTH} deep")
        elif wire_type == END_GROUP:
            if open_groups.pop() != number:
                raise MalformedMessageError(f"group {number} ends where another one is open")
        elif wire_type == VARINT:
            _, position = read_varint(data, position, end)
        elif wire_type == LENGTH_DELIMITED:
            length, position = read_varint(data, position, end)
            position += length
        else:
            position += _fixed_width(wire_type)
        if position > end:
            raise MalformedMessageError(f"field {number} is cut off at byte {end}")
    return position


def text(data: bytes, start: int, end: int) -> str:
    """Decode a string field.

    Raises:
        MalformedMessageError: It is not UTF-8.
    """
    try:
        return data[start:end].decode()
    except UnicodeDecodeError as error:
        raise MalformedMessageError(
            f"a string field is not UTF-8: {error.reason} at byte {start + error.start}"
        ) from None


def signed_64(value: int) -> int:
    """Turn a varint's unsigned value into the int64 that it stands for."""
    return value - (1 << 64) if value & _SIGN_64 else value


def signed_32(value: int) -> int:
    """Turn a varint's unsigned value into the int32 or enum value that it stands for."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & _SIGN_32 else value


def varint(value: int) -> bytes:
    """Write a varint; negative numbers take ten bytes, as int64 and int32 fields do."""
    if 0 <= value < 0x80:
        return bytes((value,))
    value &= _MASK_64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def varint_field(number: int, value: int) -> bytes:
    """Write an integer, enum or bool field; nothing if it has its default, zero."""
    return varint(number << 3) + varint(value) if value else b""


def bytes_field(number: int, value: bytes) -> bytes:
    """Write a bytes or string field; nothing if it has its default, empty."""
    return message_field(number, value) if value else b""


def string_field(number: int, value: str) -> bytes:
    """Write a string field; nothing if it has its default, empty."""
    return bytes_field(number, value.encode())


def message_field(number: int, message: bytes) -> bytes:
    """Write a serialized message as a field; an empty message is written, too, since it is present."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(len(message)) + message
