"""Qualifiers: which are known, what they say, what is wrong with them."""

from __future__ import annotations

import base64
import json

import pytest

from lathe_cas.remote_asset.qualifiers import (
    Checksum,
    UnsupportedQualifiersError,
    fetch_terms,
    identity,
    parse_integrity,
)
from lathe_protos import asset
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError

URIS = ("https://one/a", "https://two/a")


def integrity(algorithm: str, data: bytes = b"content") -> str:
    hash_ = bytes.fromhex(Digest.of(data, DigestFunction[algorithm.upper()]).hash)
    return f"{algorithm}-{base64.b64encode(hash_).decode()}"


def qualifier(name: str, value: str = "") -> asset.Qualifier:
    return asset.Qualifier(name=name, value=value)


def test_qualifiers_are_the_same_in_any_order() -> None:
    one, two = qualifier("a", "2"), qualifier("b", "1")

    assert identity([one, two]) == identity([two, one]) == (("a", "2"), ("b", "1"))


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "a"], [""]])
def test_names_are_unique_and_not_empty(names: list[str]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"qualifiers\.name"):
        identity([qualifier(name, str(place)) for place, name in enumerate(names)])


# Those of Subresource Integrity, and the others that Bazel's "integrity" takes.
@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512", "blake3", "sha1"])
def test_each_algorithm_that_clients_send_is_read(algorithm: str) -> None:
    function = DigestFunction[algorithm.upper()]
    expected = Checksum(function, Digest.of(b"content", function).hash)

    assert parse_integrity(integrity(algorithm)) == (expected,)
    assert parse_integrity(f"  md5-xyz {integrity(algorithm)}?option=1\n") == (expected,)


def test_several_checksums_are_alternatives() -> None:
    assert len(parse_integrity(f"{integrity('sha256')} {integrity('sha512')} {integrity('sha256', b'other')}")) == 3


@pytest.mark.parametrize(
    "value", ["", "md5-AAAA", "sha256", "sha256-", "sha256-%%", "sha256-AAAA", integrity("sha512")[:50]]
)
def test_what_cannot_be_verified_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"qualifiers\.checksum\.sri"):
        parse_integrity(value)


def test_headers_come_from_all_their_forms() -> None:
    pairs = [
        ("bazel.auth_headers", json.dumps({"https://one/a": {"Authorization": "Basic abc"}})),
        ("http_header:X-All", "all"),
        ("http_header_url:1:Authorization", "Bearer xyz"),
        ("bazel.canonical_id", "whatever"),
    ]

    terms = fetch_terms(pairs, URIS, with_directory=False)

    assert terms.headers == {
        "https://one/a": {"Authorization": "Basic abc", "X-All": "all"},
        "https://two/a": {"X-All": "all", "Authorization": "Bearer xyz"},
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bazel.auth_headers", "no JSON"),
        ("bazel.auth_headers", "[" * 100_000),
        ("bazel.auth_headers", "[]"),
        ("bazel.auth_headers", '{"https://one/a": "secret"}'),
        ("bazel.auth_headers", '{"https://one/a": {"Authorization": ["secret"]}}'),
        ("bazel.auth_headers", '{"https://one/a": {"Host": "secret"}}'),
        ("http_header:Host", "secret"),
        ("http_header:transfer-encoding", "secret"),
        ("http_header:", "secret"),
        ("http_header:X Y", "secret"),
        ("http_header:X", "secret\r\nY: 1"),
        ("http_header:X", "secret\0"),
        ("http_header_url:2:X", "secret"),
        ("http_header_url:-1:X", "secret"),
        ("http_header_url:X", "secret"),
        ("http_header_url:0:", "secret"),
    ],
)
def test_a_header_that_may_not_be_is_refused_without_showing_its_value(name: str, value: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        fetch_terms([(name, value)], URIS, with_directory=False)

    assert "secret" not in refused.value.message


def test_unknown_ones_are_all_named() -> None:
    pairs = [("checksum.sri", integrity("sha256")), ("vcs.commit", "1"), ("resource_type", "x"), ("directory", "a")]

    with pytest.raises(UnsupportedQualifiersError) as refused:
        fetch_terms(pairs, URIS, with_directory=False)

    (detail,) = refused.value.details
    assert [violation["description"] for violation in detail.to_dict()["fieldViolations"]] == [
        '"vcs.commit" not supported',
        '"resource_type" not supported',
        '"directory" not supported',
    ]


def test_a_subdirectory_is_a_path_within() -> None:
    assert fetch_terms([("directory", "a/b")], URIS, with_directory=True).subdirectory == ("a", "b")
    for value in ["", "/a", "a/", "a//b", "../a", "a/.."]:
        with pytest.raises(InvalidArgumentError, match=r"qualifiers\.directory"):
            fetch_terms([("directory", value)], URIS, with_directory=True)
