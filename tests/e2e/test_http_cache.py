"""The HTTP cache with real clients: Bazel, ccache, curl."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bazel import Bazel
from tests.support.required import require_programs
from tests.support.service_process import HOST, ServiceProcess, free_ports
from tests.support.workspace import make_workspace

# A tree, a file, a symlink and programs among them.
TARGETS = ("//special/...", "//generated/...", "//libs:lib_00")


class HttpCas:
    """A CAS whose HTTP cache may be written."""

    def __init__(self, root: Path) -> None:
        self.port, self.http_port = free_ports(2)
        self.url = f"http://{HOST}:{self.http_port}"
        self.process = ServiceProcess(
            "cas",
            "lathe-cas",
            [
                f"--host={HOST}",
                f"--port={self.port}",
                f"--http-port={self.http_port}",
                f"--data-dir={root / 'cas'}",
                "--http-cache=read-write",
            ],
            self.http_port,
            root / "cas.log",
        )

    def requests(self, **labels: str) -> float:
        """Count the cache's requests that have these labels."""
        return self.process.metrics().total("lathe_cas_http_cache_requests_total", **labels)


@pytest.fixture(scope="module")
def cas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpCas]:
    cas = HttpCas(tmp_path_factory.mktemp("http_cache"))
    cas.process.start()
    try:
        cas.process.wait_healthy()
        yield cas
    finally:
        cas.process.discard()


@pytest.fixture
def bazel(tmp_path: Path) -> Iterator[Bazel]:
    require_programs("bazel", "g++")
    workspace = make_workspace(tmp_path / "workspace", salt="http")
    bazel = Bazel(workspace.root, tmp_path / "bazel", ("--spawn_strategy=local", "--genrule_strategy=local"))
    yield bazel
    bazel.remove()


def test_bazel_finds_by_http_and_by_grpc_what_it_stored_by_http(bazel: Bazel, cas: HttpCas) -> None:
    by_http = (f"--remote_cache={cas.url}/main", *TARGETS)
    first = bazel.build(*by_http)
    assert set(first.spawns) == {"local"}
    assert "WARNING: Remote Cache" not in first.output
    program = bazel.output_file("special/program.answer").read_bytes()

    bazel.clean()
    assert bazel.build(*by_http).spawns == {"remote cache hit": first.spawns["local"]}
    assert bazel.output_file("special/program.answer").read_bytes() == program
    assert cas.requests(kind="ac", outcome="hit") == first.spawns["local"]
    assert cas.requests(outcome="refused") == cas.requests(outcome="failed") == 0

    # The action results are those of the instance that the address names, and no other's.
    for instance_name, kind in (("main", "remote cache hit"), ("other", "local")):
        bazel.clean()
        by_grpc = (f"--remote_cache=grpc://{HOST}:{cas.port}", f"--remote_instance_name={instance_name}", *TARGETS)
        assert bazel.build("--noremote_upload_local_results", *by_grpc).spawns == {kind: first.spawns["local"]}


def compile_with_ccache(source: Path, remote_storage: str) -> dict[str, int]:
    """Compile a file with a local cache that is empty, and return ccache's figures."""
    folder = source.parent / f"local_cache_{len(list(source.parent.iterdir()))}"
    environ = os.environ | {
        "CCACHE_DIR": str(folder),
        "CCACHE_REMOTE_STORAGE": remote_storage,
        "CCACHE_CONFIGPATH": str(folder / "ccache.conf"),
    }
    source.with_suffix(".o").unlink(missing_ok=True)
    subprocess.run(
        ["ccache", "g++", "-c", source.name, "-o", source.stem + ".o"], cwd=source.parent, env=environ, check=True
    )
    figures = subprocess.run(["ccache", "--print-stats"], env=environ, check=True, capture_output=True, text=True)
    return {name: int(count) for name, count in (line.split("\t") for line in figures.stdout.splitlines())}


@pytest.mark.parametrize("layout", ["subdirs", "flat", "bazel"])
def test_ccache_finds_what_it_stored(tmp_path: Path, cas: HttpCas, layout: str) -> None:
    require_programs("ccache", "g++")
    source = tmp_path / "answer.cc"
    source.write_text("int answer() { return 42; }\n")
    remote_storage = f"{cas.url}/cache/ccache-{layout}|layout={layout}"

    first = compile_with_ccache(source, remote_storage)
    assert (first["remote_storage_write"], first["remote_storage_hit"], first["remote_storage_error"]) == (2, 0, 0)
    compiled = source.with_suffix(".o").read_bytes()

    second = compile_with_ccache(source, remote_storage)
    assert (second["remote_storage_write"], second["remote_storage_hit"], second["cache_miss"]) == (0, 1, 0)
    assert source.with_suffix(".o").read_bytes() == compiled


def test_ccache_cannot_write_where_bazel_reads(tmp_path: Path, cas: HttpCas) -> None:
    require_programs("ccache", "g++")
    source = tmp_path / "answer.cc"
    source.write_text("int answer() { return 43; }\n")
    refused = cas.requests(kind="ac", method="PUT", outcome="refused")

    figures = compile_with_ccache(source, f"{cas.url}|layout=bazel")

    assert source.with_suffix(".o").exists()
    assert (figures["remote_storage_write"], figures["remote_storage_error"]) == (0, 1)
    assert cas.requests(kind="ac", method="PUT", outcome="refused") == refused + 1


def test_curl_stores_and_fetches(tmp_path: Path, cas: HttpCas) -> None:
    require_programs("curl")
    # Above a mebibyte curl asks for 100 Continue; from a pipe it sends chunks.
    data = os.urandom(3_000_000)
    for upload in (["--upload-file", "-"], ["--request", "PUT", "--data-binary", "@-"]):
        url = f"{cas.url}/cache/curl/{len(upload)}"
        subprocess.run(["curl", "--silent", "--show-error", "--fail", *upload, url], input=data, check=True)
        fetched = subprocess.run(["curl", "--silent", "--fail", url], check=True, capture_output=True)
        assert fetched.stdout == data
