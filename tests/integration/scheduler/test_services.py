"""Operations, ActionCache, Capabilities, the worker API's rules, and the HTTP port."""

import asyncio
import datetime
import json
import urllib.request

import pytest
from tests.integration.scheduler.conftest import Cluster, ScriptedWorker, response_of, running_cluster, stage_of

from lathe_protos import health, longrunning, reapi, worker_v1
from lathe_shared.clients.rpc_client import RetryPolicy, RpcClient
from lathe_shared.digest import Digest
from lathe_shared.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LatheError,
    NotFoundError,
)
from lathe_shared.testing.serving import LOOPBACK

CANCELLED = 1
_ACTION_CACHE = "/build.bazel.remote.execution.v2.ActionCache/"


async def test_operations_are_listed_in_pages(cluster: Cluster) -> None:
    await cluster.worker(slots=1)
    names = []
    for number in range(5):
        call = cluster.execute(cluster.action(str(number)))
        names.append((await call.until_stage("QUEUED")).name)
    other = await cluster.execute(cluster.action("other"), instance_name="other").until_stage("QUEUED")
    found: list[str] = []
    token = ""
    pages = 0
    while pages == 0 or token:
        request = longrunning.ListOperationsRequest(name="main/operations", page_size=2, page_token=token)
        page = longrunning.ListOperationsResponse().parse(await cluster.operations("ListOperations", request))
        found += [operation.name for operation in page.operations]
        token = page.next_page_token
        pages += 1
    assert found == names
    assert pages == 3
    request = longrunning.ListOperationsRequest(filter="stage=EXECUTING")
    page = longrunning.ListOperationsResponse().parse(await cluster.operations("ListOperations", request))
    assert not page.operations
    request = longrunning.ListOperationsRequest(name="other")
    page = longrunning.ListOperationsResponse().parse(await cluster.operations("ListOperations", request))
    assert [operation.name for operation in page.operations] == [other.name]


@pytest.mark.parametrize(
    "request_",
    [
        longrunning.ListOperationsRequest(page_size=-1),
        longrunning.ListOperationsRequest(page_token="x"),
        longrunning.ListOperationsRequest(filter="color=red"),
    ],
)
async def test_lists_that_cannot_be_are_refused(cluster: Cluster, request_: longrunning.ListOperationsRequest) -> None:
    with pytest.raises(InvalidArgumentError):
        await cluster.operations("ListOperations", request_)


async def test_cancel_operation_ends_the_action_and_tells_the_client(cluster: Cluster) -> None:
    worker = await cluster.worker()
    call = cluster.execute(cluster.action())
    operation = await call.until_stage("QUEUED")
    start = await worker.next_start()
    await cluster.operations("CancelOperation", longrunning.CancelOperationRequest(name=operation.name))
    assert (await worker.next_cancel()).lease_id == start.lease_id
    assert response_of(await call.until_done()).status.code == CANCELLED


async def test_cancelling_one_of_two_leaves_the_other_its_action(cluster: Cluster) -> None:
    worker = await cluster.worker()
    digest = cluster.action()
    first, second = cluster.execute(digest), cluster.execute(digest)
    name = (await first.until_stage("QUEUED")).name
    await second.until_stage("QUEUED")
    await cluster.operations("CancelOperation", longrunning.CancelOperationRequest(name=name))
    assert response_of(await first.until_done()).status.code == CANCELLED
    await worker.finish(await worker.next_start())
    assert response_of(await second.until_done()).status.code == 0


async def test_only_done_operations_are_deleted(cluster: Cluster) -> None:
    worker = await cluster.worker()
    call = cluster.execute(cluster.action())
    name = (await call.until_stage("QUEUED")).name
    request = longrunning.DeleteOperationRequest(name=name)
    with pytest.raises(FailedPreconditionError):
        await cluster.operations("DeleteOperation", request)
    await worker.finish(await worker.next_start())
    await call.until_done()
    await cluster.operations("DeleteOperation", request)
    with pytest.raises(NotFoundError):
        await cluster.get_operation(name)


async def test_wait_operation_returns_at_the_end_or_at_its_timeout(cluster: Cluster) -> None:
    worker = await cluster.worker()
    call = cluster.execute(cluster.action())
    name = (await call.until_stage("QUEUED")).name
    start = await worker.next_start()
    sleepers = cluster.clock.sleeper_count
    request = longrunning.WaitOperationRequest(name=name, timeout=datetime.timedelta(seconds=3))
    waiting = asyncio.create_task(cluster.operations("WaitOperation", request))
    await cluster.until(lambda: cluster.clock.sleeper_count > sleepers)
    await cluster.clock.advance(3.1)
    assert stage_of(longrunning.Operation().parse(await waiting)) == "QUEUED"
    waiting = asyncio.create_task(cluster.operations("WaitOperation", longrunning.WaitOperationRequest(name=name)))
    await worker.finish(start)
    assert longrunning.Operation().parse(await waiting).done


