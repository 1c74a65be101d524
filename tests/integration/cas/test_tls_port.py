"""The CAS on both ports: grpcio as the client, with the private authority's certificate."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from lathe_cas.app import build
from lathe_cas.config import CasSettings
from lathe_cas.tls_port import certificate_names
from lathe_shared.config_loading import ConfigurationError, read_settings
from lathe_shared.lifecycle import ServiceRuntime, StartError

RPC_SECONDS = 20
HOST = "127.0.0.1"
CAPABILITIES = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities"


def settings(tmp_path: Path, **more: object) -> CasSettings:
    given = {"host": HOST, "port": 0, "http_port": 0, "data_dir": tmp_path / "cas", "max_size_bytes": 1 << 24}
    return CasSettings(**(given | more))  # type: ignore[arg-type]


async def test_tls_clients_get_what_plain_ones_get(tmp_path: Path) -> None:
    runtime = ServiceRuntime(settings(tmp_path, tls_port=0), CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        credentials = grpc.ssl_channel_credentials((tmp_path / "cas/tls/ca.crt").read_bytes())
        plain = grpc.aio.insecure_channel(f"{HOST}:{runtime.ports['grpc']}")
        secure = grpc.aio.secure_channel(f"localhost:{runtime.ports['tls']}", credentials)
        async with plain, secure:
            answers = [
                await channel.unary_unary(CAPABILITIES, None, None)(b"", timeout=RPC_SECONDS)
                for channel in (plain, secure)
            ]
            assert answers[0] == answers[1] != b""
            health = secure.unary_unary("/grpc.health.v1.Health/Check", None, None)
            assert await health(b"", timeout=RPC_SECONDS) == b"\x08\x01"
    finally:
        assert await runtime.stop()


async def test_without_a_port_there_is_no_authority_either(tmp_path: Path) -> None:
    runtime = ServiceRuntime(settings(tmp_path), CollectorRegistry())
    await build(runtime)
    await runtime.start()
    try:
        assert set(runtime.ports) == {"grpc", "http"}
        assert not (tmp_path / "cas/tls").exists()
    finally:
        assert await runtime.stop()


async def test_an_unusable_certificate_stops_the_start_and_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    runtime = ServiceRuntime(
        settings(tmp_path, tls_port=0, tls_certificate=absent, tls_key=absent), CollectorRegistry()
    )
    with pytest.raises(StartError, match=r"tls: .*absent\.pem cannot be used: no such file"):
        await build(runtime)
    assert await runtime.stop()


def test_the_certificate_is_for_all_that_the_machine_is_called(tmp_path: Path) -> None:
    more = tmp_path / "names"
    more.write_text("outer.example.org\n\n10.1.2.3\n")
    names = certificate_names(settings(tmp_path, tls_names=["cas", "localhost"], tls_names_file=more))
    assert names == [
        *dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), "cas", "outer.example.org", "10.1.2.3"])
    ]


def test_settings_that_do_not_go_together_are_refused() -> None:
    for arguments, problem in (
        (["--tls-port=1", "--tls-certificate=/c"], "need each other"),
        (["--tls-port=1", "--tls-key=/k"], "need each other"),
        (["--tls-certificate=/c", "--tls-key=/k"], "no use without tls_port"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            read_settings(CasSettings, arguments)
