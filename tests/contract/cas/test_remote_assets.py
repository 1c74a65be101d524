"""Fetch and Push over every store, with a real HTTP server as the origin."""

from __future__ import annotations

import asyncio
import base64
import datetime
import gzip
import hashlib
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.contract.cas.blob_making import content, missing, put, read
from tests.contract.cas.conftest import Stores, in_memory
from tests.contract.cas.test_remote_asset_unpacking import tar
from tests.support.http_origin import HOST, Answer, HttpOrigin

from lathe_cas.action_cache import ActionCache
from lathe_cas.cas_metrics import CasCounters
from lathe_cas.remote_asset import qualifiers
from lathe_cas.remote_asset.archive import ArchiveLimits
from lathe_cas.remote_asset.asset_records import AssetName
from lathe_cas.remote_asset.host_patterns import HostPatterns
from lathe_cas.remote_asset.origin import Origin
from lathe_cas.remote_asset.remote_assets import FetchOptions, FetchOutcome, FetchRequest, RemoteAssets
from lathe_protos import asset, reapi
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import (
    AbortedError,
    DeadlineExceededError,
    InvalidArgumentError,
    LatheError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from lathe_shared.testing.fake_clock import FakeClock
from lathe_shared.tls_authority import ensure_certificate

MAX_BYTES = 5_000_000
MAX_AGE_SECONDS = 3_600.0
CONTENT = content(2_500_000)
HEADER = "http_header:Authorization"


class Assets:
    """Remote assets over a store; made anew after a restart."""

    def __init__(
        self,
        stores: Stores,
        directory: Path,
        clock: FakeClock,
        hosts: tuple[str, ...] = (HOST,),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.counters = CasCounters()
        self.directory = directory
        self.assets = RemoteAssets(
            stores.blobs,
            ActionCache(stores.results, stores.blobs),
            Origin(HostPatterns(hosts), MAX_BYTES, tls),
            FetchOptions(directory, 60.0, MAX_AGE_SECONDS, ArchiveLimits()),
            clock.wall_seconds,
            self.counters,
        )

    async def fetch(self, *uris: str, is_directory: bool = False, **fields: str | float) -> FetchOutcome:
        """Fetch; keywords that are no other fields are qualifiers, with ``__`` for a dot."""
        timeout = float(fields.pop("timeout_seconds", 0))
        oldest = float(fields.pop("oldest_accepted", 0))
        function = DigestFunction(int(fields.pop("function", 1)))
        pairs = identity(**{name: str(value) for name, value in fields.items()})
        request = FetchRequest(is_directory, "main", uris, pairs, function, timeout, oldest)
        return await self.assets.fetch(request)

    async def push(self, uri: str, digest: Digest, *, is_directory: bool = False, **fields: object) -> None:
        name = AssetName(is_directory, "main", uri, identity(**fields.pop("qualifiers", {})), digest.function)  # type: ignore[arg-type]
        expires_at = fields.pop("expires_at", None)
        blobs, directories = fields.pop("blobs", ()), fields.pop("directories", ())
        await self.assets.push([name], digest, expires_at, blobs, directories)  # type: ignore[arg-type]


def identity(**values: str) -> tuple[tuple[str, str], ...]:
    return qualifiers.identity(
        [asset.Qualifier(name=name.replace("__", "."), value=value) for name, value in values.items()]
    )


def sri(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}-{base64.b64encode(hashlib.new(algorithm, data).digest()).decode()}"


def error_of(outcome: FetchOutcome) -> LatheError:
    assert outcome.asset is None
    assert outcome.error is not None
    return outcome.error


def digest_of(outcome: FetchOutcome) -> Digest:
    assert outcome.error is None
    assert outcome.asset is not None
    return outcome.asset.digest


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def origin() -> Iterator[HttpOrigin]:
    with HttpOrigin({"/content": Answer(CONTENT)}) as origin:
        yield origin


@pytest.fixture
async def assets(stores: Stores, tmp_path: Path, clock: FakeClock) -> AsyncIterator[Assets]:
    assets = Assets(stores, tmp_path, clock)
    yield assets
    await assets.assets.aclose()


async def test_content_is_downloaded_once_and_remembered(
    stores: Stores, assets: Assets, origin: HttpOrigin, tmp_path: Path, clock: FakeClock
) -> None:
    uri, checksum = origin.uri("/content"), sri(CONTENT)

    digest = digest_of(await assets.fetch(uri, checksum__sri=checksum))

    assert digest == Digest.of(CONTENT)
    assert await read(stores.blobs, digest) == CONTENT
    await stores.reopen()
    again = Assets(stores, tmp_path, clock)
    outcome = await again.fetch(uri, checksum__sri=checksum)
    assert (digest_of(outcome), outcome.uri) == (digest, uri)
    assert origin.paths() == ["/content"]
    assert (again.counters.asset_hits, again.counters.asset_downloads) == (1, 0)
    assert (assets.counters.asset_downloads, assets.counters.asset_downloaded_bytes) == (1, len(CONTENT))
    await again.assets.aclose()


@in_memory
@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
async def test_the_checksum_is_verified(assets: Assets, origin: HttpOrigin, algorithm: str) -> None:
    right, wrong = sri(CONTENT, algorithm), sri(b"other", algorithm)

    digest_of(await assets.fetch(origin.uri("/content"), checksum__sri=f"{wrong} {right}"))
    error = error_of(await assets.fetch(origin.uri("/content"), checksum__sri=wrong))

    assert isinstance(error, AbortedError)
    assert assets.counters.asset_failures == 1


async def test_wrong_content_is_not_stored(stores: Stores, assets: Assets, origin: HttpOrigin) -> None:
    error_of(await assets.fetch(origin.uri("/content"), checksum__sri=sri(b"other")))

    assert missing(stores.blobs, Digest.of(CONTENT)) == [Digest.of(CONTENT)]


async def test_another_digest_function_is_another_digest(stores: Stores, assets: Assets, origin: HttpOrigin) -> None:
    digest = digest_of(await assets.fetch(origin.uri("/content"), function=DigestFunction.SHA1))

    assert digest == Digest.of(CONTENT, DigestFunction.SHA1)
    assert await read(stores.blobs, digest) == CONTENT


async def test_mirrors_are_tried_in_order(assets: Assets, origin: HttpOrigin) -> None:
    uris = [origin.uri("/gone"), "https://elsewhere.invalid/content", origin.uri("/content"), origin.uri("/never")]

    outcome = await assets.fetch(*uris)

    assert outcome.uri == uris[2]
    assert origin.paths() == ["/gone", "/content"]
    # What one mirror had is found under its own address, whoever else is named.
    assert (await assets.fetch(origin.uri("/never"), uris[2])).uri == uris[2]
    assert len(origin.asked) == 2


async def test_content_that_was_evicted_is_downloaded_again(stores: Stores, assets: Assets, origin: HttpOrigin) -> None:
    digest = digest_of(await assets.fetch(origin.uri("/content")))
    await stores.blobs.remove([digest])

    assert digest_of(await assets.fetch(origin.uri("/content"))) == digest

    assert len(origin.asked) == 2
    assert missing(stores.blobs, digest) == []


async def test_without_a_checksum_content_grows_old(assets: Assets, origin: HttpOrigin, clock: FakeClock) -> None:
    uri = origin.uri("/content")
    first = await assets.fetch(uri)
    assert first.asset is not None
    assert first.asset.expires_at == pytest.approx(clock.wall_seconds() + MAX_AGE_SECONDS, abs=1e-3)
    origin.answers["/content"] = Answer(b"changed")

    await clock.advance(MAX_AGE_SECONDS - 1)
    assert digest_of(await assets.fetch(uri)) == Digest.of(CONTENT)
    await clock.advance(2)
    assert digest_of(await assets.fetch(uri)) == Digest.of(b"changed")


async def test_with_a_checksum_it_does_not(assets: Assets, origin: HttpOrigin, clock: FakeClock) -> None:
    first = await assets.fetch(origin.uri("/content"), checksum__sri=sri(CONTENT))
    assert first.asset is not None
    assert first.asset.expires_at is None

    await clock.advance(1e8)
    await assets.fetch(origin.uri("/content"), checksum__sri=sri(CONTENT))

    assert len(origin.asked) == 1


async def test_content_older_than_the_client_accepts_is_downloaded_anew(
    assets: Assets, origin: HttpOrigin, clock: FakeClock
) -> None:
    retrieved_at = clock.wall_seconds()
    await assets.fetch(origin.uri("/content"), checksum__sri=sri(CONTENT))
    await clock.advance(10)

    await assets.fetch(origin.uri("/content"), checksum__sri=sri(CONTENT), oldest_accepted=retrieved_at - 1)
    assert len(origin.asked) == 1
    await assets.fetch(origin.uri("/content"), checksum__sri=sri(CONTENT), oldest_accepted=retrieved_at + 1)
    assert len(origin.asked) == 2


async def test_who_has_no_password_does_not_get_what_another_fetched(assets: Assets, origin: HttpOrigin) -> None:
    uri = origin.uri("/content")
    headers = json.dumps({uri: {"Authorization": "Basic c2VjcmV0"}})
    digest_of(await assets.fetch(uri, bazel__auth_headers=headers))
    assert origin.asked[0].headers["Authorization"] == "Basic c2VjcmV0"
    origin.answers["/content"] = Answer(status=401)

    assert isinstance(error_of(await assets.fetch(uri)), PermissionDeniedError)
    digest_of(await assets.fetch(uri, bazel__auth_headers=headers))


async def test_many_who_ask_at_once_share_a_download(assets: Assets, origin: HttpOrigin) -> None:
    origin.waits["/content"] = threading.Event()
    asking = [asyncio.create_task(assets.fetch(origin.uri("/content"))) for _ in range(5)]
    await asyncio.to_thread(origin.wait_asked)
    asking[0].cancel()
    origin.waits["/content"].set()

    outcomes = await asyncio.gather(*asking[1:])

    assert {digest_of(outcome) for outcome in outcomes} == {Digest.of(CONTENT)}
    assert len(origin.asked) == 1


@in_memory
async def test_nobody_is_held_to_the_patience_of_another(assets: Assets, origin: HttpOrigin) -> None:
    origin.waits["/content"] = threading.Event()
    impatient = asyncio.create_task(assets.fetch(origin.uri("/content"), timeout_seconds=0.2))
    await asyncio.to_thread(origin.wait_asked)
    patient = asyncio.create_task(assets.fetch(origin.uri("/content")))

    assert isinstance(error_of(await impatient), DeadlineExceededError)
    origin.waits["/content"].set()
    assert digest_of(await patient) == Digest.of(CONTENT)


@in_memory
@pytest.mark.parametrize(("oldest_after_seconds", "downloads"), [(0, 1), (3, 2), (5, 2), (3_600, 1)])
async def test_a_download_that_began_too_early_is_no_answer(
    assets: Assets, origin: HttpOrigin, clock: FakeClock, oldest_after_seconds: float, downloads: int
) -> None:
    origin.waits["/content"] = threading.Event()
    oldest = clock.wall_seconds() + oldest_after_seconds
    first = asyncio.create_task(assets.fetch(origin.uri("/content")))
    await asyncio.to_thread(origin.wait_asked)
    await clock.advance(5)
    second = asyncio.create_task(assets.fetch(origin.uri("/content"), oldest_accepted=oldest))
    await asyncio.sleep(0)
    origin.waits["/content"].set()

    assert digest_of(await first) == digest_of(await second) == Digest.of(CONTENT)
    assert len(origin.asked) == downloads


async def test_a_redirect_is_followed_without_passwords_to_elsewhere(assets: Assets, origin: HttpOrigin) -> None:
    with HttpOrigin({"/there": Answer(b"there")}) as other:
        origin.answers["/near"] = Answer(status=307, headers={"Location": "/far"})
        origin.answers["/far"] = Answer(status=302, headers={"Location": other.uri("/there")})

        outcome = await assets.fetch(origin.uri("/near"), **{HEADER: "secret"})  # type: ignore[arg-type]

    assert digest_of(outcome) == Digest.of(b"there")
    assert [asked.headers.get("Authorization") for asked in origin.asked] == ["secret", "secret"]
    assert other.asked[0].headers.get("Authorization") is None


@in_memory
@pytest.mark.parametrize(
    ("location", "kind"),
    [
        ("http://localhost/x", PermissionDeniedError),
        ("https://169.254.169.254/latest", PermissionDeniedError),
        ("file:///etc/passwd", NotFoundError),
        ("/loop", AbortedError),
        ("http://[", AbortedError),
    ],
)
async def test_a_redirect_leads_nowhere_else(
    assets: Assets, origin: HttpOrigin, location: str, kind: type[LatheError]
) -> None:
    origin.answers["/loop"] = Answer(status=301, headers={"Location": location})

    assert isinstance(error_of(await assets.fetch(origin.uri("/loop"))), kind)

    assert len(origin.asked) <= 11


@pytest.mark.parametrize("hosts", [("*.example",), ("name.example",)])
async def test_a_private_address_must_be_named(
    stores: Stores,
    tmp_path: Path,
    clock: FakeClock,
    origin: HttpOrigin,
    monkeypatch: pytest.MonkeyPatch,
    hosts: tuple[str, ...],
) -> None:
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, origin.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_more: here)
    assets = Assets(stores, tmp_path, clock, hosts)
    try:
        outcome = await assets.fetch(f"http://name.example:{origin.port}/content")
    finally:
        await assets.assets.aclose()

    if hosts == ("name.example",):
        assert digest_of(outcome) == Digest.of(CONTENT)
    else:
        assert isinstance(error_of(outcome), PermissionDeniedError)
        assert "no public address" in error_of(outcome).message
        assert origin.asked == []


async def test_what_came_by_tls_is_not_fetched_without(
    stores: Stores, tmp_path: Path, clock: FakeClock, origin: HttpOrigin
) -> None:
    files = ensure_certificate(tmp_path / "tls", [HOST], datetime.datetime.now(datetime.UTC))
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=files.authority)
    server.load_cert_chain(files.certificate, files.key)
    answers = {"/down": Answer(status=302, headers={"Location": origin.uri("/content")}), "/here": Answer(b"here")}
    assets, stranger = Assets(stores, tmp_path, clock, tls=client), Assets(stores, tmp_path, clock)
    try:
        with HttpOrigin(answers, server) as secure:
            assert digest_of(await assets.fetch(secure.uri("/here"))) == Digest.of(b"here")
            assert isinstance(error_of(await assets.fetch(secure.uri("/down"))), AbortedError)
            assert origin.asked == []
            with pytest.raises(UnavailableError, match="certificate"):
                await stranger.fetch(secure.uri("/other"))
    finally:
        await assets.assets.aclose()
        await stranger.assets.aclose()


