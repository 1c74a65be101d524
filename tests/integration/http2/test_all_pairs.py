"""Our server and our channel, each with the other and with grpclib's own, over TCP, unix sockets and TLS."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpclib.client
import pytest
from grpclib.config import Configuration
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from tests.integration.http2.services import (
    BytesCodec,
    Service,
    begin,
    call,
    channel_to,
    grpclib_channel_to,
    served,
    served_by_grpclib,
)

from lathe_shared.http2.channel import Http2Channel

PAIRS = ["ours to ours", "grpclib to ours", "ours to grpclib"]


@asynccontextmanager
async def paired(pair: str, service: Service) -> AsyncIterator[grpclib.client.Channel]:
    if pair == "ours to grpclib":
        async with served_by_grpclib(service) as port, channel_to(port) as channel:
            yield channel
    else:
        connect = channel_to if pair == "ours to ours" else grpclib_channel_to
        async with served(service) as server, connect(server.port) as channel:
            yield channel


@pytest.mark.parametrize("name", ["Echo", "Inline"])
@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
@pytest.mark.parametrize("pair", PAIRS)
async def test_unary_calls(pair: str, size: int, name: str) -> None:
    async with paired(pair, Service()) as channel:
        assert await call(channel, name, b"m" * size) == b"m" * size


@pytest.mark.parametrize("pair", PAIRS)
async def test_streams(pair: str) -> None:
    async with paired(pair, Service()) as channel:
        async with begin(channel, "Count") as stream:
            await stream.send_message(b"200", end=True)
            assert [message async for message in stream] == [str(number).encode() for number in range(200)]
        async with begin(channel, "Join") as stream:
            for _ in range(30):
                await stream.send_message(b"p" * 100_000)
            await stream.end()
            assert await stream.recv_message() == b"p" * 3_000_000
        async with begin(channel, "Chat") as stream:
            for word in (b"one", b"two"):
                await stream.send_message(word)
                assert await stream.recv_message() == word.upper()
            await stream.end()
            assert await stream.recv_message() is None


@pytest.mark.parametrize("pair", PAIRS)
async def test_errors(pair: str) -> None:
    async with paired(pair, Service()) as channel:
        with pytest.raises(GRPCError) as caught:
            await call(channel, "Fail")
        assert (caught.value.status, caught.value.message) == (Status.NOT_FOUND, "nothing of that name")

        received: list[bytes] = []
        with pytest.raises(GRPCError) as caught:
            await collect(begin(channel, "CountThenFail"), received)
        assert caught.value.status is Status.DATA_LOSS
        assert received == [b"0", b"1", b"2"]

        with pytest.raises(GRPCError) as caught:
            await collect(channel.request("/t.S/Missing", Cardinality.UNARY_STREAM, bytes, bytes), received)
        # grpclib's own server says it without the content-type that its own client asks for.
        assert caught.value.status is (Status.UNKNOWN if pair == "ours to grpclib" else Status.UNIMPLEMENTED)


async def collect(stream: Any, received: list[bytes]) -> None:
    async with stream:
        await stream.send_message(b"3", end=True)
        while (message := await stream.recv_message()) is not None:
            received.append(message)


@pytest.mark.parametrize("pair", PAIRS)
async def test_metadata_either_way(pair: str) -> None:
    service = Service()
    seen: list[Any] = []

    async def echo(stream: Any) -> None:
        seen.append(stream.metadata)
        await stream.send_initial_metadata(metadata={"first": "1", "first-bin": b"\0\xff"})
        await stream.send_message(await stream.recv_message())
        await stream.send_trailing_metadata(metadata={"last-bin": b"\1"})

    vars(service)["echo"] = echo
    async with paired(pair, service) as channel:
        async with begin(channel, "Echo", metadata={"text": "t", "data-bin": b"\xff\0"}) as stream:
            await stream.send_message(b"x", end=True)
            assert await stream.recv_message() == b"x"
            await stream.recv_trailing_metadata()

        assert (seen[0]["text"], seen[0]["data-bin"]) == ("t", b"\xff\0")
        assert (stream.initial_metadata["first"], stream.initial_metadata["first-bin"]) == ("1", b"\0\xff")
        assert stream.trailing_metadata["last-bin"] == b"\1"


@pytest.mark.parametrize("pair", PAIRS)
async def test_a_deadline_ends_the_call(pair: str) -> None:
    service = Service()
    async with paired(pair, service) as channel:
        with pytest.raises((TimeoutError, GRPCError)):
            await call(channel, "Hang", timeout=0.1)

        assert await call(channel, "Echo") == b"x"


@pytest.mark.parametrize("pair", PAIRS)
async def test_leaving_a_stream_early_cancels_it(pair: str) -> None:
    service = Service()
    ended = asyncio.Event()

    async def pour(stream: Any) -> None:
        try:
            await Service.pour(service, stream)
        finally:
            ended.set()

    vars(service)["pour"] = pour
    async with paired(pair, service) as channel:
        with pytest.raises(asyncio.CancelledError):
            await leave(begin(channel, "Pour"), b"100000", b"x" * 100_000, asyncio.CancelledError())
        await ended.wait()

        assert await call(channel, "Echo") == b"x"


@pytest.mark.parametrize("pair", PAIRS)
async def test_many_calls_share_a_connection(pair: str) -> None:
    async with paired(pair, Service()) as channel:
        requests = [str(number).encode() * 50 for number in range(300)]

        answers = await asyncio.gather(*[call(channel, "Echo", request) for request in requests])

        assert answers == requests


async def test_an_answer_before_the_end_of_the_requests_ends_the_call() -> None:
    async with served(Service()) as server, channel_to(server.port) as channel:
        with pytest.raises(StreamTerminatedError):
            await leave(begin(channel, "FirstOnly"), b"first", b"first", StreamTerminatedError("enough"))
        assert await call(channel, "Echo") == b"x"


async def leave(stream: Any, request: bytes, response: bytes, reason: BaseException) -> None:
    async with stream:
        await stream.send_message(request)
        assert await stream.recv_message() == response
        raise reason


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with served(Service(), path=path) as server:
        assert server.port == 0
        channel = Http2Channel(path=path, codec=BytesCodec())
        try:
            for name in ("Echo", "Inline"):
                assert await call(channel, name) == b"x"
        finally:
            channel.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate and its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         folder / "key.pem", "-out", folder / "cert.pem", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return both


async def test_tls_with_alpn(certificate: Path) -> None:
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(certificate)
    server_context.set_alpn_protocols(["h2"])
    client_context = ssl.create_default_context(cafile=certificate)
    client_context.set_alpn_protocols(["h2"])
    async with served(Service(), ssl=server_context) as server:
        ours = Http2Channel("localhost", server.port, ssl=client_context, codec=BytesCodec())
        name = Configuration(ssl_target_name_override="localhost")
        theirs = grpclib.client.Channel("127.0.0.1", server.port, ssl=client_context, codec=BytesCodec(), config=name)
        try:
            for channel in (ours, theirs):
                assert await call(channel, "Inline", b"x" * 1_000_000) == b"x" * 1_000_000
                assert await call(channel, "Echo", b"x" * 1_000_000) == b"x" * 1_000_000
        finally:
            ours.close()
            theirs.close()
