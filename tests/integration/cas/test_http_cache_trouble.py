"""The HTTP cache and clients that break off, lie, stall or ask for the impossible: nothing is stored, others go on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import structlog
from tests.contract.cas.blob_making import content, put
from tests.integration.cas.http_server import DEADLINE_SECONDS, HOST, HttpServer, http_server, until

from lathe_shared.digest import Digest
from lathe_shared.errors import LatheError

CHUNK = 65_520
STAGE = 16 * CHUNK
STALL_SECONDS = 0.05
# More than the kernel's buffers on both sides of a loopback connection take.
LARGE_BYTES = 24 << 20


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[HttpServer]:
    async with http_server(tmp_path) as server:
        yield server


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[HttpServer]:
    async with http_server(tmp_path, stall_seconds=STALL_SECONDS) as server:
        yield server


class Wire:
    """A connection for bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.writer.drain()

    async def rest(self) -> bytes:
        """Read to the end of the connection, whichever way it ends."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            received = b""
            try:
                while data := await self.reader.read(1 << 20):
                    received += data
            except ConnectionError:
                pass
            return received

    async def response(self) -> bytes:
        """Read one response without a body, or with one of a known length."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return head + await self.reader.readexactly(length)


@asynccontextmanager
async def wire(server: HttpServer) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(HOST, server.port, limit=1 << 16)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def put_head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"PUT {path} HTTP/1.1", f"Host: {HOST}", *headers, "", ""]).encode()


async def nothing_is_left(server: HttpServer) -> None:
    """Wait until the store is as empty as it was, and see that it still takes what is right."""
    await until(lambda: not server.store.blobs.active_uploads)
    await server.store.settle()
    assert server.is_clean()
    assert (await server.put("/cache/after", b"all is well")).status == 200


PATHS = ["/cache/key", f"/cas/{Digest.of(content(5 * STAGE)).hash}"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sent_bytes", [0, 100, 3 * STAGE])
async def test_a_body_that_ends_too_early_leaves_nothing(server: HttpServer, path: str, sent_bytes: int) -> None:
    async with wire(server) as client:
        await client.send(put_head(path, f"Content-Length: {5 * STAGE}") + content(5 * STAGE)[:sent_bytes])
        await until(lambda: bool(server.store.blobs.active_uploads))
    await nothing_is_left(server)
    kind = path.split("/")[1]
    assert (await server.requests())[kind, "PUT", "broken_off"] == 1


@pytest.mark.parametrize("path", [*PATHS, f"/ac/{64 * '0'}"])
async def test_chunks_without_an_end_leave_nothing(server: HttpServer, path: str) -> None:
    async with wire(server) as client:
        await client.send(put_head(path, "Transfer-Encoding: chunked") + b"5\r\nfirst\r\n")
        client.writer.write_eof()
        await client.rest()
    await nothing_is_left(server)


@pytest.mark.parametrize("path", [*PATHS, f"/ac/{64 * '0'}"])
@pytest.mark.parametrize("bad", [b"zz\r\nbad\r\n", b"5\r\ntoo long\r\n0\r\n\r\n", b"-1\r\n\r\n"])
async def test_malformed_chunks_are_refused(server: HttpServer, path: str, bad: bytes) -> None:
    async with wire(server) as client:
        await client.send(put_head(path, "Transfer-Encoding: chunked") + b"5\r\nfirst\r\n" + bad)
        # From the parser if all came together, else from the handler.
        assert (await client.response())[:13] in (b"HTTP/1.0 400 ", b"HTTP/1.1 400 ")
    await nothing_is_left(server)


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: -1",),
        ("Content-Length: many",),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Content-Length: 99999999999999999999999999",),
    ],
)
async def test_lengths_that_make_no_sense_are_refused(server: HttpServer, headers: tuple[str, ...]) -> None:
    async with wire(server) as client:
        await client.send(put_head("/cache/key", *headers) + b"5\r\nfirst\r\n0\r\n\r\n")
        assert (await client.response()).split(b" ")[1] in (b"400", b"413")
    await nothing_is_left(server)


