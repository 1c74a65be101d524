"""Hypothesis strategies that make wire bytes: any message of a type, rearranged, padded and damaged."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

from lathe_shared.wire import scan, varint

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

HASHES = st.one_of(
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.binary(min_size=20, max_size=20).map(bytes.hex),
    st.text(max_size=5),
)
SIZES = st.one_of(st.integers(0, 300), st.integers(0, 2**40), st.integers(-(2**63), 2**63 - 1))


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[bytes]:
    """Return a strategy for a field's payload, without its tag."""
    if field.type == FieldDescriptor.TYPE_STRING:
        texts = HASHES if field.name == "hash" else st.text(max_size=12)
        return texts.map(str.encode)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=200)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.sampled_from([b"\0", b"\1"])
    if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM):
        return st.one_of(st.integers(0, 12), st.integers(-(2**31), 2**31 - 1)).map(varint)
    return SIZES.map(varint)


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[bytes]:
    """Return a strategy for one occurrence of a field, tag included."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        payload: st.SearchStrategy[bytes] = _message_bytes(field.message_type, depth - 1)
        is_delimited = True
    else:
        payload = _scalar(field)
        is_delimited = field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    if is_delimited:
        return payload.map(lambda data: varint(field.number << 3 | 2) + varint(len(data)) + data)
    return payload.map(lambda data: varint(field.number << 3) + data)


UNKNOWN_FIELDS = st.one_of(
    st.builds(lambda n, v: varint(n << 3) + varint(v), st.integers(100, 2**29 - 1), st.integers(0, 2**64 - 1)),
    st.builds(lambda n, v: varint(n << 3 | 2) + varint(len(v)) + v, st.integers(100, 5000), st.binary(max_size=20)),
    st.builds(lambda n, v: varint(n << 3 | 1) + v, st.integers(100, 5000), st.binary(min_size=8, max_size=8)),
    st.builds(lambda n, v: varint(n << 3 | 5) + v, st.integers(100, 5000), st.binary(min_size=4, max_size=4)),
    st.builds(lambda n: varint(n << 3 | 3) + b"\x08\x01\x12\x01x" + varint(n << 3 | 4), st.integers(100, 5000)),
)


def message_bytes(message: type[Message]) -> st.SearchStrategy[bytes]:
    """Return a strategy for serialized messages: any fields, any order, repeated at will, unknown ones between."""
    return _message_bytes(message.DESCRIPTOR, 2)


@functools.cache
def _message_bytes(descriptor: Any, depth: int) -> st.SearchStrategy[bytes]:
    fields = [
        _field(field, depth) for field in descriptor.fields if field.type != FieldDescriptor.TYPE_MESSAGE or depth > 0
    ]
    known = [st.lists(st.one_of(fields), max_size=6)] if fields else []
    ordered = [st.tuples(*[st.one_of(st.just(b""), field) for field in fields]).map(list)]
    mixed = st.lists(st.one_of(*fields, UNKNOWN_FIELDS), max_size=6)
    return st.one_of(*known, *ordered, mixed).map(b"".join)


@st.composite
def damaged(draw: Callable[[st.SearchStrategy[Any]], Any], messages: st.SearchStrategy[bytes]) -> bytes:
    """Draw a message and break it: cut, flip, insert or replace bytes."""
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "set"]))
        if kind == "cut":
            del data[place:]
        elif kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=4))
        elif data:
            data[place] = draw(st.sampled_from([0x00, 0x7F, 0x80, 0xFF]))
    return bytes(data)


def top_level_fields(data: bytes) -> list[bytes]:
    """Split a well-formed message without groups into its fields, tags included."""
    fields = []
    for tag, a, b in scan(data):
        if tag & 7 == 0:
            fields.append(varint(tag) + varint(a))
        elif tag & 7 == 2:
            fields.append(varint(tag) + varint(b - a) + data[a:b])
        else:
            fields.append(varint(tag) + data[a:b])
    return fields
