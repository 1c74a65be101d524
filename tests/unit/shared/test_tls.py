"""The TLS port as clients see it: grpcio and Python's ssl, by a real socket."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from lathe_shared.health import HealthServicer, ServingStatus
from lathe_shared.service_boundary import make_server
from lathe_shared.testing.fake_clock import FakeClock
from lathe_shared.tls import CHECK_SECONDS, OperatorFiles, PrivateAuthority, ServerTls, TlsError
from lathe_shared.tls_authority import CERTIFICATE_DAYS

DAY_SECONDS = 86400.0
HOST = "127.0.0.1"
WAIT_SECONDS = 20
SERVING_RESPONSE = b"\x08\x01"


@pytest.fixture
def clock() -> FakeClock:
    # Certificates must be good by the clients' clocks, too, which are the machine's.
    return FakeClock(time.time())


@pytest.fixture
def operator_files(tmp_path: Path, clock: FakeClock) -> Path:
    return make_files(tmp_path / "operator", clock)


def make_files(directory: Path, clock: FakeClock) -> Path:
    PrivateAuthority(directory, ["localhost", HOST], clock).current()
    return directory


def operators(directory: Path) -> OperatorFiles:
    return OperatorFiles(directory / "server.crt", directory / "server.key")


@asynccontextmanager
async def serving(tls: ServerTls) -> AsyncIterator[int]:
    health = HealthServicer()
    health.set_all(ServingStatus(ServingStatus.SERVING))
    server = make_server([health])
    await server.start(HOST, 0, ssl=tls.context)
    try:
        yield server.port
    finally:
        server.end_rpcs()
        await server.shut_down()


async def shown_certificate(port: int, authority: Path) -> bytes:
    """Connect as a client that trusts the authority, and return the server's certificate."""
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2", "http/1.1"])

    def connect() -> bytes:
        with (
            socket.create_connection((HOST, port), WAIT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            assert connection.selected_alpn_protocol() == "h2"
            # The server's SETTINGS: it has the connection, and so closes it.
            assert connection.recv(1)
            return connection.getpeercert(binary_form=True) or b""

    return await asyncio.to_thread(connect)


async def test_an_independent_client_calls_over_tls(tmp_path: Path, clock: FakeClock) -> None:
    tls = ServerTls(PrivateAuthority(tmp_path / "tls", ["localhost", HOST], clock), clock)
    credentials = grpc.ssl_channel_credentials((tmp_path / "tls/ca.crt").read_bytes())
    async with serving(tls) as port:
        for name in ("localhost", HOST):
            async with grpc.aio.secure_channel(f"{name}:{port}", credentials) as channel:
                check = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
                assert await check(b"", timeout=WAIT_SECONDS) == SERVING_RESPONSE


async def test_a_client_that_offers_only_old_versions_is_turned_away(tmp_path: Path, clock: FakeClock) -> None:
    tls = ServerTls(PrivateAuthority(tmp_path / "tls", [HOST, "localhost"], clock), clock)
    context = ssl.create_default_context(cafile=str(tmp_path / "tls/ca.crt"))
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")

    def connect(port: int) -> None:
        with (
            socket.create_connection((HOST, port), WAIT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=HOST),
        ):
            raise AssertionError("connected")

    async with serving(tls) as port:
        # In a thread: asyncio itself leaves the socket of a failed handshake open.
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await asyncio.to_thread(connect, port)
        assert await shown_certificate(port, tmp_path / "tls/ca.crt")


async def test_a_server_that_has_stopped_has_closed_all_connections(tmp_path: Path, clock: FakeClock) -> None:
    tls = ServerTls(PrivateAuthority(tmp_path / "tls", ["localhost"], clock), clock)
    context = ssl.create_default_context(cafile=str(tmp_path / "tls/ca.crt"))
    context.set_alpn_protocols(["h2"])
    async with serving(tls) as port:
        plain = socket.create_connection((HOST, port), WAIT_SECONDS)
        connection = await asyncio.to_thread(context.wrap_socket, plain, server_hostname="localhost")
        assert await asyncio.to_thread(connection.recv, 1)
    with connection:
        # Read past TLS: its farewell is not the end. The loop stands still meanwhile, so nothing can be closed late.
        while socket.socket.recv(connection, 1 << 16):
            pass


async def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path: Path, clock: FakeClock) -> None:
    tls = ServerTls(PrivateAuthority(tmp_path / "tls", ["localhost"], clock), clock)
    keeping = asyncio.create_task(tls.keep_current())
    async with serving(tls) as port:
        first = await shown_certificate(port, tmp_path / "tls/ca.crt")
        await clock.advance(CHECK_SECONDS)
        assert await shown_certificate(port, tmp_path / "tls/ca.crt") == first
        # Two thirds of its life later. By the client's clock the new one is from the future: it looks at none.
        clock.advance_nowait((CERTIFICATE_DAYS - 100) * DAY_SECONDS)
        await clock.advance(CHECK_SECONDS)
    assert ssl.PEM_cert_to_DER_cert((tmp_path / "tls/server.crt").read_text()) != first
    expires = tls.describe()["expires"]
    assert expires > clock.now().isoformat()
    keeping.cancel()


async def test_files_that_the_operator_replaces_are_shown(
    tmp_path: Path, operator_files: Path, clock: FakeClock
) -> None:
    tls = ServerTls(operators(operator_files), clock)
    keeping = asyncio.create_task(tls.keep_current())
    new = make_files(tmp_path / "new", clock)
    async with serving(tls) as port:
        first = await shown_certificate(port, operator_files / "ca.crt")

        shutil.copy(new / "server.crt", operator_files / "server.crt")
        await clock.advance(CHECK_SECONDS)
        assert await shown_certificate(port, operator_files / "ca.crt") == first, "half replaced: the former one"

        shutil.copy(new / "server.key", operator_files / "server.key")
        await clock.advance(CHECK_SECONDS)
        second = await shown_certificate(port, new / "ca.crt")
        assert second == ssl.PEM_cert_to_DER_cert((new / "server.crt").read_text())
    assert not keeping.done()
    keeping.cancel()


async def test_what_is_shown_can_be_asked_for(operator_files: Path, clock: FakeClock) -> None:
    described = ServerTls(operators(operator_files), clock).describe()
    assert described["names"] == ["localhost", HOST]
    assert "authority" not in described
    own = ServerTls(PrivateAuthority(operator_files, ["localhost", HOST], clock), clock).describe()
    assert own["authority"] == str(operator_files / "ca.crt")


def test_unusable_files_are_refused_and_named(operator_files: Path, tmp_path: Path, clock: FakeClock) -> None:
    other = make_files(tmp_path / "other", clock)
    certificate, key = operator_files / "server.crt", operator_files / "server.key"
    cases = {
        "no such file": OperatorFiles(certificate, tmp_path / "absent.key"),
        "key values mismatch": OperatorFiles(certificate, other / "server.key"),
        "is not a certificate": OperatorFiles(key, certificate),
    }
    for reason, source in cases.items():
        with pytest.raises(TlsError, match=reason):
            ServerTls(source, clock)
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(locked), "-passout", "pass:secret"]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(TlsError, match="has a password"):
        ServerTls(OperatorFiles(certificate, locked), clock)


def test_an_authority_that_cannot_be_kept_is_refused(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TlsError, match="file"):
        ServerTls(PrivateAuthority(tmp_path / "file/tls", ["localhost"], clock), clock)
