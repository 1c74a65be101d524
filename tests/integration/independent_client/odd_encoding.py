"""Encode messages in ways that protobuf allows and that no sane encoder would choose.

Fields come in descending order, unknown ones of every wire type between them, singular strings twice (the last one
counts), repeated scalars unpacked, varints longer than needed; and so in every message inside.

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


def unknown_fields() -> bytes:
    """Encode one unknown field of each wire type."""
    return b"".join(
        (
            tag(UNKNOWN_NUMBER, VARINT) + varint(2**64 - 1),
            tag(UNKNOWN_NUMBER + 1, FIXED64) + b"\xff" * 8,
            tag(UNKNOWN_NUMBER + 2, LENGTH) + varint(3) + b"\x00\xff\x80",
            tag(UNKNOWN_NUMBER + 3, START_GROUP),
            tag(1, VARINT) + varint(7),
            tag(UNKNOWN_NUMBER + 3, END_GROUP),
            tag(UNKNOWN_NUMBER + 4, FIXED32) + b"\x01\x02\x03\x04",
        )
    )


def odd_encoding(message: Message) -> bytes:
    """Encode ``message`` oddly; any decoder makes of it an equal message with unknown fields."""
    encoded = bytearray(unknown_fields())
    for field, value in sorted(message.ListFields(), key=lambda item: -item[0].number):
        values = value if field.is_repeated else [value]
        for one in values:
            encoded += b"".join(_field(field, one))
        encoded += tag(UNKNOWN_NUMBER, VARINT) + varint(field.number)
    return bytes(encoded)


def _field(field: FieldDescriptor, value: Any) -> Iterator[bytes]:
    if field.type in _VARINT_TYPES:
        yield tag(field.number, VARINT) + varint(int(value), extra_bytes=2)
        return
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        data = odd_encoding(value)
    else:
        data = value.encode() if isinstance(value, str) else value
    if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
        yield tag(field.number, LENGTH) + varint(5) + b"wrong"
    yield tag(field.number, LENGTH) + varint(len(data), extra_bytes=1) + data
