"""The health service, asked by grpcio with google-protobuf messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.support.google_messages import message_class

from lathe_shared.endpoint import Endpoint
from lathe_shared.health import HealthServicer, ServingStatus
from lathe_shared.testing.serving import serve

WAIT_SECONDS = 20
REQUEST: Any = message_class("grpc.health.v1.HealthCheckRequest")
RESPONSE: Any = message_class("grpc.health.v1.HealthCheckResponse")
NOT_SERVING, SERVING, SERVICE_UNKNOWN = 2, 1, 3


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(str(endpoint)) as channel:
        yield channel


async def test_check_follows_the_state_and_knows_its_services() -> None:
    health = HealthServicer(["lathe.Some"])
    async with serve([health]) as endpoint, connected(endpoint) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=REQUEST.SerializeToString,
            response_deserializer=RESPONSE.FromString,
        )

        assert (await check(REQUEST())).status == NOT_SERVING
        health.set_all(ServingStatus(ServingStatus.SERVING))
        assert (await check(REQUEST())).status == SERVING
        assert (await check(REQUEST(service="lathe.Some"))).status == SERVING
        health.set("lathe.Some", ServingStatus(ServingStatus.NOT_SERVING))
        assert (await check(REQUEST(service="lathe.Some"))).status == NOT_SERVING
        assert (await check(REQUEST())).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(REQUEST(service="lathe.Other"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_tells_each_change() -> None:
    health = HealthServicer(["lathe.Some"])
    async with (
        asyncio.timeout(WAIT_SECONDS),
        serve([health]) as endpoint,
        connected(endpoint) as channel,
    ):
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=REQUEST.SerializeToString,
            response_deserializer=RESPONSE.FromString,
        )
        some = watch(REQUEST(service="lathe.Some"))
        other = watch(REQUEST(service="lathe.Other"))
        assert (await some.read()).status == NOT_SERVING
        assert (await other.read()).status == SERVICE_UNKNOWN

        health.set_all(ServingStatus(ServingStatus.SERVING))
        assert (await some.read()).status == SERVING
        health.add("lathe.Other")
        assert (await other.read()).status == SERVING
        health.set_all(ServingStatus(ServingStatus.NOT_SERVING))
        assert (await some.read()).status == NOT_SERVING
        some.cancel()
        other.cancel()
