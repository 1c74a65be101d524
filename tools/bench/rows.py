"""The rows of the table: what is called, with what, by whom.

A row is prepared for a server (what it asks for is put there, and one call is checked) and gives a function that makes
a number of calls and says how long they took.

Spec: design of the project, section 6, as far as one server's RPCs are concerned.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tools.bench.blobs import action_result, batch_read_request, get_action_result_request, make_blobs
from tools.bench.checked_calls import BATCH_READ, FIND_MISSING, GET_ACTION_RESULT, READ, CheckedCalls
from tools.bench.echo_server import SERVICE
from tools.bench.h2load import run_h2load
from tools.bench.message_file import PREFIX_BYTES, write_framed, write_plain
from tools.bench.processes import run_client
from tools.bench.timing import Timing

from lathe_shared.cas_wire import find_missing_request, read_request
from lathe_shared.digest import Digest
from lathe_shared.resource_name import format_read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tools.bench.blobs import Blob

SMALL_BYTES = 1 << 10
BATCHED_BYTES = 4 << 10
BATCHED_BLOBS = 100
MEDIUM_BYTES = 1 << 20
LARGE_BYTES = 256 << 20
BAZEL_MESSAGE_BYTES = 16 << 10
"""What Bazel puts into one WriteRequest."""

OUTPUTS = 3
MANY_CONNECTIONS = 4
"""Connections that 64 calls in flight come by: several clients, each with several jobs."""

MakeCalls = "Callable[[int], Timing]"


@dataclass(frozen=True)
class Target:
    """A server to be measured.

    Attributes:
        address: ``host:port``.
        instance_name: What requests name.
        folder: Where files for the clients may be put.
        client_cores: Where clients run.
        salt: Makes the blobs of this run different from those of all others.
        large_bytes: Size of a large blob.
    """

    address: str
    instance_name: str
    folder: Path
    client_cores: frozenset[int]
    salt: str
    large_bytes: int = LARGE_BYTES


class Load(NamedTuple):
    """How calls come: connections, and calls in flight on each."""

    connections: int
    streams: int

    @property
    def in_flight(self) -> int:
        """Calls at a time."""
        return self.connections * self.streams


ONE = Load(1, 1)
EIGHT = Load(1, 8)
MANY = Load(MANY_CONNECTIONS, 16)
VERY_MANY = Load(MANY_CONNECTIONS, 64)
"""For small writes, which wait for a commit that many can share."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What is called.
        server: Which server: ``echo`` or ``cas``.
        client: Who calls: ``h2load``, ``grpcio`` or ``lean`` (our own, for uploads).
        load: How.
        unit: What is counted.
        first_calls: Calls of the first run, which warms up and tells how many the measured one takes.
        max_calls: Bound on those of the measured one.
        units_per_call: What one call counts, given the target.
        prepare: Makes a server ready; returns what makes calls.
    """

    name: str
    server: str
    client: str
    load: Load
    unit: str
    first_calls: int
    max_calls: int
    units_per_call: Callable[[Target], float]
    prepare: Callable[[Row, Target], Callable[[int], Timing]]


def all_rows() -> list[Row]:
    """Return all rows in the table's order."""
    return [
        *(_echo("Inline", "h2load", load) for load in (ONE, EIGHT, MANY)),
        *(_echo("Async", "h2load", load) for load in (ONE, MANY)),
        *(_echo("Inline", "grpcio", load) for load in (ONE, Load(1, 64))),
        *(_find_missing(count, "h2load", MANY) for count in (1, 100, 1000)),
        _find_missing(1, "grpcio", Load(1, 64)),
        _get_action_result("h2load", MANY),
        _get_action_result("grpcio", Load(1, 64)),
        _read("1 KiB", lambda _: SMALL_BYTES, MANY, 256, 400_000, "blobs/s"),
        *(_read("1 MiB", lambda _: MEDIUM_BYTES, load, 32, 10_000, "MB/s") for load in (ONE, EIGHT)),
        *(_read("large", lambda target: target.large_bytes, load, load.streams, 48, "MB/s") for load in (ONE, EIGHT)),
        *(_write("1 KiB", lambda _: SMALL_BYTES, load, 256, 60_000, "blobs/s") for load in (MANY, VERY_MANY)),
        *(_write("1 MiB", lambda _: MEDIUM_BYTES, load, 16, 1_500, "MB/s") for load in (ONE, EIGHT)),
        *(_write("large", lambda target: target.large_bytes, load, load.streams, 8, "MB/s") for load in (ONE, EIGHT)),
        _write("large", lambda target: target.large_bytes, ONE, 1, 4, "MB/s", BAZEL_MESSAGE_BYTES),
        _batch_update(EIGHT),
        _batch_read(EIGHT),
    ]