@in_memory
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, NotFoundError),
        (410, NotFoundError),
        (401, PermissionDeniedError),
        (403, PermissionDeniedError),
        (418, AbortedError),
        (204, AbortedError),
        (304, AbortedError),
    ],
)
async def test_what_the_origin_says_is_passed_on(
    assets: Assets, origin: HttpOrigin, status: int, kind: type[LatheError]
) -> None:
    origin.answers["/x"] = Answer(status=status)

    error = error_of(await assets.fetch(origin.uri("/x")))

    assert isinstance(error, kind)
    assert str(status) in error.message


async def test_trouble_of_the_origin_may_pass(assets: Assets, origin: HttpOrigin) -> None:
    origin.answers["/busy"] = Answer(status=503)
    origin.answers["/short"] = Answer(b"half", promised=8)

    for uri in [origin.uri("/busy"), origin.uri("/short"), f"http://{HOST}:1/x"]:
        with pytest.raises(UnavailableError):
            await assets.fetch(uri)


async def test_secrets_in_addresses_are_not_shown(assets: Assets, origin: HttpOrigin) -> None:
    error = error_of(await assets.fetch(origin.uri("/x?token=secret")))

    assert "secret" not in error.message
    assert origin.paths() == ["/x?token=secret"]


@pytest.mark.parametrize("promised", [None, -1])
async def test_what_is_too_large_is_refused(
    stores: Stores, assets: Assets, origin: HttpOrigin, promised: int | None
) -> None:
    origin.answers["/large"] = Answer(bytes(MAX_BYTES + 1), promised=promised)
    origin.answers["/fits"] = Answer(bytes(MAX_BYTES), promised=promised)

    digest_of(await assets.fetch(origin.uri("/fits")))
    with pytest.raises(ResourceExhaustedError, match="remote_asset_max_bytes"):
        await assets.fetch(origin.uri("/large"))


