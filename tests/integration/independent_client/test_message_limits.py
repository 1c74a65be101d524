"""How large messages may be: a client with gRPC's usual limits gets every answer, and what is too large is refused."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.integration.independent_client.actions import Actions
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes
from tests.integration.independent_client.generated_api import GeneratedApi
from tests.support.cluster import Cluster
from tests.support.service_process import HOST

TOO_LARGE_BYTES = 20 << 20


@pytest.fixture
def usual_client(api: GeneratedApi, cluster: Cluster) -> Iterator[IndependentClient]:
    """Connect with the limit that gRPC libraries have unless told otherwise: messages of 4 MiB."""
    client = IndependentClient(
        api,
        f"{HOST}:{cluster.cas_port}",
        f"{HOST}:{cluster.scheduler_port}",
        max_receive_bytes=4 << 20,
    )
    yield client
    client.close()


@pytest.fixture
def actions(usual_client: IndependentClient, unique_bytes: UniqueBytes) -> Actions:
    return Actions(usual_client, unique_bytes(200))


class TestAnswersFitTheUsualLimit:
    def test_reading_a_large_blob(self, usual_client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        data = unique_bytes(9 << 20)
        usual_client.write(usual_client.upload_name(data), data)

        assert usual_client.read(usual_client.read_name(data)) == data

    def test_asking_for_as_many_digests_as_fit_a_request(self, usual_client: IndependentClient) -> None:
        digests = [usual_client.digest(b"never stored %d" % number) for number in range(50_000)]

        assert usual_client.missing(*digests) == [digest.hash for digest in digests]

    @pytest.mark.parametrize(("count", "size"), [(40_000, 64), (1_000, 3_990), (50_000, 20)])
    def test_a_batch_of_many_small_blobs(self, usual_client: IndependentClient, count: int, size: int) -> None:
        """The blobs stay below the advertised limit; with what frames them they are more than a message holds."""
        data = (b"one of many small blobs" * size)[:size]
        (digest,) = usual_client.store(data)
        request = usual_client.api.reapi.BatchReadBlobsRequest(instance_name=INSTANCE, digests=[digest] * count)

        responses = usual_client.cas.BatchReadBlobs(request).responses

        assert len(responses) == count
        codes = {response.status.code for response in responses}
        assert codes == ({0} if count == 1_000 else {0, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]})
        # What was left out can be asked for again.
        assert {response.data for response in responses if response.status.code == 0} == {data}

    def test_a_batch_of_many_wrong_blobs(self, usual_client: IndependentClient) -> None:
        wrong = {"digest": usual_client.digest(b"promised"), "data": b"another one"}
        request = usual_client.api.reapi.BatchUpdateBlobsRequest(instance_name=INSTANCE, requests=[wrong] * 18_000)

        responses = usual_client.cas.BatchUpdateBlobs(request).responses

        codes = [response.status.code for response in responses]
        assert codes == [grpc.StatusCode.INVALID_ARGUMENT.value[0]] * 18_000

    def test_a_tree_of_many_directories(self, usual_client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        reapi = usual_client.api.reapi
        names = [unique_bytes(60_000).decode() for _ in range(90)]
        children = [reapi.Directory(symlinks=[{"name": name, "target": "x"}]) for name in names]
        digests = [usual_client.store(child.SerializeToString())[0] for child in children]
        root = reapi.Directory(
            directories=[{"name": f"{number:02}", "digest": digest} for number, digest in enumerate(digests)]
        )
        (root_digest,) = usual_client.store(root.SerializeToString())

        pages = list(usual_client.cas.GetTree(reapi.GetTreeRequest(instance_name=INSTANCE, root_digest=root_digest)))

        assert [directory for page in pages for directory in page.directories] == [root, *children]

    def test_an_action_whose_inputs_are_all_missing(self, usual_client: IndependentClient, actions: Actions) -> None:
        inputs = {f"{number:05}": b"never stored %d" % number for number in range(15_000)}
        *files, root, command, action = actions.blobs("true; true", inputs=inputs)
        usual_client.write(usual_client.upload_name(root), root)
        usual_client.store(command, action)

        status = actions.execute(usual_client.digest(action)).status

        # As many as an answer holds: a client that uploads them hears of the rest.
        named = actions.missing_subjects(status)
        assert len(named) >= 1_000
        assert named <= {actions.subject(usual_client.digest(data)) for data in files}

    def test_a_list_of_large_operations(self, usual_client: IndependentClient, unique_bytes: UniqueBytes) -> None:
        reapi, actions, names = usual_client.api.reapi, Actions(usual_client, b""), set()
        for number in range(3):
            digest = usual_client.digest(unique_bytes(200))
            result = reapi.ActionResult(stdout_raw=bytes(2_500_000), exit_code=number)
            usual_client.action_cache.UpdateActionResult(
                reapi.UpdateActionResultRequest(instance_name="large", action_digest=digest, action_result=result)
            )
            names.add(list(actions.start(digest, instance_name="large"))[-1].name)
        found: list[str] = []
        token = ""
        while not found or token:
            request = usual_client.api.operations.ListOperationsRequest(name="large/operations", page_token=token)
            page = usual_client.operations.ListOperations(request)
            found += [operation.name for operation in page.operations]
            token = page.next_page_token

        assert set(found) == names

    def test_what_a_talkative_action_said(self, usual_client: IndependentClient, actions: Actions) -> None:
        result = actions.run("head -c 9000000 /dev/zero; head -c 9000000 /dev/zero >&2")

        assert (result.stdout_digest.size_bytes, result.stderr_digest.size_bytes) == (9_000_000, 9_000_000)


class TestTooLargeRequests:
    @pytest.mark.parametrize("rpc", ["Write", "UpdateActionResult", "Execute", "GetOperation"])
    def test_are_refused_and_the_connection_goes_on(
        self, client: IndependentClient, unique_bytes: UniqueBytes, rpc: str
    ) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            self.call(client, rpc, b"x" * TOO_LARGE_BYTES)

        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, refused.value
        data = unique_bytes(200)
        client.store(data)
        assert client.read(client.read_name(data)) == data
        assert not client.operations.ListOperations(
            client.api.operations.ListOperationsRequest(name="no such operation")
        ).operations

    @staticmethod
    def call(client: IndependentClient, rpc: str, large: bytes) -> Any:
        reapi, digest = client.api.reapi, client.digest(large)
        match rpc:
            case "Write":
                write = client.api.bytestream.WriteRequest(
                    resource_name=client.upload_name(large), data=large, finish_write=True
                )
                return client.bytestream.Write(iter([write]))
            case "UpdateActionResult":
                result = reapi.ActionResult(stdout_raw=large)
                return client.action_cache.UpdateActionResult(
                    reapi.UpdateActionResultRequest(instance_name=INSTANCE, action_digest=digest, action_result=result)
                )
            case "Execute":
                return list(
                    client.execution.Execute(
                        reapi.ExecuteRequest(
                            instance_name=INSTANCE, action_digest=digest, inline_output_files=[large.decode()]
                        )
                    )
                )
            case _:
                return client.operations.GetOperation(client.api.operations.GetOperationRequest(name=large.decode()))