# Unary calls


def _echo(method: str, client: str, load: Load) -> Row:
    def prepare(row: Row, target: Target) -> Callable[[int], Timing]:
        return _repeated(row, target, f"/{SERVICE}/{method}", b"abcd", lambda answer: answer == b"abcd")

    name = f"{method.lower()} unary echo"
    return Row(name, "echo", client, load, "rpc/s", 200, 2_000_000, lambda _: 1, prepare)


def _find_missing(count: int, client: str, load: Load) -> Row:
    def prepare(row: Row, target: Target) -> Callable[[int], Timing]:
        blobs = _stored(target, "find", SMALL_BYTES, count)
        absent = [blob.digest for blob in make_blobs(f"{target.salt}-absent", SMALL_BYTES, 1)]
        digests = [blob.digest for blob in blobs]
        with CheckedCalls(target.address, target.instance_name) as calls:
            calls.expect_missing([*digests, *absent], absent)
        request = find_missing_request(target.instance_name, digests)
        return _repeated(row, target, FIND_MISSING, request, lambda answer: answer == b"")

    unit = "rpc/s" if count == 1 else "digests/s"
    name = f"FindMissingBlobs, {count:,} present"
    return Row(name, "cas", client, load, unit, 256 if count == 1 else 64, 2_000_000, lambda _: count, prepare)


def _get_action_result(client: str, load: Load) -> Row:
    def prepare(row: Row, target: Target) -> Callable[[int], Timing]:
        outputs = _stored(target, "outputs", BATCHED_BYTES, OUTPUTS)
        action = Digest.of(target.salt.encode())
        with CheckedCalls(target.address, target.instance_name) as calls:
            calls.store_action_result(action, action_result(outputs))
        hashes = [output.digest.hash.encode() for output in outputs]
        request = get_action_result_request(target.instance_name, action)
        return _repeated(row, target, GET_ACTION_RESULT, request, lambda answer: all(name in answer for name in hashes))

    name = f"GetActionResult hit, {OUTPUTS} outputs"
    return Row(name, "cas", client, load, "rpc/s", 256, 1_000_000, lambda _: 1, prepare)


def _batch_read(load: Load) -> Row:
    def prepare(row: Row, target: Target) -> Callable[[int], Timing]:
        blobs = _stored(target, "batch", BATCHED_BYTES, BATCHED_BLOBS)
        request = batch_read_request(target.instance_name, blobs)
        return _repeated(row, target, BATCH_READ, request, lambda answer: all(blob.data in answer for blob in blobs))

    name = f"BatchReadBlobs, {BATCHED_BLOBS} of 4 KiB"
    return Row(name, "cas", "h2load", load, "blobs/s", 16, 20_000, lambda _: BATCHED_BLOBS, prepare)


def _repeated(
    row: Row, target: Target, path: str, request: bytes, is_right: Callable[[bytes], bool]
) -> Callable[[int], Timing]:
    """Return what makes the same unary call over and over, once its answer has been found right."""
    with CheckedCalls(target.address, target.instance_name) as calls:
        answer = calls.expect(path, request, is_right)
    if row.client == "grpcio":
        return _by_grpcio(row, target, path, write_plain(target.folder, request))
    return _by_h2load(row, target, path, request, len(answer) + PREFIX_BYTES)


def _by_grpcio(row: Row, target: Target, path: str, message: Path) -> Callable[[int], Timing]:
    flags = ["--address", target.address, "--path", path, "--message", str(message), f"--streams={row.load.in_flight}"]
    return lambda calls: _by_module("grpcio_client", [*flags, f"--calls={calls}"], target)


