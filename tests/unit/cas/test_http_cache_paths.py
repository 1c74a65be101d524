"""Paths of the HTTP cache: what each names. What is malformed is in the integration tests, as clients see it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe_cas.http_cache.paths import ActionResultPath, BlobPath, CachePath, ValuePath, parse_path
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError

HASH = "0123456789abcdef" * 4
SHA1_HASH = HASH[:40]
DIGEST = Digest(HASH, 0)
SHA1_DIGEST = Digest(SHA1_HASH, 0, DigestFunction.SHA1)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (f"/cas/{HASH}", BlobPath("", DIGEST)),
        (f"/ac/{HASH}", ActionResultPath("", DIGEST)),
        (f"/main/cas/{SHA1_HASH}", BlobPath("main", SHA1_DIGEST)),
        (f"/main/ac/sha1/{SHA1_HASH}", ActionResultPath("main", SHA1_DIGEST)),
        (f"/some/instance/cas/sha256/{HASH}", BlobPath("some/instance", DIGEST)),
        # The last word counts: an instance may be called like one.
        (f"/cas/ac/{HASH}", ActionResultPath("cas", DIGEST)),
        (f"/ac/cas/sha256/{HASH}", BlobPath("ac", DIGEST)),
        (f"/caches/ac/{HASH}", ActionResultPath("caches", DIGEST)),
        (f"/cache/ac/{HASH}", ValuePath(f"ac/{HASH}")),
        ("/cache/cas", ValuePath("cas")),
        ("/cache/cache/key", ValuePath("cache/key")),
        ("/cache/ab/..cd", ValuePath("ab/..cd")),
        ("/main", None),
        ("/cache", None),
        ("/", None),
    ],
)
def test_what_a_path_names(path: str, named: CachePath | None) -> None:
    assert parse_path(path) == named


def test_functions_that_are_not_offered_are_refused() -> None:
    offered = [DigestFunction.SHA256]
    assert parse_path(f"/cas/{HASH}", offered) == BlobPath("", DIGEST)
    for path in (f"/cas/{SHA1_HASH}", f"/cas/sha1/{SHA1_HASH}"):
        with pytest.raises(InvalidArgumentError, match=r"^path"):
            parse_path(path, offered)


@given(st.text(max_size=40))
def test_any_text_names_something_nothing_or_is_refused(text: str) -> None:
    for path in (f"/{text}", f"/cache/{text}", f"/{text}/ac/{HASH}"):
        try:
            named = parse_path(path)
        except InvalidArgumentError:
            continue
        assert path.startswith("/cache/") == isinstance(named, ValuePath)
        if isinstance(named, ValuePath):
            assert path == f"/cache/{named.key}"
