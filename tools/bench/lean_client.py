"""A client for uploads: our own HTTP/2 connection, with neither a task nor a call object for each call.

h2load can only send the same bytes again, and a store is to get blobs that it has not. This client makes all blobs
before it starts its clock. What it takes of a run is in docs/benchmarks.md.

Run as a process of its own: ``python -m tools.bench.lean_client FLAGS``; it writes a Timing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from typing import TYPE_CHECKING

import uvloop
from tools.bench.blobs import batch_update_request, make_blobs, write_messages
from tools.bench.errors import BenchError
from tools.bench.timing import Timing
from typing_extensions import override

from lathe_shared.http2.channel import ClientProtocol
from lathe_shared.http2.hpack import literal_block
from lathe_shared.http2.limits import CLIENT_LIMITS
from lathe_shared.http2.message_framing import PREFIX_BYTES, pack_prefix
from lathe_shared.http2.protocol import FLUSH_BYTES
from lathe_shared.http2.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lathe_shared.http2.header_rules import CheckedHeaders
    from lathe_shared.http2.stream import Bytes

WRITE = "/google.bytestream.ByteStream/Write"
BATCH_UPDATE = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs"


class Calls:
    """Makes all calls of a run, a number of them at a time.

    Args:
        path: Their method.
        authority: ``host:port`` of the server.
        requests: The messages of each call.
    """

    def __init__(self, path: str, authority: str, requests: Iterable[Iterator[bytes]]) -> None:
        self.block = literal_block(
            [
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path.encode()),
                (b":authority", authority.encode()),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
            ]
        )
        self.done = asyncio.get_running_loop().create_future()
        self._requests = iter(requests)
        self._running = 0
        self._answered = 0

    def begin(self, protocol: ClientProtocol) -> None:
        """Begin one more call on a connection, if there is one left."""
        messages = next(self._requests, None)
        if messages is not None:
            self._running += 1
            _Call(self, protocol, messages).begin()
        elif not self._running and not self.done.done():
            self.done.set_result(self._answered)

    def answered(self, protocol: ClientProtocol) -> None:
        """Count a call that is over, and begin another one in its place."""
        self._running -= 1
        self._answered += 1
        self.begin(protocol)

    def failed(self, reason: str) -> None:
        """Give up."""
        if not self.done.done():
            self.done.set_exception(BenchError(reason))


class _Call(Stream):
    """One call; it sends as fast as the server's windows let it."""

    __slots__ = ("_calls", "_messages", "_protocol", "_status")

    def __init__(self, calls: Calls, protocol: ClientProtocol, messages: Iterator[bytes]) -> None:
        super().__init__(protocol.http2)
        self._calls = calls
        self._protocol = protocol
        self._messages = messages
        self._status = "none"

    def begin(self) -> None:
        self.http2.open(self, self._calls.block, end=False)
        self.on_drained()

    @override
    def on_drained(self) -> None:
        message = next(self._messages, None)
        while message is not None and not self.is_local_closed:
            following = next(self._messages, None)
            size = len(message)
            pieces: tuple[Bytes, ...] = (pack_prefix(0, size), message)
            is_sent = self.http2.send_data(self, pieces, size + PREFIX_BYTES, end=following is None)
            if size >= FLUSH_BYTES:
                self._protocol.flush()
            if not is_sent and following is not None:
                self._messages = _with_first(following, self._messages)
                break
            message = following
        self._protocol.output_ready()

    @override
    def on_data(self, data: Bytes) -> None:
        self.http2.release(self, len(data))

    @override
    def on_headers(self, headers: CheckedHeaders) -> None:
        self.on_trailers(headers)

    @override
    def on_trailers(self, headers: CheckedHeaders) -> None:
        for name, value in headers.fields:
            if name == "grpc-status":
                self._status = value
            elif name == "grpc-message":
                self._calls.failed(value)

    @override
    def on_end(self) -> None:
        if self._status == "0":
            self._calls.answered(self._protocol)
        else:
            self._calls.failed(f"a call ended with grpc-status {self._status}")

    @override
    def on_reset(self, code: int, reason: str, *, by_peer: bool) -> None:
        self._calls.failed(f"a call was reset: {reason}")


def _with_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


async def run_calls(host: str, port: int, calls: Calls, *, connections: int, streams: int) -> Timing:
    """Make the calls and time them.

    Args:
        host: The server's host.
        port: Its port.
        calls: What to call.
        connections: How many connections.
        streams: Calls in flight on each.

    Raises:
        BenchError: One failed.
    """
    loop = asyncio.get_running_loop()
    protocols = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(lambda: ClientProtocol(CLIENT_LIMITS), host, port)
        protocols.append(protocol)
    started = time.perf_counter()
    for protocol in protocols:
        for _ in range(streams):
            calls.begin(protocol)
    answered = await calls.done
    seconds = time.perf_counter() - started
    for protocol in protocols:
        protocol.close()
    return Timing(answered, seconds)


def write_calls(arguments: argparse.Namespace) -> list[Iterator[bytes]]:
    """Return the messages of each upload, made already unless the blobs are large."""
    blobs = make_blobs(arguments.salt, arguments.blob_bytes, arguments.calls)
    uploads = (
        write_messages(arguments.instance_name, f"{arguments.salt}-{number}", blob, arguments.message_bytes)
        for number, blob in enumerate(blobs)
    )
    if arguments.blob_bytes <= arguments.message_bytes:
        return [iter(list(messages)) for messages in uploads]
    return list(uploads)


def batch_calls(arguments: argparse.Namespace) -> list[Iterator[bytes]]:
    """Return the one message of each batch."""
    blobs = make_blobs(arguments.salt, arguments.blob_bytes, arguments.calls * arguments.batch)
    batches = zip(*[blobs] * arguments.batch, strict=True)
    return [iter([batch_update_request(arguments.instance_name, batch)]) for batch in batches]


async def _main(arguments: argparse.Namespace) -> Timing:
    host, _, port = arguments.address.rpartition(":")
    if arguments.batch:
        calls = Calls(BATCH_UPDATE, arguments.address, batch_calls(arguments))
    else:
        calls = Calls(WRITE, arguments.address, write_calls(arguments))
    # Nothing that is made here is ever garbage, and a collection would look through all of it.
    gc.freeze()
    gc.disable()
    return await run_calls(host, int(port), calls, connections=arguments.connections, streams=arguments.streams)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True, help="host:port of the server")
    parser.add_argument("--instance-name", default="")
    parser.add_argument("--salt", required=True, help="what makes the blobs different from all others")
    parser.add_argument("--blob-bytes", type=int, required=True)
    parser.add_argument("--message-bytes", type=int, default=1 << 20, help="bytes of a blob in one WriteRequest")
    parser.add_argument("--batch", type=int, default=0, help="blobs of one BatchUpdateBlobs; 0 for ByteStream.Write")
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--streams", type=int, default=1, help="calls in flight on each connection")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(uvloop.run(_main(parse_arguments())).to_json())
