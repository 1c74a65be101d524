"""Make malformed messages out of valid ones, reproducibly."""

import random

from tests.integration.independent_client.odd_encoding import LENGTH, START_GROUP, VARINT, length_delimited, tag, varint

# Group 5,001: no field of any message.
_OPEN_GROUP = tag(5_001, START_GROUP)
MOST_GROUPS = 100_000
DEEPEST = 2_000


def malformed(data: bytes, chance: random.Random) -> bytes:
    """Damage a message in one of many ways, or several times; what comes out may happen to be valid."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        data = chance.choice(_WAYS)(data, chance)
    return data


def _cut_off(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _flip_bits(data: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 8) if damaged else 0):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _replace(_: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randint(1, 300))


def _insert(data: bytes, piece: bytes, chance: random.Random) -> bytes:
    """Put a piece anywhere, often where a field may begin."""
    place = chance.choice((0, len(data), chance.randrange(len(data) + 1)))
    return data[:place] + piece + data[place:]


def _insert_random_bytes(data: bytes, chance: random.Random) -> bytes:
    return _insert(data, chance.randbytes(chance.randint(1, 40)), chance)


def _claim_a_huge_length(data: bytes, chance: random.Random) -> bytes:
    length = (1 << chance.choice((7, 16, 24, 31, 32, 40, 63, 64))) - chance.randint(0, 2)
    return _insert(data, tag(chance.randint(1, 16), LENGTH) + varint(length), chance)


def _insert_an_endless_varint(data: bytes, chance: random.Random) -> bytes:
    endless = b"\xff" * chance.choice((5, 9, 10, 11, 1_000))
    return _insert(data, tag(chance.randint(1, 16), VARINT) + endless, chance)


def _insert_an_odd_tag(data: bytes, chance: random.Random) -> bytes:
    """Field number 0, wire types 6 and 7, the end of a group that nobody began, numbers beyond the largest."""
    piece = chance.choice((b"\x00", b"\x06\x00", b"\x0f", b"\x0c", varint(1 << 32 | LENGTH), varint(1 << 40)))
    return _insert(data, piece + chance.randbytes(3), chance)


def _insert_a_string_that_is_none(data: bytes, chance: random.Random) -> bytes:
    """Bytes that are no UTF-8, or text that is no name, as any field."""
    long = "\u202e💥".encode() * 2_000
    text = chance.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"a\nb\x1b[31m", long, b"/" * 99))
    return _insert(data, length_delimited(chance.randint(1, 16), text), chance)


def _insert_an_extreme_number(data: bytes, chance: random.Random) -> bytes:
    number = chance.choice((-1, -(1 << 31), -(1 << 63), (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1))
    return _insert(data, tag(chance.randint(1, 16), VARINT) + varint(number), chance)


def _nest_groups(data: bytes, chance: random.Random) -> bytes:
    return _insert(data, _OPEN_GROUP * chance.choice((1, 99, 101, MOST_GROUPS)), chance)


def _nest_messages(data: bytes, chance: random.Random) -> bytes:
    number = chance.randint(1, 16)
    nested = b""
    for _ in range(chance.choice((3, 99, 101, DEEPEST))):
        nested = length_delimited(number, nested)
    return _insert(data, nested, chance)


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return _insert(data, data[start : start + chance.randint(1, 200)] * chance.choice((1, 2, 500)), chance)


_WAYS = (
    _cut_off,
    _flip_bits,
    _flip_bits,
    _replace,
    _insert_random_bytes,
    _claim_a_huge_length,
    _insert_an_endless_varint,
    _insert_an_odd_tag,
    _insert_a_string_that_is_none,
    _insert_an_extreme_number,
    _nest_groups,
    _nest_messages,
    _repeat,
)
