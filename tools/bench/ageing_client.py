"""A client that fills a store and goes on for many times its size, with blobs of the sizes that builds have.

Run as a process of its own: ``python -m tools.bench.ageing_client FLAGS``; it writes when it began
and when each round ended, a round being as many bytes as the store may keep.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import random
import time
from typing import TYPE_CHECKING

import grpc.aio
from tools.bench.blobs import Blob, batch_update_request, write_messages
from tools.bench.errors import BenchError
from tools.bench.lean_client import BATCH_UPDATE, WRITE

from lathe_protos import reapi
from lathe_shared.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator

MEDIAN_BYTES = 4 << 10
NINTH_DECILE_BYTES = 100 << 10
LARGEST_BYTES = 50 << 20
"""Half of the blobs are smaller than the first, nine in ten than the second, none is larger than the third."""

_SIGMA = math.log(NINTH_DECILE_BYTES / MEDIAN_BYTES) / 1.2815515655446004
"""Of the logarithm of the size; the divisor is the ninth decile of the normal distribution."""

_SMALLEST_BYTES = 17
SEED = "ageing"
BATCH_BYTES = 1 << 20
MESSAGE_BYTES = 1 << 20
IN_FLIGHT = 4
CALL_SECONDS = 300.0
NICE = 10


def round_of_sizes(round_bytes: int, largest_bytes: int) -> list[int]:
    """Return sizes that are ``round_bytes`` together, or a little more: log-normal, cut off at both ends."""
    chance = random.Random(SEED)
    sizes: list[int] = []
    total_bytes = 0
    while total_bytes < round_bytes:
        size_bytes = int(chance.lognormvariate(math.log(MEDIAN_BYTES), _SIGMA))
        sizes.append(max(_SMALLEST_BYTES, min(largest_bytes, size_bytes)))
        total_bytes += sizes[-1]
    return sizes


def make_sizes(round_bytes: int, largest_bytes: int) -> Iterator[int]:
    """Yield sizes without end, round by round.

    Each round has the same ones, or the few largest would make rounds differ; and each in another order, or what is
    written would always fit the place of what has just gone.
    """
    chance = random.Random(SEED)
    sizes = round_of_sizes(round_bytes, largest_bytes)
    while True:
        chance.shuffle(sizes)
        yield from sizes


def make_aged_blobs(salt: str, round_bytes: int, largest_bytes: int) -> Iterator[Blob]:
    """Yield blobs without end, each different from all others."""
    noise = random.Random(salt).randbytes(largest_bytes)
    for number, size_bytes in enumerate(make_sizes(round_bytes, largest_bytes)):
        name = hashlib.blake2b(f"{salt}/{number}".encode(), digest_size=16).digest()
        data = name + noise[: size_bytes - len(name)]
        yield Blob(data, Digest.of(data))


class AgeingClient:
    """Uploads blobs, a few calls at a time.

    Args:
        channel: To the server.
        instance_name: Where to.
        salt: Other salts give other blobs.
        limit_bytes: What the store may keep, and what is written in a round.
        largest_bytes: Of a blob.
    """

    def __init__(
        self, channel: grpc.aio.Channel, instance_name: str, salt: str, limit_bytes: int, largest_bytes: int
    ) -> None:
        self._channel = channel
        self._instance_name = instance_name
        self._salt = salt
        self._blobs = make_aged_blobs(salt, limit_bytes, largest_bytes)
        self._limit_bytes = limit_bytes
        self._written_bytes = 0

    async def run(self, rounds: int) -> list[float]:
        """Write ``rounds`` times the limit; return when that began and when each round ended.

        By ``time.monotonic``, which is the same in all processes of a machine.
        """
        began = time.monotonic()
        ends: list[float] = []

        async def upload() -> None:
            while len(ends) < rounds:
                await self._upload_some()
                while self._written_bytes >= self._limit_bytes * (len(ends) + 1) and len(ends) < rounds:
                    ends.append(time.monotonic())

        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(upload())
        return [began, *ends]

    async def _upload_some(self) -> None:
        batch: list[Blob] = []
        batch_bytes = 0
        for blob in self._blobs:
            if len(blob.data) > BATCH_BYTES:
                await self._write(blob)
                break
            batch.append(blob)
            batch_bytes += len(blob.data)
            if batch_bytes > BATCH_BYTES:
                break
        if batch:
            await self._update(batch)

    async def _write(self, blob: Blob) -> None:
        requests = write_messages(self._instance_name, f"{self._salt}-{blob.digest.hash}", blob, MESSAGE_BYTES)
        await self._channel.stream_unary(WRITE, None, None)(requests, timeout=CALL_SECONDS)
        self._written_bytes += len(blob.data)

    async def _update(self, batch: list[Blob]) -> None:
        request = batch_update_request(self._instance_name, batch)
        answer: bytes = await self._channel.unary_unary(BATCH_UPDATE, None, None)(request, timeout=CALL_SECONDS)
        check_all_stored(answer, len(batch))
        self._written_bytes += sum(len(blob.data) for blob in batch)


def check_all_stored(answer: bytes, count: int) -> None:
    """Look through a BatchUpdateBlobsResponse: every blob must have been stored.

    Raises:
        BenchError: One was not.
    """
    responses = reapi.BatchUpdateBlobsResponse().parse(answer).responses
    failed = [response.status.message for response in responses if response.status.code]
    if failed or len(responses) != count:
        raise BenchError(f"{len(failed)} of {count} blobs were not stored: {failed[:1]}")


async def _main(arguments: argparse.Namespace) -> list[float]:
    async with grpc.aio.insecure_channel(arguments.address) as channel:
        client = AgeingClient(
            channel, arguments.instance_name, arguments.salt, arguments.limit_bytes, arguments.largest_bytes
        )
        return await client.run(arguments.rounds)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True, help="host:port of the server")
    parser.add_argument("--instance-name", default="")
    parser.add_argument("--salt", required=True, help="what makes the blobs different from all others")
    parser.add_argument("--limit-bytes", type=int, required=True, help="what the store may keep")
    parser.add_argument("--largest-bytes", type=int, default=LARGEST_BYTES)
    parser.add_argument("--rounds", type=int, required=True, help="how often to write so much")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Who measures latencies shares the clients' cores, and should not measure how long it waits for one of them.
    os.nice(NICE)
    print(json.dumps(asyncio.run(_main(parse_arguments()))))
