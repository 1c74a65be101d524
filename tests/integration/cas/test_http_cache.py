"""The HTTP cache: what clients get for what they ask, by a real client and over a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from tests.contract.cas.blob_making import content, put, read
from tests.integration.cas.http_server import HOST, HttpServer, http_server, in_pieces

from lathe_cas.app import build
from lathe_cas.config import CasSettings
from lathe_protos import reapi
from lathe_shared.digest import EMPTY_HASHES, Digest, DigestFunction
from lathe_shared.lifecycle import ServiceRuntime

CHUNK = 65_520
STAGE = 16 * CHUNK
SIZES = [1, 1000, CHUNK, 3 * CHUNK + 1, 3 * STAGE + 5]
ACTION = Digest.of(b"an action")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HttpServer]:
    async with http_server(tmp_path) as server:
        yield server


def action_result(*outputs: bytes) -> bytes:
    files = [
        reapi.OutputFile(path=f"out_{index}", digest=Digest.of(data).to_message()) for index, data in enumerate(outputs)
    ]
    return bytes(reapi.ActionResult(output_files=files, exit_code=0))


@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_blob_that_was_put_is_there_for_everybody(server: HttpServer, size_bytes: int, chunked: bool) -> None:
    data = content(size_bytes)
    digest = Digest.of(data)
    path = f"/cas/{digest.hash}"
    assert (await server.get(path)).status == (await server.ask("HEAD", path)).status == 404

    assert (await server.put(path, in_pieces(data) if chunked else data)).status == 200

    assert await read(server.blobs, digest) == data
    got = await server.get(path)
    assert (got.status, got.body) == (200, data)
    # Any instance has it, as with gRPC.
    head = await server.ask("HEAD", f"/some/instance{path}")
    assert (head.status, head.body) == (200, b"")
    for answer in (got, head):
        assert answer.headers["Content-Length"] == str(size_bytes)
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert "Content-Encoding" not in answer.headers
    assert server.blobs.status().staged_bytes == 0


@pytest.mark.parametrize("function", list(DigestFunction))
async def test_every_digest_function_is_served(server: HttpServer, function: DigestFunction) -> None:
    digest = Digest.of(b"by any function", function)
    named = "" if function.is_told_by_length else f"{function.segment}/"
    assert (await server.put(f"/cas/{named}{digest.hash}", b"by any function")).status == 200
    assert (await server.get(f"/cas/{function.segment}/{digest.hash}")).body == b"by any function"
    assert server.missing(digest) == []
    empty = await server.get(f"/cas/{named}{EMPTY_HASHES[function]}")
    assert (empty.status, empty.body, empty.headers["Content-Length"]) == (200, b"", "0")


async def test_the_empty_blob_may_be_put(server: HttpServer) -> None:
    assert (await server.put(f"/cas/{EMPTY_HASHES[DigestFunction.SHA256]}", b"")).status == 200
    assert server.is_clean()


@pytest.mark.parametrize("size_bytes", [10, 3 * STAGE])
@pytest.mark.parametrize("chunked", [False, True])
async def test_bytes_that_are_not_the_blob_are_refused(server: HttpServer, size_bytes: int, chunked: bool) -> None:
    digest, other = Digest.of(b"what was promised"), content(size_bytes)
    answer = await server.put(f"/cas/{digest.hash}", in_pieces(other) if chunked else other)
    assert answer.status == 400
    assert digest.hash in answer.text
    assert str(Digest.of(other)) in answer.text
    assert server.is_clean()


async def test_a_blob_that_is_there_is_not_written_again_and_still_verified(server: HttpServer) -> None:
    data = content(2 * STAGE)
    (digest,) = await put(server.blobs, data)
    written = server.blobs.status().counters["written_blobs"]
    assert (await server.put(f"/cas/{digest.hash}", data)).status == 200
    wrong = await server.put(f"/cas/{digest.hash}", data[:-1])
    assert (wrong.status, digest.hash in wrong.text) == (400, True)
    assert server.blobs.status().counters["written_blobs"] == written
    assert await read(server.blobs, digest) == data


async def test_an_action_result_is_there_when_all_that_it_names_is(server: HttpServer) -> None:
    result = action_result(b"first", b"second")
    path = f"/main/ac/{ACTION.hash}"
    assert (await server.put(path, result)).status == 200
    await put(server.blobs, b"first")
    assert (await server.get(path)).status == (await server.ask("HEAD", path)).status == 404

    await put(server.blobs, b"second")

    got, head = await server.get(path), await server.ask("HEAD", path)
    assert (got.status, got.body) == (200, result)
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(result)))
    assert await server.action_result("main", ACTION) == result
    # And in no other instance.
    for other in ("", "/other", "/main/more"):
        assert (await server.get(f"{other}/ac/{ACTION.hash}")).status == 404


async def test_an_action_result_whose_tree_came_later_is_found(server: HttpServer) -> None:
    tree = bytes(
        reapi.Tree(root=reapi.Directory(files=[reapi.FileNode(name="f", digest=Digest.of(b"leaf").to_message())]))
    )
    directory = reapi.OutputDirectory(path="out", tree_digest=Digest.of(tree).to_message())
    path, result = f"/ac/{ACTION.hash}", bytes(reapi.ActionResult(output_directories=[directory]))
    assert (await server.put(path, result)).status == 200
    await put(server.blobs, tree)
    assert (await server.get(path)).status == 404
    await put(server.blobs, b"leaf")
    assert (await server.get(path)).body == result


@pytest.mark.parametrize("body", [b"ccAC, what ccache stores", b"\x12\x04\x12\x02\x0a\x09", b"\x1a\xff"])
async def test_what_is_no_action_result_does_not_get_among_them(server: HttpServer, body: bytes) -> None:
    answer = await server.put(f"/ac/{ACTION.hash}", body)
    assert answer.status == 400
    assert "/cache/" in answer.text, "says where such values belong"
    assert (await server.get(f"/ac/{ACTION.hash}")).status == 404
    assert server.is_clean()


@pytest.mark.parametrize("size_bytes", [0, *SIZES])
async def test_a_value_is_what_was_put_last(server: HttpServer, size_bytes: int) -> None:
    path = "/cache/any/key.of some-kind+%C3%A4"
    for seed in (1, 2):
        data = content(size_bytes, seed)
        assert (await server.put(path, in_pieces(data) if seed == 2 else data)).status == 200
        got, head = await server.get(path), await server.ask("HEAD", path)
        assert (got.status, got.body) == (200, data)
        assert (head.status, head.headers["Content-Length"]) == (200, str(size_bytes))
    assert (await server.get("/cache/any/key")).status == 404


async def test_values_and_action_results_never_meet(server: HttpServer) -> None:
    key = f"ac/{ACTION.hash}"
    result = action_result(b"output")
    await put(server.blobs, b"output")
    assert (await server.put(f"/cache/{key}", b"a value")).status == 200
    assert (await server.get(f"/{key}")).status == (await server.get(f"/main/{key}")).status == 404
    assert (await server.get(f"/ac/{Digest.of(key.encode()).hash}")).status == 404
    assert (await server.put(f"/{key}", result)).status == 200
    assert (await server.get(f"/cache/{key}")).body == b"a value"
    assert (await server.get(f"/{key}")).body == result
    # The instance that values are kept under is one that nobody can name.
    for outside in ("//cache", "/%2Fcache"):
        assert (await server.get(f"{outside}/{key}")).status == 400


async def test_a_value_whose_blob_is_gone_is_not_there(server: HttpServer) -> None:
    await server.put("/cache/key", b"a value")
    await server.blobs.remove([Digest.of(b"a value")])
    assert (await server.get("/cache/key")).status == (await server.ask("HEAD", "/cache/key")).status == 404
    await server.put("/cache/key", b"a value")
    assert (await server.get("/cache/key")).body == b"a value"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/cas/", "0 hexadecimal digits"),
        ("/cas/abc", "3 hexadecimal digits"),
        ("/cas/" + 64 * "g", "lower-case hexadecimal"),
        ("/cas/" + 64 * "A", "lower-case hexadecimal"),
        ("/ac/" + 65 * "a", "65 hexadecimal digits"),
        ("/ac/sha9/" + 64 * "a", "FUNCTION/HASH"),
        ("/ac/sha1/" + 64 * "a", "SHA1"),
        ("/ac/x/y/" + 64 * "a", "FUNCTION/HASH"),
        ("/cas/" + 64 * "a" + "/", "FUNCTION/HASH"),
        ("//ac/" + 64 * "a", "two slashes"),
        ("/a//b/cas/" + 64 * "a", "empty segment"),
        ("/blobs/cas/" + 64 * "a", "names a resource"),
        ("/a%00b/cas/" + 64 * "a", "unprintable"),
        ("/cache/", "no key"),
        ("/cache/a//b", "no key"),
        ("/cache/a/", "no key"),
        ("/cache/a%0Ab", "no key"),
        ("/cache/" + 1025 * "a", "1025"),
        ("/cache/cas/" + 64 * "a", "nothing is verified"),
        ("/cache/some/instance/cas/" + 40 * "a", "nothing is verified"),
    ],
)
async def test_malformed_paths_are_refused_by_name(server: HttpServer, path: str, problem: str) -> None:
    for method in ("GET", "PUT"):
        answer = await server.ask(method, path, b"data" if method == "PUT" else None)
        assert (answer.status, problem in answer.text) == (400, True), answer
    assert (await server.ask("HEAD", path)).status == 400
    assert server.is_clean()


@pytest.mark.parametrize("path", ["/", "/cas", "/ac", "/cache", "/x", "/CAS/" + 64 * "a", "/metrics/cas"])
async def test_other_paths_are_not_the_caches(server: HttpServer, path: str) -> None:
    assert (await server.get(path)).status == (await server.put(path, b"data")).status == 404


async def test_unknown_instances_are_refused_naming_the_known(tmp_path: Path) -> None:
    async with http_server(tmp_path, instance_names=("main",)) as server:
        for path in (f"/other/ac/{ACTION.hash}", f"/cas/{ACTION.hash}"):
            for answer in (await server.get(path), await server.put(path, b"")):
                assert (answer.status, "'main'" in answer.text) == (400, True)
        assert (await server.put(f"/main/ac/{ACTION.hash}", b"")).status == 200
        assert (await server.put("/cache/key", b"has no instance")).status == 200


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "PATCH", "MKCOL", "PROPFIND"])
async def test_other_methods_are_refused_naming_the_known(server: HttpServer, method: str) -> None:
    for path in (f"/cas/{ACTION.hash}", f"/ac/{ACTION.hash}"):
        answer = await server.ask(method, path)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, PUT")


async def test_webdav_clients_may_ask_for_folders_and_values(server: HttpServer) -> None:
    await server.put("/cache/a&b/key", b"a value")
    folder = await server.ask("PROPFIND", "/cache/a&b/", headers={"Depth": "1"})
    assert (folder.status, folder.headers["Content-Type"]) == (207, "application/xml; charset=utf-8")
    assert "<D:href>/cache/a%26b/</D:href>" in folder.text
    assert "<D:collection/>" in folder.text
    value = await server.ask("PROPFIND", "/cache/a&b/key", headers={"Depth": "1"})
    assert value.status == 207
    assert "<D:getcontentlength>7</D:getcontentlength>" in value.text
    assert "<D:collection/>" not in value.text
    assert (await server.ask("PROPFIND", "/cache/a&b/other")).status == 404
    assert (await server.ask("MKCOL", "/cache/a&b/")).status == 405


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/cache/key", f"/cas/{Digest.of(content(3 * STAGE)).hash}"])
async def test_a_body_over_the_limit_is_refused(tmp_path: Path, path: str, chunked: bool) -> None:
    async with http_server(tmp_path, max_body_bytes=2 * STAGE) as server:
        data = content(3 * STAGE)
        answer = await server.put(path, in_pieces(data) if chunked else data)
        assert answer.status == 413
        assert "2096640" in answer.text
        assert "http_cache_max_body_bytes" in answer.text
        await server.store.settle()
        assert server.is_clean()
        assert (await server.put("/cache/key", content(2 * STAGE))).status == 200


async def test_an_action_result_over_the_limit_is_refused(server: HttpServer) -> None:
    answer = await server.put(f"/ac/{ACTION.hash}", bytes((16 << 20) + 1))
    assert (answer.status, str(16 << 20) in answer.text) == (413, True)


@pytest.mark.parametrize("path", ["/cache/key", f"/cas/{Digest.of(content(3 << 20)).hash}"])
async def test_what_does_not_fit_into_the_store_is_answered_so(tmp_path: Path, path: str) -> None:
    async with http_server(tmp_path, limit_bytes=2 << 20) as server:
        answer = await server.put(path, content(3 << 20))
        assert (answer.status, "max_size_bytes" in answer.text) == (507, True)
        assert server.is_clean()
        assert (await server.put("/cache/key", b"fits")).status == 200


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, None)),
        ("bytes=-7", (-7, None)),
        ("bytes=65519-65521", (65_519, 65_522)),
        ("bytes=1-99999999", (1, None)),
    ],
)
async def test_a_part_of_a_blob_can_be_asked_for(
    server: HttpServer, wanted: str, expected: tuple[int, int | None]
) -> None:
    data = content(200_000)
    await server.put("/cache/key", data)
    answer = await server.ask("GET", "/cache/key", headers={"Range": wanted})
    part = data[slice(*expected)]
    start = expected[0] % len(data)
    assert (answer.status, answer.body) == (206, part)
    assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/200000"
    # Spec: RFC 9110 section 14.2, ranges are for GET alone.
    head = await server.ask("HEAD", "/cache/key", headers={"Range": wanted})
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(data)))
    assert "Content-Range" not in head.headers


async def test_ranges_that_cannot_be_served(server: HttpServer) -> None:
    await server.put("/cache/key", b"0123456789")
    beyond = await server.ask("GET", "/cache/key", headers={"Range": "bytes=10-"})
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, "bytes */10")
    for ignored in ("bytes=0-1,4-5", "pages=1-2", "bytes=5-2"):
        answer = await server.ask("GET", "/cache/key", headers={"Range": ignored})
        assert (answer.status, answer.body) == (200, b"0123456789")
    changed = await server.ask("GET", "/cache/key", headers={"Range": "bytes=1-2", "If-Range": '"another"'})
    assert (changed.status, changed.body) == (200, b"0123456789")


async def test_what_a_client_has_already_is_not_sent(server: HttpServer) -> None:
    await server.put("/cache/key", b"a value")
    tag = (await server.get("/cache/key")).headers["ETag"]
    same = await server.ask("GET", "/cache/key", headers={"If-None-Match": tag})
    assert (same.status, same.body, same.headers["ETag"]) == (304, b"", tag)
    await server.put("/cache/key", b"another value")
    other = await server.ask("GET", "/cache/key", headers={"If-None-Match": tag})
    assert (other.status, other.body) == (200, b"another value")


async def test_read_only_means_that_nothing_is_written(tmp_path: Path) -> None:
    async with http_server(tmp_path, writable=False) as server:
        for path in (f"/cas/{Digest.of(b'data').hash}", f"/ac/{ACTION.hash}", "/cache/key"):
            answer = await server.put(path, b"data")
            assert (answer.status, "http_cache" in answer.text) == (403, True)
            assert (await server.ask("POST", path)).headers["Allow"] == "GET, HEAD"
        assert server.is_clean()
        await put(server.blobs, b"data")
        assert (await server.get(f"/cas/{Digest.of(b'data').hash}")).body == b"data"


async def test_pages_in_browsers_are_refused(server: HttpServer) -> None:
    await server.put("/cache/key", b"a value")
    for method, body in (("PUT", b"theirs"), ("GET", None)):
        answer = await server.ask(method, "/cache/key", body, {"Origin": f"http://{HOST}:{server.port}"})
        assert (answer.status, "browsers" in answer.text) == (403, True)
    assert (await server.get("/cache/key")).body == b"a value"
    assert (await server.get("/cache/key")).headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "status"), [({"Content-Encoding": "gzip"}, 415), ({"Content-Range": "bytes 0-1/5"}, 400)]
)
async def test_a_body_that_is_not_the_value_itself_is_refused(
    server: HttpServer, headers: dict[str, str], status: int
) -> None:
    assert (await server.ask("PUT", "/cache/key", b"data", headers)).status == status
    assert server.is_clean()


async def test_requests_are_counted_by_outcome(server: HttpServer) -> None:
    digest = Digest.of(b"data")
    await server.put(f"/cas/{digest.hash}", b"data")
    await server.put(f"/cas/{digest.hash}", b"other")
    await server.get(f"/cas/{digest.hash}")
    await server.ask("HEAD", f"/ac/{ACTION.hash}")
    await server.put("/cache/key", b"data")
    await server.ask("PROPFIND", "/cache/")
    await server.ask("POST", "/cache/key")
    assert await server.requests() == {
        ("cas", "PUT", "stored"): 1,
        ("cas", "PUT", "refused"): 1,
        ("cas", "GET", "hit"): 1,
        ("ac", "HEAD", "miss"): 1,
        ("cache", "PUT", "stored"): 1,
        ("cache", "PROPFIND", "hit"): 1,
        ("none", "other", "refused"): 1,
    }


@pytest.mark.parametrize(
    ("setting", "statuses"), [("off", (404, 404)), ("read-only", (404, 403)), ("read-write", (404, 200))]
)
async def test_the_setting_says_what_is_served(tmp_path: Path, setting: str, statuses: tuple[int, int]) -> None:
    given = {"host": HOST, "port": 0, "http_port": 0, "data_dir": tmp_path, "max_size_bytes": 1 << 24}
    settings = CasSettings(**given, http_cache=setting)  # type: ignore[arg-type]
    runtime = ServiceRuntime(settings, CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        async with aiohttp.ClientSession() as client:
            url = f"http://{HOST}:{runtime.ports['http']}"
            assert (await client.get(f"{url}/cache/key")).status == statuses[0]
            assert (await client.put(f"{url}/cache/key", data=b"value")).status == statuses[1]
            assert (await (await client.get(f"{url}/status")).json())["http_cache"] == setting
    finally:
        assert await runtime.stop()


def test_it_is_off_unless_asked_for() -> None:
    assert CasSettings().http_cache == "off"
