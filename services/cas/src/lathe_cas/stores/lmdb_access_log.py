"""The access log: the order of eviction, least recently used first.

A group of entries is one record; its key is ``(touch step, kind, sequence)``, so the log reads oldest first. A blob's
own record holds the step of its last touch. An entry is live if that step is still the one it stands under; a touch
writes a new entry and leaves the old one behind, stale. Writing thus only ever appends, where an index ordered by
time would delete and insert all over its B-tree; stale entries go when eviction or the sweep comes by.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lmdb
    from lmdb import _Database as Database

GROUP_KEY = struct.Struct(">IBQ")

MAX_GROUP_ENTRIES = 1024
"""Entries in one group: with SHA-256 keys some 35 KB, below a chunk's size, and a bounded step of eviction."""


class Group(NamedTuple):
    """One record of the log."""

    raw_key: bytes
    step: int
    kind: int
    keys: list[bytes]


def encode_keys(keys: Iterable[bytes]) -> bytes:
    """Return keys of any lengths below 256 as one value."""
    return b"".join([bytes((len(key),)) + key for key in keys])


def decode_keys(value: bytes) -> list[bytes]:
    """Return the keys that a value holds."""
    keys = []
    position = 0
    while position < len(value):
        start = position + 1
        position = start + value[position]
        keys.append(value[start:position])
    return keys


def append_groups(
    txn: lmdb.Transaction[bytes], database: Database, step: int, kind: int, first_sequence: int, keys: list[bytes]
) -> int:
    """Write entries under the current step, and return the sequence number after the last group's."""
    sequence = first_sequence
    for start in range(0, len(keys), MAX_GROUP_ENTRIES):
        value = encode_keys(keys[start : start + MAX_GROUP_ENTRIES])
        txn.put(GROUP_KEY.pack(step, kind, sequence), value, db=database)
        sequence += 1
    return sequence


def first_group(txn: lmdb.Transaction[bytes], database: Database, after: bytes = b"") -> Group | None:
    """Return the oldest group, or the oldest one behind the key ``after``; None if there is none."""
    cursor = txn.cursor(database)
    if not (cursor.set_range(after + b"\0") if after else cursor.first()):
        return None
    key, value = cursor.item()
    step, kind, _ = GROUP_KEY.unpack(key)
    # No key is empty, and LMDB looks none up: a damaged group must not be in the way of those behind it.
    return Group(key, step, kind, [key for key in decode_keys(value) if key])


def newest_step(txn: lmdb.Transaction[bytes], database: Database) -> int:
    """Return the step of the newest group; 0 if there is none."""
    cursor = txn.cursor(database)
    return GROUP_KEY.unpack(cursor.key())[0] if cursor.last() else 0


def replace_group(txn: lmdb.Transaction[bytes], database: Database, group: Group, keys: list[bytes]) -> None:
    """Keep only ``keys`` of a group, under the same place in the order; delete it if none are left."""
    if keys:
        txn.put(group.raw_key, encode_keys(keys), db=database)
    else:
        txn.delete(group.raw_key, db=database)