async def test_the_action_cache_is_the_cas_s(cluster: Cluster) -> None:
    digest = cluster.action()
    get = bytes(reapi.GetActionResultRequest(instance_name="main", action_digest=digest.to_message()))
    with pytest.raises(NotFoundError):
        await cluster.rpc.unary(_ACTION_CACHE + "GetActionResult", get)
    result = bytes(reapi.ActionResult(exit_code=0, stdout_raw=b"out"))
    update = bytes(
        reapi.UpdateActionResultRequest(
            instance_name="main", action_digest=digest.to_message(), action_result=reapi.ActionResult().parse(result)
        )
    )
    assert await cluster.rpc.unary(_ACTION_CACHE + "UpdateActionResult", update) == result
    assert await cluster.rpc.unary(_ACTION_CACHE + "GetActionResult", get) == result


async def test_the_action_cache_is_for_the_scheduler_s_instances_only() -> None:
    """The CAS may serve more of them, for other schedulers."""
    async with running_cluster(instance_names=["main"]) as strict:
        digest = strict.action().to_message()
        for method, request in (
            ("GetActionResult", reapi.GetActionResultRequest(instance_name="other", action_digest=digest)),
            ("UpdateActionResult", reapi.UpdateActionResultRequest(instance_name="other", action_digest=digest)),
        ):
            with pytest.raises(InvalidArgumentError, match="'main'"):
                await strict.rpc.unary(_ACTION_CACHE + method, bytes(request))
        assert not strict.cas.action_results


async def test_a_status_of_the_cas_keeps_its_details(cluster: Cluster) -> None:
    bad = bytes(reapi.GetActionResultRequest(action_digest=reapi.Digest(hash="x")))
    with pytest.raises(InvalidArgumentError) as caught:
        await cluster.rpc.unary(_ACTION_CACHE + "GetActionResult", bad)
    assert caught.value.details


async def test_capabilities_are_those_of_the_cas_and_execution(cluster: Cluster) -> None:
    answer = await cluster.rpc.unary(
        "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities",
        bytes(reapi.GetCapabilitiesRequest(instance_name="main")),
    )
    capabilities = reapi.ServerCapabilities().parse(answer)
    assert capabilities.cache_capabilities.max_batch_total_size_bytes > 0
    execution = capabilities.execution_capabilities
    assert execution.exec_enabled
    assert execution.digest_function == 1
    assert 1 in execution.digest_functions
    assert execution.supported_node_properties == ["mtime", "unix_mode"]
    assert execution.execution_priority_capabilities.priorities[0].min_priority < 0


async def test_health_is_served_on_both_ports(cluster: Cluster) -> None:
    for port, service in (
        ("client", "build.bazel.remote.execution.v2.Execution"),
        ("worker_api", "lathe.worker.v1.WorkerApi"),
    ):
        rpc = RpcClient(await cluster.new_channel(port))
        request = bytes(health.HealthCheckRequest(service=service))
        answer = await rpc.unary("/grpc.health.v1.Health/Check", request)
        assert health.HealthCheckResponse().parse(answer).status == 1


async def test_the_status_page_shows_workers_queues_and_what_runs(cluster: Cluster) -> None:
    worker = await cluster.worker("w1", slots=1, cpu_count="1", OSFamily="linux")
    for number in range(3):
        call = cluster.execute(cluster.action(str(number), platform={"cpu_count": "1"}))
        await call.until_stage("QUEUED")
    await worker.next_start()
    url = f"http://{LOOPBACK}:{cluster.runtime.ports['http']}/status"
    page = json.loads(await asyncio.to_thread(lambda: urllib.request.urlopen(url).read()))
    assert page["cas"]["available"]
    assert page["workers"][0]["id"] == "w1"
    assert page["workers"][0]["properties"] == {"cpu_count": ["1"], "OSFamily": ["linux"]}
    assert page["platform_queues"][0]["queued"] == 2
    assert page["executing"][0]["worker"] == "w1"


