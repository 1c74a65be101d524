"""A whole scheduler on loopback ports, with a fake clock, a CAS in memory, and workers that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from lathe_protos import longrunning, reapi, worker_v1
from lathe_scheduler.app import build_with
from lathe_scheduler.config import SchedulerSettings
from lathe_scheduler.queue_runner import QueueRunner
from lathe_shared.clients.rpc_client import BidirectionalCall, RetryPolicy, RpcClient
from lathe_shared.digest import Digest
from lathe_shared.endpoint import Endpoint
from lathe_shared.errors import LatheError
from lathe_shared.grpc_transport import GrpcChannel
from lathe_shared.lifecycle import ServiceRuntime
from lathe_shared.testing.builders import BlobSet
from lathe_shared.testing.fake_cas import FakeCas
from lathe_shared.testing.fake_clock import FakeClock
from lathe_shared.testing.serving import LOOPBACK, connect, serve

WAIT_SECONDS = 10.0
"""Bound on everything that a test waits for; nothing takes a tenth of it."""

_EXECUTION = "/build.bazel.remote.execution.v2.Execution/"
_OPERATIONS = "/google.longrunning.Operations/"
_ONCE = RetryPolicy(attempts=1)


class ScriptedWorker:
    """A worker that speaks the worker API and does what a test says."""

    def __init__(self, call: BidirectionalCall, worker_id: str) -> None:
        self.call = call
        self.worker_id = worker_id

    async def send(self, **message: object) -> None:
        await self.call.send(bytes(worker_v1.WorkerMessage(**message)))  # type: ignore[arg-type]  # one of its messages

    async def receive(self) -> worker_v1.SchedulerMessage | None:
        async with asyncio.timeout(WAIT_SECONDS):
            data = await self.call.receive()
        return None if data is None else worker_v1.SchedulerMessage().parse(data)

    async def next_start(self) -> worker_v1.StartAction:
        message = await self.receive()
        assert message is not None
        assert message.start_action.lease_id, message
        return message.start_action

    async def next_cancel(self) -> worker_v1.CancelAction:
        message = await self.receive()
        assert message is not None
        assert message.cancel_action.lease_id, message
        return message.cancel_action

    async def begin(self, start: worker_v1.StartAction) -> None:
        await self.send(action_started=worker_v1.ActionStarted(lease_id=start.lease_id))

    async def finish(self, start: worker_v1.StartAction, response: bytes | None = None, *, fault: bool = False) -> None:
        if response is None:
            response = bytes(reapi.ExecuteResponse(result=reapi.ActionResult(exit_code=0, stdout_raw=b"done")))
        await self.send(
            action_finished=worker_v1.ActionFinished(
                lease_id=start.lease_id, execute_response=response, worker_fault=fault
            )
        )


class ExecuteCall:
    """An Execute or WaitExecution stream, read as it comes and looked at step by step."""

    def __init__(self, channel: GrpcChannel, method: str, request: bytes) -> None:
        self._messages: asyncio.Queue[bytes | LatheError | None] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read(channel, method, request))

    async def _read(self, channel: GrpcChannel, method: str, request: bytes) -> None:
        try:
            async with aclosing(RpcClient(channel, retry=_ONCE).server_stream(method, request)) as stream:
                async for message in stream:
                    self._messages.put_nowait(message)
        except LatheError as error:
            self._messages.put_nowait(error)
        else:
            self._messages.put_nowait(None)

    @property
    def has_message(self) -> bool:
        return not self._messages.empty()

    async def next(self) -> longrunning.Operation:
        """Return the next message."""
        async with asyncio.timeout(WAIT_SECONDS):
            message = await self._messages.get()
        if isinstance(message, LatheError):
            raise message
        assert message is not None, "the stream has ended"
        return longrunning.Operation().parse(message)

    async def until_stage(self, stage: str) -> longrunning.Operation:
        while True:
            operation = await self.next()
            if stage_of(operation) == stage:
                return operation

    async def until_done(self) -> longrunning.Operation:
        """Return the last message, and see that it is."""
        while not (operation := await self.next()).done:
            pass
        async with asyncio.timeout(WAIT_SECONDS):
            assert await self._messages.get() is None
        return operation

    async def error(self) -> LatheError:
        with pytest.raises(LatheError) as caught:
            await self.until_done()
        return caught.value

    async def cancel(self) -> None:
        """Reset the stream, as a client does that does not want the answer any more."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


