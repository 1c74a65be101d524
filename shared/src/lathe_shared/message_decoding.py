"""Parse a client's bytes into a betterproto message, accepting and refusing what google-protobuf does.

betterproto alone would take bytes that are cut off, put a number where a string belongs and stumble over groups; the
error would then surface somewhere in a handler. So the bytes are first walked with the message class's own field
numbers: unknown fields are left out, singular messages that occur twice are joined (which merges them), and what is
malformed is refused in the client's terms. Meant for RPCs that are not hot.

Spec: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import datetime
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import betterproto
from betterproto.lib.google.protobuf import Duration, Timestamp

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

if TYPE_CHECKING:
    from collections.abc import Mapping

MessageT = TypeVar("MessageT", bound=betterproto.Message)

MAX_DEPTH = 100
"""Nesting of messages that google-protobuf accepts by default."""

_WIRE_TYPES = {
    **dict.fromkeys(("enum", "bool", "int32", "int64", "uint32", "uint64", "sint32", "sint64"), VARINT),
    **dict.fromkeys(("float", "fixed32", "sfixed32"), FIXED32),
    **dict.fromkeys(("double", "fixed64", "sfixed64"), FIXED64),
    **dict.fromkeys(("string", "bytes", "message", "map"), LENGTH_DELIMITED),
}
_FIXED_WIDTHS = {FIXED32: 4, FIXED64: 8}
_BITS_32 = frozenset({"int32", "uint32", "sint32", "enum"})

# betterproto has native types in place of these two.
_NATIVE: Mapping[type, type[betterproto.Message]] = {datetime.datetime: Timestamp, datetime.timedelta: Duration}


def decode(message_class: type[MessageT], data: bytes) -> MessageT:
    """Parse a message that came from outside.

    Raises:
        MalformedMessageError: The bytes are no message of this type; an ``InvalidArgumentError``.
    """
    if not data:
        return message_class()
    known = _known_fields(_fields(message_class), data, 0, len(data), 0)
    try:
        return message_class().parse(known)
    except (ValueError, OverflowError) as error:
        # A time or duration that datetime cannot express is all that is left to go wrong.
        raise MalformedMessageError(f"{message_class.__name__}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Field:
    """What a message class knows of one field.

    Attributes:
        wire_type: How a single value is written.
        is_text: Whether it must be UTF-8.
        is_32_bit: Whether varints are cut to 32 bits.
        is_repeated: Whether all values count, and not the last.
        nested: The message type inside, if it is one.
        rivals: Numbers of the other members of its oneof.
    """

    wire_type: int
    is_text: bool = False
    is_32_bit: bool = False
    is_repeated: bool = False
    nested: type[betterproto.Message] | None = None
    wraps: str | None = None
    rivals: tuple[int, ...] = ()


@functools.cache
def _fields(message_class: type[betterproto.Message]) -> dict[int, _Field]:
    message: Any = message_class()
    metadata = message._betterproto  # noqa: SLF001 -- betterproto has no public descriptors
    fields = {}
    for name, field in metadata.meta_by_field_name.items():
        nested = metadata.cls_by_field[name] if field.proto_type in ("message", "map") else None
        group = metadata.oneof_group_by_field.get(name)
        members = metadata.oneof_field_by_group[group] if group else ()
        rivals = tuple(metadata.meta_by_field_name[other.name].number for other in members if other.name != name)
        fields[field.number] = _Field(
            wire_type=_WIRE_TYPES[field.proto_type],
            is_text=field.proto_type == "string",
            is_32_bit=field.proto_type in _BITS_32,
            is_repeated=metadata.default_gen[name] is list or field.proto_type == "map",
            nested=_NATIVE.get(nested, nested) if nested is not None and not field.wraps else None,
            wraps=field.wraps,
            rivals=rivals,
        )
    return fields


@functools.cache
def _wrapper_fields(wraps: str) -> dict[int, _Field]:
    """Return the one field of a message such as google.protobuf.UInt32Value."""
    return {1: _Field(_WIRE_TYPES[wraps], is_text=wraps == "string", is_32_bit=wraps in _BITS_32)}


def _known_fields(fields: Mapping[int, _Field], data: bytes, start: int, end: int, depth: int) -> bytes:
    """Return a message's bytes without what its class does not know, nested messages included."""
    if depth > MAX_DEPTH:
        raise MalformedMessageError(f"messages are nested more than {MAX_DEPTH} deep")
    parts: list[bytes] = []
    singular: dict[int, bytes] = {}
    for tag, a, b in scan(data, start, end):
        number = tag >> 3
        field = fields.get(number)
        if field is None:
            continue
        written = _field(field, tag, data, a, b, depth)
        if written is None:
            continue
        if field.nested is None and not field.wraps:
            parts.append(written)
        elif field.is_repeated:
            parts.append(message_field(number, written))
        else:
            for rival in field.rivals:
                singular.pop(rival, None)
            singular[number] = singular.get(number, b"") + written
    parts.extend(message_field(number, message) for number, message in singular.items())
    return b"".join(parts)


def _field(field: _Field, tag: int, data: bytes, a: int, b: int, depth: int) -> bytes | None:
    """Check one field. Returns it as it should be parsed, a nested message without its tag; None counts as unknown."""
    wire_type = tag & 7
    if wire_type != field.wire_type:
        if wire_type == LENGTH_DELIMITED and field.is_repeated:
            return message_field(tag >> 3, _packed(field, data, a, b))
        return None
    if wire_type == VARINT:
        return varint(tag) + varint(a & 0xFFFFFFFF if field.is_32_bit else a)
    if wire_type != LENGTH_DELIMITED:
        return varint(tag) + data[a:b]
    if field.nested is not None:
        return _known_fields(_fields(field.nested), data, a, b, depth + 1)
    if field.wraps:
        return _known_fields(_wrapper_fields(field.wraps), data, a, b, depth + 1)
    if field.is_text:
        text(data, a, b)
    return message_field(tag >> 3, data[a:b])


def _packed(field: _Field, data: bytes, start: int, end: int) -> bytes:
    """Check a packed field and write its varints in at most ten bytes each."""
    width = _FIXED_WIDTHS.get(field.wire_type)
    if width is not None:
        if (end - start) % width:
            raise MalformedMessageError(f"a packed field of {width}-byte numbers has {end - start} bytes")
        return data[start:end]
    parts = []
    while start < end:
        value, start = read_varint(data, start, end)
        parts.append(varint(value & 0xFFFFFFFF if field.is_32_bit else value))
    return b"".join(parts)
