"""Execute from end to end over gRPC, with a scripted worker."""

import asyncio
import datetime

import pytest
from tests.integration.scheduler.conftest import Cluster, response_of, running_cluster, stage_of

from lathe_protos import longrunning, reapi, rpc, worker_v1
from lathe_scheduler.queue_events import ActionFinished, TimePassed
from lathe_shared.digest import Digest
from lathe_shared.errors import (
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)

OK = 0
CANCELLED = 1
INVALID_ARGUMENT = 3
FAILED_PRECONDITION = 9


async def test_an_action_is_executed_and_its_response_arrives_unchanged(cluster: Cluster) -> None:
    digest = cluster.action("echo", "hello", platform={"cpu_count": "1"})
    worker = await cluster.worker(cpu_count="2")
    call = cluster.execute(digest)
    first = await call.next()
    assert stage_of(first) == "CACHE_CHECK"
    assert first.name.startswith("main/operations/")
    start = await worker.next_start()
    assert start.instance_name == "main"
    assert start.action_digest == digest.to_message()
    assert start.action == cluster.cas.blobs[digest]
    assert reapi.Command().parse(start.command).arguments == ["echo", "hello"]
    assert start.queued_timestamp == cluster.clock.now()
    await worker.begin(start)
    executing = await call.until_stage("EXECUTING")
    metadata = reapi.ExecuteOperationMetadata().parse(executing.metadata.value)
    assert metadata.action_digest == digest.to_message()
    assert metadata.partial_execution_metadata.worker == "w"
    # A field that nobody knows shows that the bytes are passed on as they came.
    response = bytes(reapi.ExecuteResponse(result=reapi.ActionResult(exit_code=3))) + b"\xfa\x07\x01x"
    await worker.finish(start, response)
    done = await call.until_done()
    assert stage_of(done) == "COMPLETED"
    assert done.response.value == response
    assert cluster.runner.queue.executing_count == 0


async def test_a_cached_result_is_answered_at_once(cluster: Cluster) -> None:
    digest = cluster.action()
    result = bytes(reapi.ActionResult(stdout_raw=b"cached")) + b"\xfa\x07\x01x"
    cluster.cas.action_results["main", digest] = result
    operation = await cluster.execute(digest).next()
    response = response_of(operation)
    assert response.cached_result
    assert response.status.code == OK
    assert result in operation.response.value
    assert cluster.cas.calls["FindMissingBlobs"] == 0


async def test_a_cached_result_without_its_action_counts(cluster: Cluster) -> None:
    digest = Digest.of(b"no action at all")
    cluster.cas.action_results["main", digest] = bytes(reapi.ActionResult(exit_code=0))
    assert response_of(await cluster.execute(digest).until_done()).cached_result


async def test_skip_cache_lookup_executes(cluster: Cluster) -> None:
    digest = cluster.action()
    cluster.cas.action_results["main", digest] = bytes(reapi.ActionResult())
    worker = await cluster.worker()
    call = cluster.execute(digest, skip_cache_lookup=True)
    assert stage_of(await call.next()) == "CACHE_CHECK"
    await worker.finish(await worker.next_start())
    assert not response_of(await call.until_done()).cached_result
    assert cluster.cas.calls["GetActionResult"] == 0


async def test_two_clients_share_one_execution(cluster: Cluster) -> None:
    digest = cluster.action()
    worker = await cluster.worker()
    first = cluster.execute(digest)
    second = cluster.execute(digest, channel=await cluster.new_channel())
    start = await worker.next_start()
    operations = [await first.until_stage("QUEUED"), await second.until_stage("QUEUED")]
    assert operations[0].name != operations[1].name
    third = cluster.execute(digest)
    await third.until_stage("QUEUED")
    await worker.finish(start)
    for call in (first, second, third):
        assert response_of(await call.until_done()).result.stdout_raw == b"done"
    metrics = cluster.runtime.metrics.exposition().decode()
    assert "lathe_scheduler_actions_dispatched_total 1.0" in metrics
    assert "lathe_scheduler_executions_merged_total 2.0" in metrics