async def test_the_timeout_of_the_client_is_kept(assets: Assets, origin: HttpOrigin) -> None:
    origin.waits["/content"] = threading.Event()

    error = error_of(await assets.fetch(origin.uri("/content"), timeout_seconds=0.05))

    assert isinstance(error, DeadlineExceededError)
    assert "0.05 s" in error.message


async def test_bytes_are_taken_as_they_are(assets: Assets, origin: HttpOrigin) -> None:
    data = gzip.compress(b"content")
    origin.answers["/x.gz"] = Answer(data, headers={"Content-Encoding": "gzip"})

    assert digest_of(await assets.fetch(origin.uri("/x.gz"))) == Digest.of(data)
    assert origin.asked[0].headers["Accept-Encoding"] == "identity"


async def test_a_directory_is_whole_or_fetched_again(stores: Stores, assets: Assets, origin: HttpOrigin) -> None:
    origin.answers["/a.tar.gz"] = Answer(gzip.compress(tar({"a/b": b"content of b", "c": b"content of c"})))
    uri = origin.uri("/a.tar.gz")

    root = digest_of(await assets.fetch(uri, is_directory=True))

    assert digest_of(await assets.fetch(uri, is_directory=True)) == root
    assert len(origin.asked) == 1
    # A blob of it went; the record is no longer true.
    await stores.blobs.remove([Digest.of(b"content of b")])
    assert digest_of(await assets.fetch(uri, is_directory=True)) == root
    assert len(origin.asked) == 2
    # As a blob the same address is something else.
    assert digest_of(await assets.fetch(uri)) == Digest.of(origin.answers["/a.tar.gz"].body)


