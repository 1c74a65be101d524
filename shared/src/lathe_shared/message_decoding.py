"""Parse a client's bytes into a betterproto message, accepting and refusing what google-protobuf does.

betterproto alone would take bytes that are cut off, put a number where a string belongs and stumble over groups; the
error would then surface somewhere in a handler. So the bytes are first walked with the message class's own field
numbers: unknown fields are left out, singular messages that occur twice are joined (which merges them), and what is
malformed is refused in the client's terms. Meant for RPCs that are not hot.

Spec: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import datetime
from typing import TypeVar

import betterproto

from lathe_shared.wire import (
    FIXED32,
    FIXED64,
    LENGTH_DELIMITED,
    VARINT,
    MalformedMessageError,
    message_field,
    read_varint,
    scan,
    text,
    varint,
)

MessageT = TypeVar("MessageT", bound=betterproto.Message)

MAX_DEPTH = 100
"""Nesting of messages that google-protobuf accepts by default."""

_WIRE_TYPES = {
    **dict.fromkeys(
        ("enum", "bool", "int32", "int64", "uint32", "uint64", "sint32", "sint64"),
        VARINT,
    ),
    **dict.fromkeys(("float", "fixed32", "sfixed32"), FIXED32),
    **dict.fromkeys(("double", "fixed64", "sfixed64"), FIXED64),
    **dict.fromkeys(("string", "bytes", "message", "map"), LENGTH_DELIMITED),
}
_FIXED_WIDTHS = {FIXED32: 4, FIXED64: 8}


def decode(message_class: type[MessageT], data: bytes) -> MessageT:
    """Parse a message that came from outside.

    Raises:
        MalformedMessageError: The bytes are no message of this type; an ``InvalidArgumentError``.
    """
    if not data:
        return message_class()
    known = _known_fields(message_class, data, 0, len(data), 0)
    try:
        return message_class().parse(known)
    except (ValueError, OverflowError) as error:
        # A time or duration that datetime cannot express is all that is left to go wrong.
        raise MalformedMessageError(f"{message_class.__name__}: {error}") from None


def _known_fields(message_class: type[betterproto.Message], data: bytes, start: int, end: int, depth: int) -> bytes:
    """Return the message's bytes without what its class does not know, nested messages included."""
    if depth > MAX_DEPTH:
        raise MalformedMessageError(f"messages are nested more than {MAX_DEPTH} deep")
    metadata = message_class._betterproto  # noqa: SLF001 -- betterproto has no public descriptors
    parts: list[bytes] = []
    singular_messages: dict[int, bytes] = {}
    for tag, a, b in scan(data, start, end):
        number, wire_type = tag >> 3, tag & 7
        name = metadata.field_name_by_number.get(number)
        if name is None:
            continue
        field = metadata.meta_by_field_name[name]
        natural = _WIRE_TYPES[field.proto_type]
        repeated = metadata.default_gen[name] is list
        if wire_type == VARINT:
            if natural == VARINT:
                parts.append(varint(tag) + varint(a))
        elif wire_type != LENGTH_DELIMITED:
            if natural == wire_type:
                parts.append(varint(tag) + data[a:b])
        elif natural != LENGTH_DELIMITED:
            if repeated:  # packed; not so a singular number in a length-delimited field, which counts as unknown
                parts.append(message_field(number, _packed(data, a, b, natural)))
        elif field.proto_type in ("message", "map"):
            nested = _nested(metadata.cls_by_field[name], field.wraps, data, a, b, depth)
            if repeated or field.proto_type == "map":
                parts.append(message_field(number, nested))
            else:
                singular_messages[number] = singular_messages.get(number, b"") + nested
        else:
            if field.proto_type == "string":
                text(data, a, b)
            parts.append(message_field(number, data[a:b]))
    # Where the last member of a oneof counts, a message stands behind the scalars: no message of ours mixes the two.
    parts.extend(message_field(number, nested) for number, nested in singular_messages.items())
    return b"".join(parts)


def _nested(field_class: type, wraps: str | None, data: bytes, start: int, end: int, depth: int) -> bytes:
    if wraps is None and issubclass(field_class, betterproto.Message):
        return _known_fields(field_class, data, start, end, depth + 1)
    # Timestamp, Duration and wrapped values: betterproto has native types in their place, all with scalars only.
    parts = []
    for tag, a, b in scan(data, start, end):
        if issubclass(field_class, (datetime.datetime, datetime.timedelta)) and tag in (0x08, 0x10):
            parts.append(varint(tag) + varint(a))
        elif tag >> 3 == 1 and wraps is not None:
            natural = _WIRE_TYPES.get(wraps)
            if tag & 7 == VARINT == natural:
                parts.append(varint(tag) + varint(a))
            elif tag & 7 == natural == LENGTH_DELIMITED:
                if wraps == "string":
                    text(data, a, b)
                parts.append(message_field(1, data[a:b]))
            elif tag & 7 == natural:
                parts.append(varint(tag) + data[a:b])
    return b"".join(parts)


def _packed(data: bytes, start: int, end: int, wire_type: int) -> bytes:
    """Check a packed field and write its varints in at most ten bytes each."""
    width = _FIXED_WIDTHS.get(wire_type)
    if width is not None:
        if (end - start) % width:
            raise MalformedMessageError(f"a packed field of {width}-byte numbers has {end - start} bytes")
        return data[start:end]
    parts = []
    while start < end:
        value, start = read_varint(data, start, end)
        parts.append(varint(value))
    return b"".join(parts)
