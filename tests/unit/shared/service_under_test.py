"""A tiny service that test_lifecycle starts as a process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import ClassVar

import structlog
from aiohttp import web
from pydantic import Field
from typing_extensions import override

from lathe_shared.config_loading import Port, ServiceSettings, load_settings
from lathe_shared.lifecycle import ServiceRuntime, StartError, run_service
from lathe_shared.service_boundary import Rpc, RpcContext, Servicer, unary

log = structlog.get_logger()


class Settings(ServiceSettings):
    """Serve next to nothing."""

    service: ClassVar[str] = "cas"

    host: str = "127.0.0.1"
    port: Port = Field(default=0, description="gRPC port")
    fail_in_background: bool = Field(default=False, description="fail soon after the start")
    hang_in_build: bool = Field(default=False, description="never finish the start")
    fail_in_build: bool = Field(default=False, description="fail at the start")


class Slow(Servicer):
    """Answers when told to."""

    service_name = "lathe.test.Slow"

    def __init__(self) -> None:
        self.finish = asyncio.Event()

    @override
    def rpcs(self) -> Mapping[str, Rpc]:
        return {"Wait": unary(self.wait)}

    async def wait(self, _request: bytes, _context: RpcContext) -> bytes:
        log.info("call_begun")
        await self.finish.wait()
        return b"finished"


async def fail_later() -> None:
    await asyncio.sleep(0)
    raise RuntimeError("deliberate")


def main() -> int:
    settings = load_settings(Settings)

    async def build(runtime: ServiceRuntime) -> None:
        runtime.on_close(lambda: log.info("closed_first"))
        if settings.fail_in_build:
            raise StartError("cannot use the data directory")
        if settings.hang_in_build:
            log.info("hanging")
            await asyncio.Event().wait()
        slow = Slow()

        async def finish(_request: web.Request) -> web.Response:
            slow.finish.set()
            return web.Response()

        runtime.on_close(lambda: log.info("closed_second"))
        runtime.add_http_port(dict, routes=[web.get("/finish", finish)])
        runtime.add_grpc_port([slow], settings.port)
        if settings.fail_in_background:
            runtime.add_task("failing", fail_later())

    return run_service(settings, build)


if __name__ == "__main__":
    sys.exit(main())
