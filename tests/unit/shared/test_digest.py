"""Digest and DigestFunction."""

from __future__ import annotations

import hashlib

import pytest

from lathe_protos import reapi
from lathe_shared.digest import EMPTY_DIGEST, Digest, DigestFunction, select_function
from lathe_shared.errors import InvalidArgumentError

EXPECTED = {
    **{
        function: hashlib.new(function.segment, b"some bytes").hexdigest()
        for function in DigestFunction
        if function.segment in hashlib.algorithms_guaranteed
    },
    # Of so little it is SHA-256; its own tests have more.
    DigestFunction.SHA256TREE: hashlib.sha256(b"some bytes").hexdigest(),
    DigestFunction.BLAKE3: "7e52aeb0d161c90714aca8a001c01e65c6ecdaf288681e4ba3d98f418259c175",
}


@pytest.mark.parametrize("function", list(DigestFunction))
def test_a_digest_of_bytes_is_what_others_say(function: DigestFunction) -> None:
    digest = Digest.of(b"some bytes", function)

    assert digest.hash == EXPECTED[function]
    assert digest.size_bytes == 10
    assert len(digest.hash) == function.hash_length
    assert digest.key == bytes([function.value]) + bytes.fromhex(digest.hash)


@pytest.mark.parametrize("function", list(DigestFunction))
def test_numbers_and_names_are_reapis(function: DigestFunction) -> None:
    assert reapi.DigestFunctionValue(function.value).name == function.name


def test_the_empty_digest_knows_itself_by_every_function() -> None:
    assert all(Digest.of(b"", function).is_empty for function in DigestFunction)
    assert Digest.of(b"") == EMPTY_DIGEST
    assert not Digest.of(b"x").is_empty
    assert not Digest(EMPTY_DIGEST.hash, 1).is_empty


def test_the_wire_form_parses_back() -> None:
    digest = Digest.of(b"some bytes")

    assert Digest.from_message(reapi.Digest().parse(digest.wire)) == digest
    assert str(digest) == f"{digest.hash}/10"


@pytest.mark.parametrize(
    ("hash_", "size", "field"),
    [
        ("", 0, "d.hash"),
        ("ab", 1, "d.hash"),
        ("A" * 64, 1, "d.hash"),
        ("g" * 64, 1, "d.hash"),
        ("a" * 63 + "\n", 1, "d.hash"),
        ("a" * 63 + "\N{ARABIC-INDIC DIGIT ONE}", 1, "d.hash"),
        ("a" * 65, 1, "d.hash"),
        ("a" * 1_000_000, 1, "d.hash"),
        ("a" * 64, -1, "d.size_bytes"),
        ("a" * 64, 2**63, "d.size_bytes"),
    ],
)
def test_a_malformed_digest_is_refused_by_field(hash_: str, size: int, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Digest.parse(hash_, size, field="d")

    assert caught.value.field == field
    assert len(caught.value.message) < 400


def test_blake3_is_that_of_its_authors_vectors() -> None:
    assert (
        Digest.of(b"\0", DigestFunction.BLAKE3).hash
        == "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"
    )


class TestSelectFunction:
    offered = (DigestFunction.SHA256, DigestFunction.SHA1)

    def test_a_named_function_is_taken(self) -> None:
        assert select_function(2, 64, self.offered) is DigestFunction.SHA1

    def test_without_a_name_the_length_tells(self) -> None:
        assert select_function(0, 64, self.offered) is DigestFunction.SHA256
        assert select_function(0, 40, self.offered) is DigestFunction.SHA1

    @pytest.mark.parametrize(("value", "named"), [(7, "MURMUR3"), (9, "BLAKE3"), (3, "MD5"), (77, "77"), (-1, "-1")])
    def test_a_function_that_is_not_offered_is_named_with_those_that_are(self, value: int, named: str) -> None:
        with pytest.raises(InvalidArgumentError, match=rf"{named} is not one of SHA256, SHA1"):
            select_function(value, 64, self.offered)

    def test_a_length_that_no_offered_function_has_is_refused(self) -> None:
        with pytest.raises(InvalidArgumentError, match="32 hexadecimal digits") as caught:
            select_function(0, 32, self.offered, "action_digest")

        assert caught.value.field == "action_digest.hash"