@dataclass
class Cluster:
    """A scheduler with all that a test needs around it."""

    clock: FakeClock
    cas: FakeCas
    blobs: BlobSet
    runtime: ServiceRuntime
    runner: QueueRunner
    stack: AsyncExitStack
    rpc: RpcClient = field(init=False)
    channel: GrpcChannel = field(init=False)

    async def open(self) -> None:
        self.channel = await self.new_channel()
        self.rpc = RpcClient(self.channel, retry=_ONCE)

    async def new_channel(self, port: str = "client") -> GrpcChannel:
        return await self.stack.enter_async_context(connect(Endpoint(LOOPBACK, self.runtime.ports[port])))

    def action(self, *arguments: str, store: bool = True, **wishes: object) -> Digest:
        digest = self.blobs.action(arguments or ("true",), **wishes)  # type: ignore[arg-type]  # passed through
        if store:
            self.cas.blobs.update(self.blobs.blobs)
        return digest

    def execute(
        self, digest: Digest, *, instance_name: str = "main", channel: GrpcChannel | None = None, **fields: object
    ) -> ExecuteCall:
        request = reapi.ExecuteRequest(
            instance_name=instance_name,
            action_digest=digest.to_message(),
            **fields,  # type: ignore[arg-type]  # passed through
        )
        return ExecuteCall(channel or self.channel, _EXECUTION + "Execute", bytes(request))

    def wait_execution(self, name: str, channel: GrpcChannel | None = None) -> ExecuteCall:
        request = bytes(reapi.WaitExecutionRequest(name=name))
        return ExecuteCall(channel or self.channel, _EXECUTION + "WaitExecution", request)

    async def operations(self, method: str, request: object) -> bytes:
        return await self.rpc.unary(_OPERATIONS + method, bytes(request))  # type: ignore[call-overload]  # a message

    async def get_operation(self, name: str) -> longrunning.Operation:
        data = await self.operations("GetOperation", longrunning.GetOperationRequest(name=name))
        return longrunning.Operation().parse(data)

    async def worker(
        self,
        worker_id: str = "w",
        *,
        slots: int = 4,
        held: list[worker_v1.HeldAction] | None = None,
        channel: GrpcChannel | None = None,
        **properties: str,
    ) -> ScriptedWorker:
        """Connect a worker and wait until it is registered."""
        call = await self.worker_call(channel)
        worker = ScriptedWorker(call, worker_id)
        await worker.send(
            register=worker_v1.Register(
                worker_id=worker_id,
                protocol_version=1,
                slots=slots,
                held=held or [],
                properties=[worker_v1.Property(name=name, value=value) for name, value in properties.items()],
            )
        )
        message = await worker.receive()
        assert message is not None
        assert message.registered.lost_after.total_seconds() == 15
        return worker

    async def worker_call(self, channel: GrpcChannel | None = None) -> BidirectionalCall:
        rpc = RpcClient(channel or await self.new_channel("worker_api"), retry=_ONCE)
        return await self.stack.enter_async_context(_quietly(rpc))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that real sockets bring about."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():  # noqa: ASYNC110 -- sockets tell no event
                await asyncio.sleep(0.001)


@asynccontextmanager
async def _quietly(rpc: RpcClient) -> AsyncIterator[BidirectionalCall]:
    """Open a worker's stream whose end may be an error; the errors of the test itself pass through."""
    stream = rpc.bidirectional("/lathe.worker.v1.WorkerApi/Connect")
    call = await stream.__aenter__()
    try:
        yield call
    finally:
        with suppress(LatheError):
            await stream.__aexit__(None, None, None)


def stage_of(operation: longrunning.Operation) -> str:
    assert operation.metadata.type_url.endswith("/build.bazel.remote.execution.v2.ExecuteOperationMetadata")
    metadata = reapi.ExecuteOperationMetadata().parse(operation.metadata.value)
    return str(reapi.ExecutionStageValue(metadata.stage).name)


def response_of(operation: longrunning.Operation) -> reapi.ExecuteResponse:
    assert operation.done
    assert operation.response.type_url == "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse"
    return reapi.ExecuteResponse().parse(operation.response.value)


@asynccontextmanager
async def running_cluster(**settings: object) -> AsyncIterator[Cluster]:
    """Run a scheduler with a CAS behind it."""
    async with AsyncExitStack() as stack:
        cas = FakeCas()
        endpoint = await stack.enter_async_context(serve(cas.servicers()))
        values: dict[str, object] = {
            "host": LOOPBACK,
            "port": 0,
            "worker_api_port": 0,
            "http_port": 0,
            "cas_endpoint": str(endpoint),
            "drain_seconds": 0.0,
            "platform_properties": {"cpu_count": "minimum", "OSFamily": "exact"},
        }
        clock = FakeClock()
        runtime = ServiceRuntime(SchedulerSettings(**(values | settings)), CollectorRegistry())  # type: ignore[arg-type]  # checked by pydantic
        runner = await build_with(runtime, clock)
        await runtime.start()
        stack.push_async_callback(runtime.stop)
        cluster = Cluster(clock, cas, BlobSet(), runtime, runner, stack)
        await cluster.open()
        yield cluster


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as running:
        yield running
