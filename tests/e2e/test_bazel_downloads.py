"""Bazel downloads what its workspace names through the CAS (--experimental_remote_downloader)."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bazel import Bazel
from tests.support.http_origin import Answer, HttpOrigin
from tests.support.required import require_programs
from tests.support.service_process import HOST, ServiceProcess, free_ports


def archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in {"BUILD": b'exports_files(["answer.txt"])\n', "answer.txt": b"forty-two\n"}.items():
            member = tarfile.TarInfo(f"library-1.0/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


ARCHIVE = archive()
FILE = b"a single file\n"


@pytest.fixture
def origin() -> Iterator[HttpOrigin]:
    with HttpOrigin({"/library.tar.gz": Answer(ARCHIVE), "/file.txt": Answer(FILE)}) as origin:
        yield origin


@pytest.fixture
def bazel(tmp_path: Path) -> Iterator[Bazel]:
    """Run a CAS that downloads from loopback, and a Bazel that has it download."""
    require_programs("bazel")
    port, http_port = free_ports(2)
    flags = [
        f"--host={HOST}",
        f"--port={port}",
        f"--http-port={http_port}",
        f"--data-dir={tmp_path / 'cas'}",
        "--remote-asset",
        f"--remote-asset-hosts={HOST}",
    ]
    cas = ServiceProcess("cas", "lathe-cas", flags, http_port, tmp_path / "cas.log")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    cas_flags = tuple(f"--{flag}=grpc://{HOST}:{port}" for flag in ("remote_cache", "experimental_remote_downloader"))
    bazel = Bazel(workspace, tmp_path / "bazel", (*cas_flags, "--repository_cache="))
    cas.start()
    try:
        cas.wait_healthy()
        yield bazel
    finally:
        bazel.remove()
        cas.discard()


def write_workspace(root: Path, repositories: str, sources: str) -> None:
    load = 'load("@bazel_tools//tools/build_defs/repo:http.bzl", "http_archive", "http_file")'
    (root / "WORKSPACE").write_text(f"{load}\n{repositories}")
    (root / "BUILD").write_text(
        f"""genrule(name = "all", srcs = [{sources}], outs = ["all.txt"], cmd = "cat $(SRCS) > $@")"""
    )


def test_archives_and_files_come_through_the_cas(bazel: Bazel, origin: HttpOrigin) -> None:
    write_workspace(
        bazel.workspace,
        f"""
http_archive(
    name = "library",
    sha256 = "{hashlib.sha256(ARCHIVE).hexdigest()}",
    strip_prefix = "library-1.0",
    urls = ["{origin.uri("/gone.tar.gz")}", "{origin.uri("/library.tar.gz")}"],
)
http_file(
    name = "single",
    sha256 = "{hashlib.sha256(FILE).hexdigest()}",
    urls = ["{origin.uri("/file.txt")}"],
)
""",
        '"@library//:answer.txt", "@single//file"',
    )

    bazel.build("//:all")

    assert bazel.output_file("all.txt").read_bytes() == b"forty-two\n" + FILE
    assert sorted(origin.paths()) == ["/file.txt", "/gone.tar.gz", "/library.tar.gz"]
    assert {asked.headers["User-Agent"].partition("/")[0] for asked in origin.asked} == {"lathe-cas"}

    # Another checkout, or another machine: the CAS knows it all.
    bazel.clean(expunge=True)
    bazel.build("//:all")
    assert len(origin.asked) == 3


def test_content_that_is_not_what_the_checksum_says_is_refused(bazel: Bazel, origin: HttpOrigin) -> None:
    sha256 = hashlib.sha256(b"other").hexdigest()
    repository = f'http_file(name = "single", sha256 = "{sha256}", urls = ["{origin.uri("/file.txt")}"])'
    write_workspace(bazel.workspace, repository, '"@single//file"')

    result = bazel.run("build", "//:all")

    assert result.exit_code != 0
    assert origin.paths()[0] == "/file.txt"


def test_a_refused_download_without_a_checksum_is_no_empty_file(bazel: Bazel) -> None:
    # Bazel 4 asks for a checksum of what comes without TLS, and for nothing else.
    repository = 'http_file(name = "single", urls = ["https://not-allowed.invalid/file.txt"])'
    write_workspace(bazel.workspace, repository, '"@single//file"')

    result = bazel.run("build", "//:all")

    assert result.exit_code != 0, result.output
    assert "single" in result.output
