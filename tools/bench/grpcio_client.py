"""grpcio as a second client, for calls as another project makes them. Its own speed is the limit nearly always.

Run as a process of its own: ``python -m tools.bench.grpcio_client FLAGS``; it writes a Timing.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from grpc import aio
from tools.bench.timing import Timing


async def run_calls(address: str, path: str, request: bytes, *, calls: int, streams: int) -> Timing:
    """Make unary calls with one request, over one connection.

    Args:
        address: ``host:port`` of the server.
        path: The method.
        request: The message.
        calls: How many.
        streams: Calls in flight.

    Raises:
        grpc.RpcError: One failed.
    """
    async with aio.insecure_channel(address) as channel:
        call = channel.unary_unary(path, request_serializer=None, response_deserializer=None)
        await channel.channel_ready()
        left = iter(range(calls))

        async def caller() -> None:
            for _ in left:
                await call(request)

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(caller())
        return Timing(calls, time.perf_counter() - started)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True, help="host:port of the server")
    parser.add_argument("--path", required=True, help="the method")
    parser.add_argument("--message", type=Path, required=True, help="file with the request")
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--streams", type=int, default=1, help="calls in flight")
    return parser.parse_args(arguments)


def _main() -> Timing:
    flags = parse_arguments()
    run = run_calls(flags.address, flags.path, flags.message.read_bytes(), calls=flags.calls, streams=flags.streams)
    return asyncio.run(run)


if __name__ == "__main__":
    try:
        print(_main().to_json())
    except ExceptionGroup as errors:
        raise SystemExit(f"a call failed: {errors.exceptions[0]}") from None