async def test_nothing_is_left_in_the_directory(assets: Assets, origin: HttpOrigin) -> None:
    origin.answers["/bad.tar"] = Answer(b"bad" * 1_000_000)
    await assets.fetch(origin.uri("/content"))
    error_of(await assets.fetch(origin.uri("/bad.tar"), is_directory=True))

    assert [path.name for path in assets.directory.iterdir() if path.name != "store"] == []


async def test_what_was_pushed_is_fetched_with_the_same_qualifiers(
    stores: Stores, assets: Assets, tmp_path: Path, clock: FakeClock
) -> None:
    (digest,) = await put(stores.blobs, b"pushed")
    await assets.push("urn:x", digest, qualifiers={"vcs__commit": "1"})
    await stores.reopen()
    again = Assets(stores, tmp_path, clock)

    assert digest_of(await again.fetch("urn:x", vcs__commit="1")) == digest
    assert isinstance(error_of(await again.fetch("urn:x")), NotFoundError)
    with pytest.raises(InvalidArgumentError, match=r'"vcs\.commit" not supported'):
        await again.fetch("urn:x", vcs__commit="2")
    await again.assets.aclose()


async def test_a_push_takes_the_place_of_another_and_expires(stores: Stores, assets: Assets, clock: FakeClock) -> None:
    first, second = await put(stores.blobs, b"first", b"second")
    await assets.push("urn:x", first)
    await assets.push("urn:x", second, expires_at=clock.wall_seconds() + 10)

    outcome = await assets.fetch("urn:x")
    assert digest_of(outcome) == second
    assert outcome.asset is not None
    assert outcome.asset.expires_at == pytest.approx(clock.wall_seconds() + 10, abs=1e-3)
    await clock.advance(11)
    assert isinstance(error_of(await assets.fetch("urn:x")), NotFoundError)