class TestWorkerApi:
    async def test_a_stream_must_begin_with_register(self, cluster: Cluster) -> None:
        worker = ScriptedWorker(await cluster.worker_call(), "w")
        await worker.send(heartbeat=worker_v1.Heartbeat())
        with pytest.raises(InvalidArgumentError, match="register"):
            await worker.receive()

    async def test_another_protocol_version_is_refused(self, cluster: Cluster) -> None:
        worker = ScriptedWorker(await cluster.worker_call(), "w")
        await worker.send(register=worker_v1.Register(worker_id="w", protocol_version=2, slots=1))
        message = await worker.receive()
        assert message is not None
        assert "version 1" in message.refused.reason
        assert await worker.receive() is None
        assert not cluster.runner.queue.workers

    @pytest.mark.parametrize(
        "register",
        [
            worker_v1.Register(worker_id="", slots=1),
            worker_v1.Register(worker_id="x" * 300, slots=1),
            worker_v1.Register(worker_id="w", slots=0),
            worker_v1.Register(worker_id="w", slots=1, properties=[worker_v1.Property(name="cpu_count", value="many")]),
            worker_v1.Register(worker_id="w", slots=1, held=[worker_v1.HeldAction(lease_id="l")]),
        ],
    )
    async def test_malformed_registrations_are_refused(self, cluster: Cluster, register: worker_v1.Register) -> None:
        worker = ScriptedWorker(await cluster.worker_call(), "w")
        register.protocol_version = 1
        await worker.send(register=register)
        with pytest.raises(InvalidArgumentError, match="register"):
            await worker.receive()

    @pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x02\x08", b"\x22\x04\x12\x02\xff\xff"])
    async def test_malformed_messages_end_their_stream_and_nothing_else(self, cluster: Cluster, data: bytes) -> None:
        other = await cluster.worker("other")
        worker = await cluster.worker("w")
        await worker.call.send(data)
        with pytest.raises(InvalidArgumentError):
            await worker.receive()
        await other.send(heartbeat=worker_v1.Heartbeat())
        assert (await other.receive()) == worker_v1.SchedulerMessage(heartbeat_ack=worker_v1.HeartbeatAck())

    async def test_registering_twice_in_a_stream_is_an_error(self, cluster: Cluster) -> None:
        worker = await cluster.worker("w")
        await worker.send(register=worker_v1.Register(worker_id="w", protocol_version=1, slots=1))
        with pytest.raises(InvalidArgumentError, match="once"):
            await worker.receive()

    async def test_a_message_of_an_unknown_kind_is_ignored(self, cluster: Cluster) -> None:
        worker = await cluster.worker("w")
        await worker.call.send(b"\xfa\x07\x01x")
        await worker.send(heartbeat=worker_v1.Heartbeat())
        assert await worker.receive() is not None

    async def test_the_end_of_an_unknown_lease_is_ignored(self, cluster: Cluster) -> None:
        worker = await cluster.worker("w")
        await worker.send(action_finished=worker_v1.ActionFinished(lease_id="nonsense"))
        await worker.send(heartbeat=worker_v1.Heartbeat())
        assert await worker.receive() is not None

    async def test_the_newer_connection_of_a_worker_wins(self, cluster: Cluster) -> None:
        old = await cluster.worker("w")
        new = await cluster.worker("w")
        assert await old.receive() is None
        call = cluster.execute(cluster.action())
        await new.finish(await new.next_start())
        assert response_of(await call.until_done()).status.code == 0

    async def test_a_lease_that_nobody_knows_is_cancelled(self, cluster: Cluster) -> None:
        digest = Digest.of(b"some action")
        held = worker_v1.HeldAction(lease_id="stranger", action_digest=digest.to_message())
        worker = await cluster.worker("w", held=[held])
        assert (await worker.next_cancel()).lease_id == "stranger"

    async def test_a_draining_worker_gets_nothing_more(self, cluster: Cluster) -> None:
        worker = await cluster.worker("w")
        await worker.send(draining=worker_v1.Draining())
        await cluster.until(lambda: cluster.runner.queue.workers["w"].draining)
        call = cluster.execute(cluster.action())
        await call.until_stage("QUEUED")
        other = await cluster.worker("other")
        await other.finish(await other.next_start())
        await call.until_done()


async def test_clients_find_no_worker_api_and_workers_no_execution(cluster: Cluster) -> None:
    once = RetryPolicy(attempts=1)
    worker_port = RpcClient(await cluster.new_channel("worker_api"), retry=once)
    with pytest.raises(LatheError):
        await worker_port.unary("/google.longrunning.Operations/GetOperation", b"")