@pytest.mark.parametrize(
    "settings", [{"max_completed_operations": 1}, {"max_completed_bytes": 0}, {"completed_retention_seconds": 0.0}]
)
async def test_who_follows_an_execution_gets_its_end_though_it_is_forgotten_at_once(
    settings: dict[str, object],
) -> None:
    async with running_cluster(**settings) as cluster:
        digest = cluster.action()
        worker = await cluster.worker()
        calls = [cluster.execute(digest, channel=await cluster.new_channel()) for _ in range(3)]
        start = await worker.next_start()
        for call in calls:
            await call.until_stage("QUEUED")
        event = ActionFinished("w", 1, start.lease_id, bytes(reapi.ExecuteResponse(message="the end")))
        cluster.runner.submit(event)
        cluster.runner.submit(TimePassed())  # in the same turn, so before anybody wakes
        assert len(list(cluster.runner.queue.operations())) <= 1
        for call in calls:
            assert response_of(await call.until_done()).message == "the end"


async def test_actions_that_must_not_be_cached_run_for_each_client_and_ignore_the_cache(cluster: Cluster) -> None:
    digest = cluster.action(do_not_cache=True)
    cluster.cas.action_results["main", digest] = bytes(reapi.ActionResult())
    worker = await cluster.worker()
    calls = [cluster.execute(digest), cluster.execute(digest)]
    for call in calls:
        await call.next()
    for _ in calls:
        start = await worker.next_start()
        assert start.do_not_cache
        await worker.finish(start)
    for call in calls:
        assert not response_of(await call.until_done()).cached_result


async def test_every_missing_blob_is_listed(cluster: Cluster) -> None:
    root = cluster.blobs.directory({"a/b/c.txt": b"deep", "top.txt": b"top"})
    digest = cluster.action("cat", input_root=root)
    gone = {Digest.of(b"deep"), Digest.of(b"top")}
    for blob in gone:
        del cluster.cas.blobs[blob]
    response = response_of(await cluster.execute(digest).until_done())
    assert response.status.code == FAILED_PRECONDITION
    assert [detail.type_url for detail in response.status.details] == [
        "type.googleapis.com/google.rpc.PreconditionFailure"
    ]
    failure = rpc.PreconditionFailure().parse(response.status.details[0].value)
    assert {violation.type for violation in failure.violations} == {"MISSING"}
    assert {violation.subject for violation in failure.violations} == {f"blobs/{blob}" for blob in gone}
    # Uploaded again, it runs.
    cluster.cas.blobs.update(cluster.blobs.blobs)
    worker = await cluster.worker()
    call = cluster.execute(digest)
    await worker.finish(await worker.next_start())
    assert response_of(await call.until_done()).status.code == OK


async def test_a_missing_action_and_a_missing_command_are_listed(cluster: Cluster) -> None:
    digest = cluster.action(store=False)
    response = response_of(await cluster.execute(digest).until_done())
    assert f"{digest}" in response.status.message
    command = reapi.Action().parse(cluster.blobs.blobs[digest]).command_digest
    cluster.cas.blobs.update(cluster.blobs.blobs)
    del cluster.cas.blobs[Digest.from_message(command)]
    response = response_of(await cluster.execute(digest).until_done())
    assert response.status.code == FAILED_PRECONDITION
    assert command.hash in response.status.message


async def test_inputs_are_asked_for_again_after_a_worker_missed_one(cluster: Cluster) -> None:
    root = cluster.blobs.directory({"a": b"a"})
    digest = cluster.action(input_root=root)
    worker = await cluster.worker()
    call = cluster.execute(digest)
    start = await worker.next_start()
    lost = Digest.of(b"a")
    del cluster.cas.blobs[lost]
    status = rpc.Status(code=FAILED_PRECONDITION, message="missing")
    await worker.finish(start, bytes(reapi.ExecuteResponse(status=status)))
    assert response_of(await call.until_done()).status.code == FAILED_PRECONDITION
    response = response_of(await cluster.execute(digest).until_done())
    assert f"{lost}" in response.status.message


async def test_an_unknown_property_is_refused_by_name(cluster: Cluster) -> None:
    error = await cluster.execute(cluster.action(platform={"gpu": "1"})).error()
    assert isinstance(error, InvalidArgumentError)
    assert "'gpu'" in error.message
    assert "OSFamily, cpu_count" in error.message


