"""SHA256TREE: SHA-256 over the leaves of a binary tree of kibibytes.

An inner node is one run of SHA-256's block cipher from initial values of its own over the two hashes below. hashlib has
no such call, but libcrypto beneath it has, and is used where it can be loaded: 350 MB/s on a core. Where it cannot, as
in Pythons that carry their OpenSSL inside, the same is computed in Python at some 10 MB/s.

Spec: REAPI, DigestFunction.Value SHA256TREE; FIPS 180-4, sections 4.1.2, 4.2.2 and 6.2 (the block cipher).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

LEAF_BYTES: Final = 1024

_MASK: Final = 0xFFFFFFFF
_WORDS: Final = struct.Struct(">8I")
_NATIVE_WORDS: Final = struct.Struct("=8I")


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % prime for prime in found):
            found.append(candidate)
        candidate += 1
    return found


def _cube_root(value: int) -> int:
    """Return the largest integer whose cube is not above a value: bit by bit, since no float is so exact."""
    root = 0
    for bit in reversed(range(value.bit_length() // 3 + 1)):
        if (root | 1 << bit) ** 3 <= value:
            root |= 1 << bit
    return root


# The first 32 bits behind the point of roots of primes, as FIPS 180-4 and REAPI define them.
_ROUND_CONSTANTS: Final = [_cube_root(prime << 96) & _MASK for prime in _primes(64)]
_NODE_START: Final = tuple(math.isqrt(prime << 64) & _MASK for prime in _primes(16)[8:])


def _rotate(word: int, places: int) -> int:
    return (word >> places) | (word << (32 - places)) & _MASK


def node_in_python(block: bytes) -> bytes:
    """Compute the hash of an inner node.

    Args:
        block: The hashes of its two children, 64 bytes.
    """
    words = list(struct.unpack(">16I", block))
    for index in range(16, 64):
        before_15, before_2 = words[index - 15], words[index - 2]
        small_0 = _rotate(before_15, 7) ^ _rotate(before_15, 18) ^ (before_15 >> 3)
        small_1 = _rotate(before_2, 17) ^ _rotate(before_2, 19) ^ (before_2 >> 10)
        words.append((words[index - 16] + small_0 + words[index - 7] + small_1) & _MASK)
    a, b, c, d, e, f, g, h = _NODE_START
    for constant, word in zip(_ROUND_CONSTANTS, words, strict=True):
        big_1 = _rotate(e, 6) ^ _rotate(e, 11) ^ _rotate(e, 25)
        first = h + big_1 + (e & f ^ ~e & g) + constant + word
        big_0 = _rotate(a, 2) ^ _rotate(a, 13) ^ _rotate(a, 22)
        second = big_0 + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, h = (first + second) & _MASK, a, b, c, (d + first) & _MASK, e, f, g
    return _WORDS.pack(a, b, c, d, e, f, g, h)


def load_node_function() -> Callable[[bytes], bytes] | None:
    """Return ``node_in_python`` made of libcrypto's block function, or None where that cannot be had."""
    try:
        # PyDLL: the call is shorter than letting go of the interpreter's lock would be.
        transform = ctypes.PyDLL("libcrypto.so.3").SHA256_Transform
    except (OSError, AttributeError):
        return None
    transform.restype = None
    transform.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    start = _NATIVE_WORDS.pack(*_NODE_START)
    s0, s1, s2, s3, s4, s5, s6, s7 = _NODE_START

    def node(block: bytes) -> bytes:
        # SHA256_CTX: 8 words of state first, 80 bytes besides, which this call does not look at.
        state = ctypes.create_string_buffer(start, 112)
        transform(state, block)
        a, b, c, d, e, f, g, h = _NATIVE_WORDS.unpack_from(state)
        # It adds the initial values at the end, as SHA-256 does and a node does not.
        return _WORDS.pack(
            (a - s0) & _MASK,
            (b - s1) & _MASK,
            (c - s2) & _MASK,
            (d - s3) & _MASK,
            (e - s4) & _MASK,
            (f - s5) & _MASK,
            (g - s6) & _MASK,
            (h - s7) & _MASK,
        )

    return node if node(bytes(64)) == node_in_python(bytes(64)) else None


_node: Final = load_node_function() or node_in_python


class Sha256Tree:
    """A hash in progress, in hashlib's form. Memory is logarithmic in the number of bytes.

    Args:
        node: Computes inner nodes.
    """

    def __init__(self, node: Callable[[bytes], bytes] = _node) -> None:
        self._node = node
        self._rest = b""
        self._leaves = 0
        # Hashes of whole subtrees from left to right, each with as many leaves as a power of two, in falling order.
        self._subtrees: list[bytes] = []

    def update(self, data: Buffer, /) -> None:
        """Take in the next bytes."""
        view = memoryview(data).cast("B")
        if self._rest:
            needed = LEAF_BYTES - len(self._rest)
            self._rest += view[:needed]
            if len(self._rest) < LEAF_BYTES:
                return
            self._add_leaf(self._rest)
            view = view[needed:]
        whole = len(view) - len(view) % LEAF_BYTES
        for start in range(0, whole, LEAF_BYTES):
            self._add_leaf(view[start : start + LEAF_BYTES])
        self._rest = bytes(view[whole:])

    def _add_leaf(self, data: Buffer) -> None:
        """Add a whole leaf; two subtrees of one size are one of the next, whatever follows."""
        subtree = hashlib.sha256(data).digest()
        subtrees = self._subtrees
        leaves = self._leaves
        while leaves & 1:
            subtree = self._node(subtrees.pop() + subtree)
            leaves >>= 1
        subtrees.append(subtree)
        self._leaves += 1

    def digest(self) -> bytes:
        """Return the hash of all bytes so far."""
        subtrees = self._subtrees
        if self._rest or not subtrees:
            subtrees = [*subtrees, hashlib.sha256(self._rest).digest()]
        result = subtrees[-1]
        for left in reversed(subtrees[:-1]):
            result = self._node(left + result)
        return result

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far, in lower-case hexadecimal."""
        return self.digest().hex()
