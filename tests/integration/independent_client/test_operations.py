"""Executions that others look at, wait for and cancel: WaitExecution and Operations."""

import grpc
import pytest
from tests.integration.independent_client.actions import ENDLESS, Actions
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.support.cluster import Cluster
from tests.support.waiting import eventually


def test_a_cancelled_execution_ends_for_everyone_who_waits(
    client: IndependentClient, actions: Actions, cluster: Cluster
) -> None:
    digest = actions.store(ENDLESS)
    executing = actions.start(digest)
    operation = actions.until_stage(executing, "EXECUTING")[-1]
    assert actions.metadata(operation).partial_execution_metadata.worker
    assert actions.metadata(operation).partial_execution_metadata.HasField("execution_start_timestamp")
    waiting = actions.wait(operation.name)
    assert actions.stage(next(waiting)) == "EXECUTING"

    client.operations.CancelOperation(client.api.operations.CancelOperationRequest(name=operation.name))

    ends = [list(stream)[-1] for stream in (executing, waiting)]
    assert [actions.response(end).status.code for end in ends] == [grpc.StatusCode.CANCELLED.value[0]] * 2
    assert actions.cached(digest) is None
    worker = cluster.workers[0]
    eventually(lambda: worker.metrics().total("lathe_worker_actions_executing") == 0, "the worker has nothing to do")


class TestWaitExecution:
    def test_after_the_end(self, actions: Actions) -> None:
        *_, end = actions.start(actions.store("echo once"))

        assert list(actions.wait(end.name)) == [end]

    def test_for_an_operation_that_never_was(self, actions: Actions) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            list(actions.wait(f"{INSTANCE}/operations/never-was"))

        # Bazel executes again then.
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


class TestOperations:
    def test_a_done_one_is_found(self, client: IndependentClient, actions: Actions) -> None:
        *_, end = actions.start(actions.store("echo once"))

        found = client.operations.GetOperation(client.api.operations.GetOperationRequest(name=end.name))

        assert found == end
        waited = client.operations.WaitOperation(client.api.operations.WaitOperationRequest(name=end.name))
        assert waited == end

    def test_a_running_one_is_found_and_listed(self, client: IndependentClient, actions: Actions) -> None:
        api = client.api.operations
        executing = actions.start(actions.store(ENDLESS))
        name = actions.until_stage(executing, "EXECUTING")[-1].name

        found = client.operations.GetOperation(api.GetOperationRequest(name=name))
        listed = client.operations.ListOperations(api.ListOperationsRequest(name=name)).operations
        running = client.operations.ListOperations(
            api.ListOperationsRequest(name=f"{INSTANCE}/operations", filter="stage=EXECUTING")
        ).operations
        client.operations.CancelOperation(api.CancelOperationRequest(name=name))

        assert actions.stage(found) == "EXECUTING"
        assert [found] == list(listed) == list(running)
        assert list(executing)[-1].done

    def test_a_list_comes_in_pages(self, client: IndependentClient, actions: Actions) -> None:
        ends = [list(actions.start(actions.store(f"echo {number}")))[-1].name for number in range(3)]
        names: list[str] = []
        token = ""
        while not names or token:
            request = client.api.operations.ListOperationsRequest(
                name=f"{INSTANCE}/operations", page_size=2, page_token=token
            )
            page = client.operations.ListOperations(request)
            assert 0 < len(page.operations) <= 2
            names += [operation.name for operation in page.operations]
            token = page.next_page_token

        assert names[-3:] == ends
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize("rpc", ["GetOperation", "CancelOperation", "DeleteOperation", "WaitOperation"])
    def test_one_that_never_was(self, client: IndependentClient, rpc: str) -> None:
        request = getattr(client.api.operations, f"{rpc}Request")(name=f"{INSTANCE}/operations/never-was")

        with pytest.raises(grpc.RpcError) as refused:
            getattr(client.operations, rpc)(request)

        assert refused.value.code() == grpc.StatusCode.NOT_FOUND

    def test_a_deleted_one_is_gone(self, client: IndependentClient, actions: Actions) -> None:
        api = client.api.operations
        *_, end = actions.start(actions.store("echo once"))

        client.operations.DeleteOperation(api.DeleteOperationRequest(name=end.name))

        with pytest.raises(grpc.RpcError) as refused:
            client.operations.GetOperation(api.GetOperationRequest(name=end.name))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