async def test_an_amount_that_is_no_number_is_refused(cluster: Cluster) -> None:
    error = await cluster.execute(cluster.action(platform={"cpu_count": "many"})).error()
    assert isinstance(error, InvalidArgumentError)


async def test_a_property_that_no_worker_has_is_said_within_seconds(cluster: Cluster) -> None:
    await cluster.worker(cpu_count="2")
    call = cluster.execute(cluster.action(platform={"cpu_count": "64"}))
    await call.until_stage("QUEUED")
    await cluster.clock.advance(5.5)
    response = response_of(await call.until_done())
    assert response.status.code == FAILED_PRECONDITION
    assert "cpu_count=64, and workers offer cpu_count=2" in response.status.message


async def test_malformed_messages_are_named(cluster: Cluster) -> None:
    garbage = cluster.blobs.add(b"\xff\xff\xff")
    cluster.cas.blobs.update(cluster.blobs.blobs)
    error = await cluster.execute(garbage).error()
    assert isinstance(error, InvalidArgumentError)
    assert f"action {garbage}" in error.message
    for action in (
        reapi.Action(command_digest=garbage.to_message(), input_root_digest=cluster.blobs.directory({}).to_message()),
        reapi.Action(command_digest=garbage.to_message(), input_root_digest=garbage.to_message()),
        reapi.Action(),
    ):
        digest = cluster.blobs.add(bytes(action))
        cluster.cas.blobs.update(cluster.blobs.blobs)
        assert isinstance(await cluster.execute(digest).error(), InvalidArgumentError)


async def test_timeouts_out_of_bounds_are_refused(cluster: Cluster) -> None:
    for seconds in (-1, 10**7):
        digest = cluster.action(timeout=datetime.timedelta(seconds=seconds))
        error = await cluster.execute(digest).error()
        assert isinstance(error, InvalidArgumentError)
        assert "action.timeout" in error.message


async def test_bad_requests_are_refused(cluster: Cluster) -> None:
    bad = Digest("xyz", 3)
    assert isinstance(await cluster.execute(bad).error(), InvalidArgumentError)
    negative = Digest(Digest.of(b"").hash, -5)
    assert isinstance(await cluster.execute(negative).error(), InvalidArgumentError)
    assert isinstance(await cluster.execute(cluster.action(), digest_function=77).error(), InvalidArgumentError)


async def test_an_unknown_instance_is_refused_naming_the_known_ones() -> None:
    async with running_cluster(instance_names=["main"]) as cluster:
        error = await cluster.execute(cluster.action(), instance_name="other").error()
        assert isinstance(error, InvalidArgumentError)
        assert "'main'" in error.message


async def test_a_storage_that_is_away_is_unavailable_by_a_plain_status() -> None:
    async with running_cluster(cas_endpoint="127.0.0.1:1") as cluster:
        call = cluster.execute(cluster.action())
        # The clients of the CAS try again after growing pauses.
        async with asyncio.timeout(10):
            while not call.has_message:
                await cluster.clock.advance(1)
        error = await call.error()
        assert isinstance(error, UnavailableError)
        assert "127.0.0.1:1" in error.message


async def test_a_lost_worker_s_action_runs_on_another_one(cluster: Cluster) -> None:
    channel = await cluster.new_channel("worker_api")
    first = await cluster.worker("first", channel=channel)
    call = cluster.execute(cluster.action())
    await first.begin(await first.next_start())
    await call.until_stage("EXECUTING")
    second = await cluster.worker("second")
    channel.close()
    await cluster.until(lambda: cluster.runner.connection_count == 1)
    await cluster.clock.advance(2.5)
    await call.until_stage("QUEUED")
    await second.finish(await second.next_start())
    assert response_of(await call.until_done()).status.code == OK


async def test_a_scheduler_that_stood_still_loses_no_worker(cluster: Cluster) -> None:
    worker = await cluster.worker()
    call = cluster.execute(cluster.action("true"))
    start = await worker.next_start()
    await worker.begin(start)
    await call.until_stage("EXECUTING")
    cluster.clock.advance_nowait(60)
    await cluster.clock.advance(1)
    await worker.finish(start)
    assert response_of(await call.until_done()).result.stdout_raw == b"done"


