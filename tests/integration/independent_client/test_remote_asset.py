"""Fetch and Push, as a stranger calls them."""

import base64
import hashlib
import io
import tarfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.generated_api import GeneratedApi
from tests.support.http_origin import Answer, HttpOrigin
from tests.support.service_process import HOST, ServiceProcess, free_ports

CONTENT = b"what is there"
TREE = {"top/a.txt": b"a", "top/below/b.txt": b"b"}


def tar_gz(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def sri(data: bytes) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(data).digest()).decode()}"


@pytest.fixture(scope="module")
def origin() -> Iterator[HttpOrigin]:
    with HttpOrigin({"/content": Answer(CONTENT), "/tree.tar.gz": Answer(tar_gz(TREE))}) as origin:
        yield origin


@pytest.fixture(scope="module")
def asset_cas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run a CAS that fetches from loopback and lets clients push; give its port."""
    root = tmp_path_factory.mktemp("remote_asset")
    port, http_port = free_ports(2)
    flags = [
        *(f"--host={HOST}", f"--port={port}", f"--http-port={http_port}", f"--data-dir={root / 'cas'}"),
        *("--remote-asset", "--remote-asset-push", f"--remote-asset-hosts={HOST},*.example.invalid"),
        "--instance-names=main",
    ]
    cas = ServiceProcess("cas", "lathe-cas", flags, http_port, root / "cas.log")
    cas.start()
    try:
        cas.wait_healthy()
        yield port
    finally:
        cas.discard()


@pytest.fixture(scope="module")
def own(api: GeneratedApi, asset_cas: int) -> Iterator[IndependentClient]:
    client = IndependentClient(api, f"{HOST}:{asset_cas}", f"{HOST}:{asset_cas}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def assets(api: GeneratedApi, own: IndependentClient) -> Any:
    return SimpleNamespace(
        fetch=api.asset_stubs.FetchStub(own.cas_channel), push=api.asset_stubs.PushStub(own.cas_channel), m=api.asset
    )


def fetch_blob(assets: Any, *uris: str, instance: str = INSTANCE, qualifiers: Any = None, **fields: Any) -> Any:
    named = [{"name": name, "value": value} for name, value in (qualifiers or {}).items()]
    request = assets.m.FetchBlobRequest(instance_name=instance, uris=uris, qualifiers=named, **fields)
    return assets.fetch.FetchBlob(request)


def test_a_blob_is_fetched_and_can_be_read(assets: Any, own: IndependentClient, origin: HttpOrigin) -> None:
    uri = origin.uri("/content")

    answer = fetch_blob(assets, uri, qualifiers={"checksum.sri": sri(CONTENT)})

    assert (answer.status.code, answer.uri, answer.blob_digest) == (0, uri, own.digest(CONTENT))
    assert answer.digest_function == own.api.reapi.DigestFunction.SHA256
    assert own.read(own.read_name(CONTENT)) == CONTENT


def test_a_directory_is_fetched_and_can_be_walked(assets: Any, own: IndependentClient, origin: HttpOrigin) -> None:
    request = assets.m.FetchDirectoryRequest(
        instance_name=INSTANCE,
        uris=[origin.uri("/tree.tar.gz")],
        qualifiers=[{"name": "directory", "value": "top"}],
    )

    answer = assets.fetch.FetchDirectory(request)

    assert answer.status.code == 0, answer
    pages = own.cas.GetTree(
        own.api.reapi.GetTreeRequest(instance_name=INSTANCE, root_digest=answer.root_directory_digest)
    )
    top, below = [directory for page in pages for directory in page.directories]
    assert [node.name for node in top.files] == ["a.txt"]
    assert [node.name for node in top.directories] == ["below"]
    assert below.files[0].digest == own.digest(b"b")
    assert own.missing(below.files[0].digest, top.files[0].digest) == []


def test_what_was_pushed_is_fetched(assets: Any, own: IndependentClient) -> None:
    (digest,) = own.store(b"pushed")
    uris = ["urn:uuid:1", "urn:uuid:2"]
    qualifiers = [{"name": "anything", "value": "goes"}]
    assets.push.PushBlob(
        assets.m.PushBlobRequest(instance_name=INSTANCE, uris=uris, qualifiers=qualifiers, blob_digest=digest)
    )

    answer = fetch_blob(assets, "urn:uuid:0", "urn:uuid:2", qualifiers={"anything": "goes"})

    assert (answer.status.code, answer.uri, answer.blob_digest) == (0, "urn:uuid:2", digest)


def test_the_last_of_all_times_is_never(assets: Any, own: IndependentClient) -> None:
    (digest,) = own.store(b"pushed for ever")
    last = {"seconds": 253_402_300_799, "nanos": 999_999_999}
    assets.push.PushBlob(
        assets.m.PushBlobRequest(instance_name=INSTANCE, uris=["urn:ever"], blob_digest=digest, expire_at=last)
    )

    answer = fetch_blob(assets, "urn:ever")

    assert (answer.status.code, answer.blob_digest, answer.expires_at.seconds) == (0, digest, last["seconds"])


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("https://elsewhere.invalid/x", grpc.StatusCode.PERMISSION_DENIED),
        ("http://user:secret@127.0.0.1/x", grpc.StatusCode.PERMISSION_DENIED),
        ("urn:uuid:unknown", grpc.StatusCode.NOT_FOUND),
        ("/gone", grpc.StatusCode.NOT_FOUND),
    ],
)
def test_errors_of_the_origin_are_in_the_response(
    assets: Any, own: IndependentClient, origin: HttpOrigin, uri: str, code: grpc.StatusCode
) -> None:
    uri = origin.uri(uri) if uri.startswith("/") else uri

    answer = fetch_blob(assets, uri)

    assert (answer.status.code, answer.uri) == (code.value[0], uri)
    assert "secret" not in answer.status.message
    # No blob can have it: who looks at the digest alone fails, too.
    assert own.missing(answer.blob_digest) != []


def test_another_content_is_no_match(assets: Any, origin: HttpOrigin) -> None:
    answer = fetch_blob(assets, origin.uri("/content"), qualifiers={"checksum.sri": sri(b"other")})

    assert answer.status.code == grpc.StatusCode.ABORTED.value[0]
    assert hashlib.sha256(CONTENT).hexdigest() in answer.status.message


def test_unknown_qualifiers_are_named(assets: Any, own: IndependentClient, origin: HttpOrigin) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        fetch_blob(assets, origin.uri("/content"), qualifiers={"vcs.branch": "main", "color": "red"})

    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    (detail,) = own.details(refused.value)
    assert [(violation.field, violation.description) for violation in detail.field_violations] == [
        ("qualifiers.name", '"color" not supported'),
        ("qualifiers.name", '"vcs.branch" not supported'),
    ]


def test_what_is_wrong_with_a_request_is_named(assets: Any, own: IndependentClient) -> None:
    push, m = assets.push, assets.m
    absent = own.digest(b"nobody has this")
    (file,) = own.store(b"no directory")
    twice = [{"name": "a", "value": "1"}, {"name": "a", "value": "2"}]
    wrong: list[tuple[str, Any, Any]] = [
        ("uris", assets.fetch.FetchBlob, m.FetchBlobRequest(instance_name=INSTANCE)),
        ("uris", assets.fetch.FetchDirectory, m.FetchDirectoryRequest(instance_name=INSTANCE)),
        ("instance_name", assets.fetch.FetchBlob, m.FetchBlobRequest(instance_name="other", uris=["urn:x"])),
        ("instance_name", push.PushBlob, m.PushBlobRequest(instance_name="other", uris=["urn:x"], blob_digest=file)),
        (
            "qualifiers.name",
            assets.fetch.FetchBlob,
            m.FetchBlobRequest(instance_name=INSTANCE, uris=["urn:x"], qualifiers=twice),
        ),
        (
            "digest_function",
            assets.fetch.FetchBlob,
            m.FetchBlobRequest(instance_name=INSTANCE, uris=["urn:x"], digest_function=4),
        ),
        (
            "timeout",
            assets.fetch.FetchBlob,
            m.FetchBlobRequest(instance_name=INSTANCE, uris=["urn:x"], timeout={"seconds": -1}),
        ),
        ("blob_digest.hash", push.PushBlob, m.PushBlobRequest(instance_name=INSTANCE, uris=["urn:x"])),
        ("blob_digest", push.PushBlob, m.PushBlobRequest(instance_name=INSTANCE, uris=["urn:x"], blob_digest=absent)),
        (
            "directory",
            push.PushDirectory,
            m.PushDirectoryRequest(instance_name=INSTANCE, uris=["urn:x"], root_directory_digest=file),
        ),
    ]

    for field, method, request in wrong:
        with pytest.raises(grpc.RpcError) as refused:
            method(request)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, request
        (detail,) = own.details(refused.value)
        assert [violation.field for violation in detail.field_violations] == [field], request


def test_without_the_setting_there_is_no_such_service(client: IndependentClient) -> None:
    fetch: Any = client.api.asset_stubs.FetchStub(client.cas_channel)

    with pytest.raises(grpc.RpcError) as refused:
        fetch.FetchBlob(client.api.asset.FetchBlobRequest(instance_name=INSTANCE, uris=["urn:x"]))

    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
