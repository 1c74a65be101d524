"""Encode messages in ways that protobuf allows and that no sane encoder would choose.

Fields come in descending order, unknown ones of every wire type between them, singular scalars twice (the last one
counts), singular messages in two parts (which are merged), repeated scalars unpacked, varints longer than needed; and
so in every message inside.

Spec: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)

# Far above any field that REAPI has.
UNKNOWN_NUMBER = 5_000

_VARINT_TYPES = {
    FieldDescriptor.TYPE_BOOL,
    FieldDescriptor.TYPE_ENUM,
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_UINT64,
}


def varint(value: int, extra_bytes: int = 0) -> bytes:
    """Encode a varint, longer than needed by ``extra_bytes``."""
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    for _ in range(min(extra_bytes, 10 - len(encoded))):
        encoded[-1] |= 0x80
        encoded.append(0)
    return bytes(encoded)


def tag(number: int, wire_type: int) -> bytes:
    """Encode what stands in front of a field's value."""
    return varint(number << 3 | wire_type)


def length_delimited(number: int, data: bytes, extra_bytes: int = 0) -> bytes:
    """Encode a string, bytes or message field, its length longer than needed by ``extra_bytes``."""
    return tag(number, LENGTH) + varint(len(data), extra_bytes) + data


def unknown_fields() -> bytes:
    """Encode one unknown field of each wire type."""
    return b"".join(
        (
            tag(UNKNOWN_NUMBER, VARINT) + varint(2**64 - 1),
            tag(UNKNOWN_NUMBER + 1, FIXED64) + b"\xff" * 8,
            length_delimited(UNKNOWN_NUMBER + 2, b"\x00\xff\x80"),
            tag(UNKNOWN_NUMBER + 3, START_GROUP),
            tag(1, VARINT) + varint(7),
            tag(UNKNOWN_NUMBER + 3, END_GROUP),
            tag(UNKNOWN_NUMBER + 4, FIXED32) + b"\x01\x02\x03\x04",
        )
    )


def odd_encoding(message: Message) -> bytes:
    """Encode ``message`` oddly; any decoder makes of it an equal message with unknown fields."""
    return unknown_fields() + b"".join(_fields(message))


def _fields(message: Message) -> list[bytes]:
    """Encode each field with all its values and an unknown one behind it, in descending order."""
    fields = []
    for field, value in sorted(message.ListFields(), key=lambda item: -item[0].number):
        values = value if field.is_repeated else [value]
        encoded = b"".join(part for one in values for part in _field(field, one))
        fields.append(encoded + tag(UNKNOWN_NUMBER, VARINT) + varint(field.number))
    return fields


def _field(field: FieldDescriptor, value: Any) -> Iterator[bytes]:
    number, is_singular = field.number, not field.is_repeated
    if field.type in _VARINT_TYPES:
        if is_singular:
            yield tag(number, VARINT) + varint(int(value) ^ 1)
        yield tag(number, VARINT) + varint(int(value), extra_bytes=2)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        fields = _fields(value)
        half = len(fields) // 2 if is_singular else 0
        if half:
            yield length_delimited(number, b"".join(fields[:half]))
        yield length_delimited(number, unknown_fields() + b"".join(fields[half:]), extra_bytes=1)
    else:
        if is_singular:
            yield length_delimited(number, b"wrong")
        yield length_delimited(number, value.encode() if isinstance(value, str) else value, extra_bytes=1)
