"""SHA256TREE against REAPI's published values, and against its definition taken literally."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe_shared.sha256_tree import LEAF_BYTES, Sha256Tree, load_node_function, node_in_python

# Length of the sequence 0, 1, … 250, 0, 1, … and its hash: published with REAPI.
PUBLISHED = {
    1025: "36c0998b21839ef74300b9de47d96d1f62323dc81f2b4231e98ce70cd6ffe750",
    2048: "b584996386f01793751c5cf0c39561f51b7e9924b818943b3cb2f6928cea0fa9",
    2049: "7318d2029b0392edf4cf109edb5a086b4bdadbb7950f710a1483eb881d9e5d44",
    3072: "dfc61c0a041f79d55d53bfe31c6cda7df77fdc8e6fbac1143d70b7144fdf6937",
    5121: "98f987c3e9fc057a70873715b679b89a663d0df806859b6ce73f8379b06a10ff",
    7169: "ad729297ab36cd099665b27c4247474a5518e4cd0be443f5f31d95edda08429b",
    31744: "2cdf7662636c173d4b236f6ea03bf84c65e7f6487b53b2a61c420e26cf8a98c7",
    102400: "0668d69e5331840d2f1823d717b7b3f5d1fdc8a09504cddb692b87ff83d50e5f",
}


def sequence(length: int) -> bytes:
    return bytes(range(251)) * (length // 251) + bytes(range(length % 251))


def by_definition(data: bytes) -> bytes:
    if len(data) <= LEAF_BYTES:
        return hashlib.sha256(data).digest()
    left = 1 << (len(data) - 1).bit_length() - 1
    return node_in_python(by_definition(data[:left]) + by_definition(data[left:]))


@pytest.mark.parametrize("length", PUBLISHED)
def test_the_published_values(length: int) -> None:
    for node in (node_in_python, load_node_function()):
        assert node is not None, "libcrypto is where Debian's and the official images' Python is"
        tree = Sha256Tree(node)
        tree.update(sequence(length))
        assert tree.hexdigest() == PUBLISHED[length]


@pytest.mark.parametrize("length", [0, 1, 251, 1023, 1024])
def test_up_to_a_leaf_it_is_plain_sha_256(length: int) -> None:
    tree = Sha256Tree()
    tree.update(sequence(length))
    assert tree.hexdigest() == hashlib.sha256(sequence(length)).hexdigest()


@given(st.lists(st.one_of(st.integers(0, 2100), st.sampled_from([1023, 1024, 1025, 2048, 4096])), max_size=8))
def test_how_the_bytes_come_makes_no_difference(lengths: list[int]) -> None:
    data = sequence(sum(lengths))
    tree = Sha256Tree()
    taken = 0
    for length in lengths:
        tree.update(memoryview(data)[taken : taken + length])
        taken += length
        assert tree.digest() == by_definition(data[:taken]), "asking does not change it"