async def test_a_push_answers_only_while_all_that_it_refers_to_is_there(stores: Stores, assets: Assets) -> None:
    file, other, blob = await put(stores.blobs, b"file", b"other", b"blob")
    below = bytes(reapi.Directory(files=[reapi.FileNode(name="file", digest=file.to_message())]))
    (directory,) = await put(stores.blobs, below)
    root = bytes(reapi.Directory(directories=[reapi.DirectoryNode(name="d", digest=directory.to_message())]))
    (root_digest,) = await put(stores.blobs, root)

    for lost in [file, directory, root_digest, other]:
        await put(stores.blobs, b"file", b"other", b"blob", below, root)
        await assets.push("urn:dir", root_digest, is_directory=True, blobs=[other])
        await assets.push("urn:blob", blob, blobs=[other], directories=[root_digest])
        assert digest_of(await assets.fetch("urn:dir", is_directory=True)) == root_digest
        assert digest_of(await assets.fetch("urn:blob")) == blob
        await stores.blobs.remove([lost])
        assert isinstance(error_of(await assets.fetch("urn:dir", is_directory=True)), NotFoundError)
        assert isinstance(error_of(await assets.fetch("urn:blob")), NotFoundError)


async def test_a_push_is_checked(stores: Stores, assets: Assets) -> None:
    (digest,) = await put(stores.blobs, b"pushed")
    absent = Digest.of(b"absent")

    with pytest.raises(InvalidArgumentError, match=f"blob_digest.*{absent.hash}"):
        await assets.push("urn:x", absent)
    with pytest.raises(InvalidArgumentError, match="checksum"):
        await assets.push("urn:x", digest, qualifiers={"checksum__sri": sri(b"other")})
    with pytest.raises(InvalidArgumentError, match="directory"):
        await assets.push("urn:x", digest, is_directory=True)
    assert isinstance(error_of(await assets.fetch("urn:x")), NotFoundError)
    await assets.push("urn:x", digest, qualifiers={"checksum__sri": sri(b"pushed", "sha512")})