@pytest.mark.parametrize("path", [*PATHS, f"/ac/{64 * '0'}"])
async def test_a_length_over_the_limit_is_refused_before_the_body_comes(server: HttpServer, path: str) -> None:
    async with wire(server) as client:
        await client.send(put_head(path, f"Content-Length: {1 << 40}"))
        assert (await client.response()).startswith(b"HTTP/1.1 413 ")
    await nothing_is_left(server)


async def test_a_length_that_is_too_short_cuts_the_body(server: HttpServer) -> None:
    digest = Digest.of(b"the whole body")
    async with wire(server) as client:
        await client.send(put_head(f"/cas/{digest.hash}", "Content-Length: 9") + b"the whole")
        answer = await client.response()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert f"they are {Digest.of(b'the whole')}".encode() in answer
        await client.send(b" body\r\n\r\n")
        assert b" 400 Bad Request" in await client.rest()
    await nothing_is_left(server)


async def test_a_body_that_comes_byte_by_byte_is_taken(server: HttpServer) -> None:
    data = content(3_000)
    async with wire(server) as client:
        await client.send(put_head("/cache/key", "Transfer-Encoding: chunked"))
        for byte in data:
            await client.send(b"1\r\n%c\r\n" % byte)
        await client.send(b"0\r\n\r\n")
        assert (await client.response()).startswith(b"HTTP/1.1 200 ")
    assert (await server.get("/cache/key")).body == data


async def test_a_connection_serves_one_request_after_the_other(server: HttpServer) -> None:
    (digest,) = await put(server.blobs, b"data")
    get = f"GET /cas/{digest.hash} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    async with wire(server) as client:
        await client.send(put_head("/cache/key", "Content-Length: 5") + b"value" + get)
        assert (await client.response()).startswith(b"HTTP/1.1 200 ")
        assert (await client.response()).endswith(b"\r\n\r\ndata")
        # A refusal that leaves no part of its body unread does not end the connection either.
        await client.send(put_head(f"/cas/{digest.hash}", "Content-Length: 5") + b"wrong" + get)
        assert (await client.response()).startswith(b"HTTP/1.1 400 ")
        assert (await client.response()).endswith(b"\r\n\r\ndata")


@pytest.mark.parametrize("path", [*PATHS, f"/ac/{64 * '0'}"])
@pytest.mark.parametrize("sent_bytes", [0, 3 * STAGE])
async def test_a_client_that_stops_sending_is_not_waited_for(impatient: HttpServer, path: str, sent_bytes: int) -> None:
    async with wire(impatient) as client:
        await client.send(put_head(path, f"Content-Length: {5 * STAGE}") + content(5 * STAGE)[:sent_bytes])
        answer = await client.response()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"nothing of it was stored" in answer
        assert b"connection: close" in answer.lower()
    await nothing_is_left(impatient)


