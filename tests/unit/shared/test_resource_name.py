"""ByteStream resource names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe_shared import resource_name
from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError, LatheError
from lathe_shared.instance_name import RESERVED_SEGMENTS
from lathe_shared.resource_name import (
    ReadResource,
    WriteResource,
    format_read,
    format_write,
    parse_read,
    parse_write,
)

SHA256 = Digest.of(b"abc")
SHA1 = Digest.of(b"abc", DigestFunction.SHA1)
H = SHA256.hash


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"blobs/{H}/3", ReadResource("", SHA256)),
        (f"main/blobs/{H}/3", ReadResource("main", SHA256)),
        (f"a/b/c/blobs/{H}/3", ReadResource("a/b/c", SHA256)),
        (f"main/blobs/sha256/{H}/3", ReadResource("main", SHA256)),
        (f"main/blobs/sha1/{SHA1.hash}/3", ReadResource("main", SHA1)),
        (f"main/blobs/{SHA1.hash}/3", ReadResource("main", SHA1)),
        (f"main/blobs/{H}/3/some/file.txt", ReadResource("main", SHA256)),
        (f"main/blobs/{H}/3/blobs/x", ReadResource("main", SHA256)),
        (f"main/blobs/{H}/3/blobs", ReadResource("main", SHA256)),
        (f"compressed-blobs/zstd/{H}/3", ReadResource("", SHA256, Compressor.ZSTD)),
        (f"i/compressed-blobs/zstd/sha256/{H}/3", ReadResource("i", SHA256, Compressor.ZSTD)),
    ],
)
def test_reads_are_parsed(name: str, expected: ReadResource) -> None:
    assert parse_read(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"uploads/u/blobs/{H}/3", WriteResource("", "u", SHA256)),
        (f"main/uploads/u/blobs/{H}/3", WriteResource("main", "u", SHA256)),
        (f"a/b/uploads/u-1/blobs/{H}/3/bazel-out/x.o", WriteResource("a/b", "u-1", SHA256)),
        (f"a/uploads/u/blobs/sha1/{SHA1.hash}/3", WriteResource("a", "u", SHA1)),
        (f"a/uploads/blobs/blobs/{H}/3", WriteResource("a", "blobs", SHA256)),
        (f"a/uploads/uploads/blobs/{H}/3", WriteResource("a", "uploads", SHA256)),
        (f"a/uploads/u/compressed-blobs/zstd/{H}/3", WriteResource("a", "u", SHA256, Compressor.ZSTD)),
        (f"a/uploads/u/compressed-blobs/zstd/sha256/{H}/3/meta", WriteResource("a", "u", SHA256, Compressor.ZSTD)),
    ],
)
def test_writes_are_parsed(name: str, expected: WriteResource) -> None:
    assert parse_write(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "blobs",
        "blobs/",
        f"blobs/{H}",
        f"blobs/{H}/",
        f"blobs/{H}/-1",
        f"blobs/{H}/+1",
        f"blobs/{H}/01",
        f"blobs/{H}/1_0",
        f"blobs/{H}/ 1",
        f"blobs/{H}/٣",
        f"blobs/{H}/99999999999999999999",
        f"blobs/{H[:-1]}/3",
        f"blobs/{H.upper()}/3",
        f"blobs/sha256/{H}",
        f"blobs/sha256/{SHA1.hash}/3",
        f"blobs/vso/{H}/3",
        f"/blobs/{H}/3",
        f"a//b/blobs/{H}/3",
        f"a/actions/blobs/{H}/3",
        f"Blobs/{H}/3",
        "compressed-blobs",
        "compressed-blobs/zstd",
        f"compressed-blobs/zstd/{H}",
        "x" * 5000,
        f"{'x' * 1100}/blobs/{H}/3",
    ],
)
def test_malformed_reads_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_read(name)

    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    "name",
    [
        f"blobs/{H}/3",
        f"uploads/blobs/{H}/3",
        f"uploads//blobs/{H}/3",
        f"uploads/a/b/blobs/{H}/3",
        f"main/upload/u/blobs/{H}/3",
        f"uploads/u/blobs/{H}",
        "uploads/u/blobs",
        "uploads",
    ],
)
def test_malformed_writes_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_write(name)


@pytest.mark.parametrize("compressor", ["lz4", "deflate", "brotli", "identity", "ZSTD", ""])
def test_a_compressor_that_is_not_offered_is_refused_with_those_that_are(compressor: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"compressor '{compressor}' is not one of zstd"):
        parse_read(f"compressed-blobs/{compressor}/{H}/3")
    with pytest.raises(InvalidArgumentError, match=f"compressor '{compressor}' is not one of zstd"):
        parse_write(f"uploads/u/compressed-blobs/{compressor}/{H}/3")


def test_a_function_that_is_not_offered_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="'sha1' is not one of sha256"):
        parse_read(f"blobs/sha1/{SHA1.hash}/3", [DigestFunction.SHA256])
    with pytest.raises(InvalidArgumentError, match="40 hexadecimal digits"):
        parse_read(f"blobs/{SHA1.hash}/3", [DigestFunction.SHA256])


segments = st.text(st.characters(categories=["L", "N"], include_characters="-_."), min_size=1, max_size=12).filter(
    lambda text: text not in RESERVED_SEGMENTS
)
instances = st.lists(segments, max_size=4).map("/".join)
digests = st.builds(Digest.of, st.binary(max_size=20), st.sampled_from(list(DigestFunction)))
compressors = st.sampled_from(list(Compressor))


@given(digests, instances, compressors)
def test_what_is_formatted_parses_back_as_a_read(digest: Digest, instance: str, compressor: Compressor) -> None:
    name = format_read(digest, instance, compressor)

    assert parse_read(name) == ReadResource(instance, digest, compressor)


@given(digests, segments, instances, compressors, st.lists(segments, max_size=3))
def test_what_is_formatted_parses_back_as_a_write(
    digest: Digest, upload_id: str, instance: str, compressor: Compressor, metadata: list[str]
) -> None:
    name = "/".join([format_write(digest, upload_id, instance, compressor), *metadata])

    assert parse_write(name) == WriteResource(instance, upload_id, digest, compressor)


@given(st.lists(st.sampled_from(["blobs", "uploads", "compressed-blobs", "zstd", "sha256", H, "3", "", "u"])))
def test_no_arrangement_of_words_breaks_the_parser(words: list[str]) -> None:
    for parse in (parse_read, parse_write):
        with contextlib.suppress(LatheError):
            parse("/".join(words))


SEGMENTS = [
    "blobs",
    "uploads",
    "compressed-blobs",
    "zstd",
    "sha256",
    "main",
    "",
    H,
    SHA1.hash,
    H.upper(),
    "3",
    "03",
    "u\n",
]


@pytest.mark.parametrize("parse", [parse_read, parse_write])
@given(parts=st.lists(st.sampled_from(SEGMENTS), max_size=9), ending=st.sampled_from(["", f"/blobs/{H}/3"]))
def test_plain_names_are_read_like_all_others(
    parse: Callable[[str], ReadResource | WriteResource], parts: list[str], ending: str
) -> None:
    name = "/".join(parts) + ending

    def outcome() -> ReadResource | WriteResource | str:
        try:
            return parse(name)
        except LatheError as error:
            return f"{type(error).__name__}: {error}"

    fast = outcome()
    with pytest.MonkeyPatch.context() as patch:
        for pattern in ("_PLAIN_READ", "_PLAIN_WRITE"):
            patch.setattr(resource_name, pattern, re.compile("(?!)"))
        assert outcome() == fast