async def test_a_worker_that_reconnects_keeps_its_action(cluster: Cluster) -> None:
    channel = await cluster.new_channel("worker_api")
    worker = await cluster.worker("w", channel=channel)
    digest = cluster.action()
    call = cluster.execute(digest)
    start = await worker.next_start()
    await worker.begin(start)
    await call.until_stage("EXECUTING")
    channel.close()
    await cluster.until(lambda: cluster.runner.connection_count == 0)
    await cluster.clock.advance(1)
    held = worker_v1.HeldAction(lease_id=start.lease_id, instance_name="main", action_digest=digest.to_message())
    again = await cluster.worker("w", held=[held])
    await cluster.clock.advance(5)
    await again.finish(start)
    assert response_of(await call.until_done()).status.code == OK
    assert "lathe_scheduler_actions_dispatched_total 1.0" in cluster.runtime.metrics.exposition().decode()


async def test_a_client_that_resets_its_stream_ends_the_action_at_once(cluster: Cluster) -> None:
    worker = await cluster.worker()
    call = cluster.execute(cluster.action())
    operation = await call.until_stage("QUEUED")
    start = await worker.next_start()
    await call.cancel()
    cancel = await worker.next_cancel()
    assert cancel.lease_id == start.lease_id
    done = await cluster.get_operation(operation.name)
    assert response_of(done).status.code == CANCELLED


async def test_a_client_that_lost_its_connection_comes_back(cluster: Cluster) -> None:
    worker = await cluster.worker()
    channel = await cluster.new_channel()
    call = cluster.execute(cluster.action(), channel=channel)
    operation = await call.until_stage("QUEUED")
    start = await worker.next_start()
    channel.close()
    found = cluster.runner.queue.operation(operation.name)
    assert found is not None
    await cluster.until(lambda: found.listeners == 0)
    await cluster.clock.advance(9)
    again = cluster.wait_execution(operation.name)
    assert not (await again.next()).done
    await cluster.clock.advance(5)
    await worker.finish(start)
    assert response_of(await again.until_done()).status.code == OK


async def test_a_client_that_does_not_come_back_loses_its_action(cluster: Cluster) -> None:
    worker = await cluster.worker()
    channel = await cluster.new_channel()
    call = cluster.execute(cluster.action(), channel=channel)
    operation = await call.until_stage("QUEUED")
    await worker.next_start()
    channel.close()
    found = cluster.runner.queue.operation(operation.name)
    assert found is not None
    await cluster.until(lambda: found.listeners == 0)
    await cluster.clock.advance(10.5)
    await worker.next_cancel()
    assert found.is_done


async def test_wait_execution_answers_for_done_and_unknown_operations(cluster: Cluster) -> None:
    worker = await cluster.worker()
    call = cluster.execute(cluster.action())
    await worker.finish(await worker.next_start())
    done = await call.until_done()
    assert await cluster.wait_execution(done.name).until_done() == done
    assert isinstance(await cluster.wait_execution("main/operations/none").error(), NotFoundError)


async def test_an_unchanging_operation_is_repeated_now_and_then(cluster: Cluster) -> None:
    platform = {"cpu_count": "1"}
    async with running_cluster(configured_platforms=[platform]) as patient:
        call = patient.execute(patient.action(platform=platform))
        await call.until_stage("QUEUED")
        for _ in range(3):
            await patient.clock.advance(31)
            assert stage_of(await call.next()) == "QUEUED"


async def test_a_fault_of_all_workers_gives_the_client_what_the_last_one_said(cluster: Cluster) -> None:
    worker = await cluster.worker()
    call = cluster.execute(cluster.action())
    response = bytes(reapi.ExecuteResponse(status=rpc.Status(code=8, message="no space left")))
    for _ in range(3):
        await worker.finish(await worker.next_start(), response, fault=True)
    assert response_of(await call.until_done()).status.message == "no space left"


async def test_operations_without_an_instance_have_no_prefix(cluster: Cluster) -> None:
    await cluster.worker()
    operation = await cluster.execute(cluster.action(), instance_name="").next()
    assert operation.name.startswith("operations/")
    assert isinstance(operation, longrunning.Operation)
