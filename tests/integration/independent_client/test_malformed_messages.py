"""A thousand malformed messages: each is answered, and the services go on serving."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.integration.independent_client.actions import Actions
from tests.integration.independent_client.client import IndependentClient
from tests.integration.independent_client.conftest import UniqueBytes
from tests.integration.independent_client.every_rpc import EveryRpc, Rpc
from tests.integration.independent_client.malformed import malformed
from tests.support.cluster import Cluster

REQUESTS = 1_000
BLOBS = 300
CALLS_AT_ONCE = 16

# What a client may be told about what it asked for. INTERNAL and UNKNOWN would be bugs, UNAVAILABLE and CANCELLED a
# connection or a process that is gone, DEADLINE_EXCEEDED a call that hung.
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
CODES = {code.value[0]: code for code in grpc.StatusCode}


@pytest.fixture(autouse=True)
def services_unharmed(cluster: Cluster) -> Iterator[None]:
    """See that the processes are those from before, and that none of them logged an error meanwhile."""
    begun = [service.metrics().total("process_start_time_seconds") for service in cluster.services]
    logged = [service.log.stat().st_size for service in cluster.services]
    assert 0 not in begun

    yield

    cluster.wait_ready()
    assert [service.metrics().total("process_start_time_seconds") for service in cluster.services] == begun
    for service, position in zip(cluster.services, logged, strict=True):
        assert not errors_in(service.log, position)


def errors_in(log: Path, position: int) -> list[str]:
    """List the lines of a log behind a position that tell of a bug; lines that are no JSON are tracebacks."""
    lines = log.read_bytes()[position:].decode().splitlines()
    return [line for line in lines if '"level": "error"' in line or not line.startswith("{")]


def statuses_of(call: Callable[[Any], grpc.StatusCode | None], items: Sequence[Any]) -> list[grpc.StatusCode]:
    """Make a call with each item, several at once; return how they ended, in order."""

    def status_of(item: Any) -> grpc.StatusCode:
        try:
            return call(item) or grpc.StatusCode.OK
        except grpc.RpcError as error:
            return error.code()

    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        return list(pool.map(status_of, items))


def test_malformed_requests(client: IndependentClient, unique_bytes: UniqueBytes) -> None:
    every_rpc = EveryRpc(client, unique_bytes(300))
    rpcs = dict(every_rpc.all())
    before = {name: rpc.plain_call() for name, rpc in rpcs.items()}
    chance = random.Random(1_000)
    calls: list[tuple[Rpc, list[bytes]]] = []
    for rpc in islice(cycle(rpcs.values()), REQUESTS):
        requests = [request.SerializeToString() for request in rpc.requests()]
        place = chance.randrange(len(requests))
        requests[place] = malformed(requests[place], chance)
        calls.append((rpc, requests))

    def call(rpc_and_requests: tuple[Rpc, list[bytes]]) -> None:
        rpc, requests = rpc_and_requests
        rpc.call(requests)

    statuses = statuses_of(call, calls)

    ended = [(status, rpc.path, requests) for status, (rpc, requests) in zip(statuses, calls, strict=True)]
    assert not [(status, path, requests) for status, path, requests in ended if status not in ANSWERS]
    # The damage is real: most are refused, and some of each method.
    refused = [path for status, path, _ in ended if status is not grpc.StatusCode.OK]
    assert set(refused) == {rpc.path for rpc in rpcs.values()}
    assert len(refused) > REQUESTS // 2
    # A damaged message may be a valid one that stores another result.
    rpcs["cas ActionCache/UpdateActionResult"].plain_call()
    assert {name: rpc.plain_call() for name, rpc in rpcs.items()} == before


def test_malformed_messages_in_blobs(client: IndependentClient, actions: Actions) -> None:
    """Actions, Commands and Directories reach the scheduler and the worker inside blobs."""
    chance = random.Random(300)
    digests = [store_damaged(client, number, chance) for number in range(BLOBS)]

    def execute(digest: Any) -> grpc.StatusCode:
        return CODES[actions.execute(digest).status.code]

    statuses = statuses_of(execute, digests)

    ended = list(zip(statuses, digests, strict=True))
    assert not [(status, digest) for status, digest in ended if status not in ANSWERS]
    assert {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION} < set(statuses)
    assert actions.run("echo well").stdout_raw == b"well\n"


def store_damaged(client: IndependentClient, number: int, chance: random.Random) -> Any:
    """Store an action one of whose messages is damaged, while all digests are right; return its digest."""
    reapi = client.api.reapi
    below = reapi.Directory(files=[{"name": "file", "digest": client.digest(b"")}]).SerializeToString()
    if number % 4 == 0:
        below = malformed(below, chance)
    root = reapi.Directory(
        directories=[{"name": "below", "digest": client.digest(below)}],
        symlinks=[{"name": "link", "target": "below/file"}],
    ).SerializeToString()
    if number % 4 == 1:
        root = malformed(root, chance)
    command = reapi.Command(
        arguments=["true", str(number)],
        environment_variables=[{"name": "A", "value": "B"}],
        output_paths=["below/out"],
        working_directory="below",
    ).SerializeToString()
    if number % 4 == 2:
        command = malformed(command, chance)
    action = reapi.Action(
        command_digest=client.digest(command),
        input_root_digest=client.digest(root),
        timeout={"seconds": 20},
        salt=str(number).encode(),
    ).SerializeToString()
    if number % 4 == 3:
        action = malformed(action, chance)
    return client.store(below, root, command, action)[-1]