def _by_h2load(row: Row, target: Target, path: str, request: bytes, response_bytes: int) -> Callable[[int], Timing]:
    body = write_framed(target.folder, request)
    connections, streams = row.load
    return lambda calls: run_h2load(
        target.address,
        path,
        body,
        calls=calls,
        connections=connections,
        streams=streams,
        response_bytes=response_bytes,
        cores=target.client_cores,
    )


def _by_module(module: str, flags: Sequence[str], target: Target) -> Timing:
    output = run_client([sys.executable, "-m", f"tools.bench.{module}", *flags], target.client_cores)
    return Timing.from_json(output)


def _stored(target: Target, purpose: str, size_bytes: int, count: int) -> list[Blob]:
    """Make blobs and have the server hold them."""
    blobs = list(make_blobs(f"{target.salt}-{purpose}", size_bytes, count))
    with CheckedCalls(target.address, target.instance_name) as calls:
        calls.store(blobs)
    return blobs


# Streams


def _read(
    size: str, size_bytes: Callable[[Target], int], load: Load, first_calls: int, max_calls: int, unit: str
) -> Row:
    def prepare(row: Row, target: Target) -> Callable[[int], Timing]:
        (blob,) = _stored(target, "read", size_bytes(target), 1)
        with CheckedCalls(target.address, target.instance_name) as calls:
            calls.expect_read(blob)
        request = read_request(format_read(blob.digest, target.instance_name))
        return _by_h2load(row, target, READ, request, len(blob.data))

    return Row(
        f"ByteStream.Read, {size}",
        "cas",
        "h2load",
        load,
        unit,
        first_calls,
        max_calls,
        _units(unit, size_bytes),
        prepare,
    )


def _write(
    size: str,
    size_bytes: Callable[[Target], int],
    load: Load,
    first_calls: int,
    max_calls: int,
    unit: str,
    message_bytes: int = 1 << 20,
) -> Row:
    def prepare(row: Row, target: Target) -> Callable[[int], Timing]:
        (blob,) = make_blobs(f"{target.salt}-checked-write", size_bytes(target), 1)
        with CheckedCalls(target.address, target.instance_name) as calls:
            calls.write(blob, "bench-check", message_bytes)
        return _by_lean_client(row, target, [f"--blob-bytes={size_bytes(target)}", f"--message-bytes={message_bytes}"])

    name = f"ByteStream.Write, {size}"
    if message_bytes == BAZEL_MESSAGE_BYTES:
        name += " in 16 KiB messages"
    return Row(name, "cas", "lean", load, unit, first_calls, max_calls, _units(unit, size_bytes), prepare)


def _batch_update(load: Load) -> Row:
    def prepare(row: Row, target: Target) -> Callable[[int], Timing]:
        _stored(target, "checked-batch", BATCHED_BYTES, BATCHED_BLOBS)
        return _by_lean_client(row, target, [f"--blob-bytes={BATCHED_BYTES}", f"--batch={BATCHED_BLOBS}"])

    name = f"BatchUpdateBlobs, {BATCHED_BLOBS} of 4 KiB"
    return Row(name, "cas", "lean", load, "blobs/s", 16, 1_000, lambda _: BATCHED_BLOBS, prepare)


def _by_lean_client(row: Row, target: Target, flags: Sequence[str]) -> Callable[[int], Timing]:
    connections, streams = row.load
    common = [f"--address={target.address}", f"--instance-name={target.instance_name}", *flags]
    runs = itertools.count()

    def make_calls(calls: int) -> Timing:
        # Each run's blobs are new to the server.
        salt = f"--salt={target.salt}-{row.name}-{row.load.in_flight}-{next(runs)}".replace(" ", "_").replace("/", "_")
        load = [f"--calls={calls}", f"--connections={connections}", f"--streams={streams}"]
        return _by_module("lean_client", [*common, salt, *load], target)

    return make_calls


def _units(unit: str, size_bytes: Callable[[Target], int]) -> Callable[[Target], float]:
    return (lambda target: size_bytes(target) / 1e6) if unit == "MB/s" else (lambda _: 1)