async def test_a_client_that_stops_reading_is_not_waited_for(impatient: HttpServer) -> None:
    (digest,) = await put(impatient.blobs, content(LARGE_BYTES))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (HOST, impatient.port))
        await loop.sock_sendall(client, f"GET /cas/{digest.hash} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        await until(lambda: impatient.cache.running_requests == 1)
        await until(lambda: impatient.cache.running_requests == 0)
    assert (await impatient.requests())["cas", "GET", "broken_off"] == 1


async def test_a_blob_that_vanishes_in_the_middle_is_not_taken_for_whole(server: HttpServer) -> None:
    data = content(LARGE_BYTES)
    (digest,) = await put(server.blobs, data)
    async with wire(server) as client:
        await client.send(f"GET /cas/{digest.hash} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        async with asyncio.timeout(DEADLINE_SECONDS):
            head = await client.reader.readuntil(b"\r\n\r\n")
        assert f"Content-Length: {LARGE_BYTES}".encode() in head
        await server.blobs.remove([digest])
        received = await client.rest()
    # Nothing else stands in for what is not there.
    assert len(received) < LARGE_BYTES
    assert data.startswith(received)
    assert (await server.requests())["cas", "GET", "broken_off"] == 1


async def test_a_blob_that_is_damaged_is_not_there(server: HttpServer) -> None:
    data = content(3 * STAGE)
    (digest,) = await put(server.blobs, data)
    environment = server.store.storage.environment
    with environment.env.begin(write=True) as txn, txn.cursor(environment.chunks) as cursor:
        cursor.first()
        txn.put(cursor.key(), b"damaged", db=environment.chunks)
    assert (await server.get(f"/cas/{digest.hash}")).status == 404
    await until(lambda: server.missing(digest) == [digest])
    assert (await server.put(f"/cas/{digest.hash}", data)).status == 200
    assert (await server.get(f"/cas/{digest.hash}")).body == data


class Paused:
    """A body that stops in the middle until it is told to go on."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.go_on = asyncio.Event()

    async def body(self) -> AsyncIterator[bytes]:
        yield self.pieces[0]
        await self.go_on.wait()
        for piece in self.pieces[1:]:
            yield piece


async def test_others_are_served_while_a_transfer_runs(server: HttpServer) -> None:
    data = content(4 * STAGE)
    paused = Paused(data[: 3 * STAGE], data[3 * STAGE :])
    transfer = asyncio.create_task(server.put("/cache/large", paused.body()))
    await until(lambda: server.blobs.status().staged_bytes > 0)
    assert (await server.get("/healthz")).status == 200
    assert b"lathe_cas" in (await server.get("/metrics")).body
    assert (await server.get("/cache/large")).status == 404
    assert (await server.put("/cache/small", b"small")).status == 200
    paused.go_on.set()
    assert (await transfer).status == 200
    assert (await server.get("/cache/large")).body == data


async def test_two_clients_that_put_the_same_both_succeed(server: HttpServer) -> None:
    data = content(3 * STAGE)
    path = f"/cas/{Digest.of(data).hash}"
    paused = Paused(data[: 2 * STAGE], data[2 * STAGE :])
    slow = asyncio.create_task(server.put(path, paused.body()))
    await until(lambda: server.blobs.status().staged_bytes > 0)
    assert (await server.put(path, data)).status == 200
    paused.go_on.set()
    assert (await slow).status == 200
    assert (await server.get(path)).body == data
    assert server.blobs.status().staged_bytes == 0


async def test_a_stop_lets_transfers_finish_and_takes_no_more(server: HttpServer) -> None:
    paused = Paused(b"first, ", b"last")
    transfer = asyncio.create_task(server.put("/cache/key", paused.body()))
    await until(lambda: server.cache.running_requests == 1)
    drain = asyncio.create_task(server.cache.drain())
    await asyncio.sleep(0)
    refused = await server.get("/cache/key")
    assert (refused.status, refused.headers["Connection"]) == (503, "close")
    assert not drain.done()
    paused.go_on.set()
    assert (await transfer).status == 200
    await drain
    assert server.store.results.get("/cache", Digest.of(b"key")) is not None


async def test_a_transfer_that_a_stop_ends_leaves_nothing(tmp_path: Path) -> None:
    async with http_server(tmp_path) as server:
        async with wire(server) as client:
            await client.send(put_head("/cache/key", f"Content-Length: {5 * STAGE}") + content(3 * STAGE))
            await until(lambda: server.blobs.status().staged_bytes > 0)
            # Closes the port around the running request, and with it the store.
            await server.close()
        store = server.store
    await store.open()
    try:
        assert (store.blobs.status().blobs, store.blobs.status().staged_bytes) == (0, 0)
    finally:
        await store.close()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), LatheError("of no kind that clients know")])
async def test_a_bug_ends_its_request_with_an_error_id(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def find_sizes(_keys: object) -> list[int | None]:
        raise error

    monkeypatch.setattr(server.store.blobs, "find_sizes", find_sizes)
    with structlog.testing.capture_logs() as logs:
        answer = await server.get(f"/cas/{64 * 'a'}")
    (entry,) = (entry for entry in logs if entry["event"] == "internal_error")
    assert (answer.status, entry["exc_info"]) == (500, error)
    assert entry["error_id"] in answer.text
    assert str(error) not in answer.text
    monkeypatch.undo()
    await nothing_is_left(server)
