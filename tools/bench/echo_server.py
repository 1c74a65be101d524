"""A server that returns what it gets: what is left of a call when it does nothing.

Run as a process of its own: ``python -m tools.bench.echo_server lathe|grpclib``.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import TYPE_CHECKING

import uvloop
from tools.bench.processes import HOST
from typing_extensions import override

from lathe_shared.grpc_transport import Engine
from lathe_shared.log_config import configure_logging
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, make_server, unary

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE = "lathe.bench.Echo"


class EchoServicer(Servicer):
    """Echoes a message: ``Inline`` by a plain function, ``Async`` by a coroutine function."""

    service_name = SERVICE

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"Inline": unary(_inline), "Async": unary(_async)}


def _inline(request: bytes, _context: RpcContext) -> bytes:
    return request


async def _async(request: bytes, _context: RpcContext) -> bytes:
    return request


async def serve(engine: Engine) -> None:
    """Serve until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server = make_server([EchoServicer()], engine=engine)
    await server.start(HOST, 0)
    print(json.dumps({"event": "ready", "grpc_port": server.port}), flush=True)
    await stopped.wait()
    await server.shut_down()


if __name__ == "__main__":
    configure_logging("echo")
    uvloop.run(serve(Engine(sys.argv[1])))
