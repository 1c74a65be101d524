"""Services that answer for some instances only: every RPC for another one says which they are."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.integration.independent_client.client import INSTANCE, IndependentClient
from tests.integration.independent_client.every_rpc import INSTANCE_RPCS, EveryRpc
from tests.integration.independent_client.generated_api import GeneratedApi
from tests.support.service_process import HOST, ServiceProcess, free_ports

KNOWN = (INSTANCE, "team/a")


@pytest.fixture(scope="module")
def strict_client(api: GeneratedApi, scratch: Path) -> Iterator[IndependentClient]:
    """Reach a CAS and a scheduler that know two instances; no worker is needed for what they refuse."""
    cas_port, cas_http, scheduler_port, scheduler_http, worker_api = free_ports(5)
    common = (f"--host={HOST}", f"--instance-names={','.join(KNOWN)}")
    services = []
    for name, http_port, flags in (
        ("cas", cas_http, [f"--port={cas_port}", f"--data-dir={scratch / 'strict_cas'}"]),
        (
            "scheduler",
            scheduler_http,
            [f"--port={scheduler_port}", f"--worker-api-port={worker_api}", f"--cas-endpoint={HOST}:{cas_port}"],
        ),
    ):
        log = scratch / f"strict_{name}.log"
        flags = [*common, f"--http-port={http_port}", *flags]
        services.append(ServiceProcess(name, f"lathe-{name}", flags, http_port, log))
    client = IndependentClient(api, f"{HOST}:{cas_port}", f"{HOST}:{scheduler_port}")
    try:
        for service in services:
            service.start()
        for service in services:
            service.wait_healthy()
        yield client
    finally:
        client.close()
        for service in services:
            service.discard()


@pytest.fixture(scope="module")
def known_instance(strict_client: IndependentClient) -> EveryRpc:
    return EveryRpc(strict_client, b"stored by the tests of unknown instances " * 8)


@pytest.mark.parametrize("instance", ["other", "", "team", "main/a"])
@pytest.mark.parametrize("name", INSTANCE_RPCS)
def test_another_instance_is_refused_with_the_names_of_the_known_ones(
    strict_client: IndependentClient, known_instance: EveryRpc, name: str, instance: str
) -> None:
    rpc = known_instance.of_instance(instance).rpc(name)
    requests = [request.SerializeToString() for request in rpc.requests()]

    with pytest.raises(grpc.RpcError) as refused:
        rpc.call(requests)

    error = refused.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    for known in KNOWN:
        assert repr(known) in (error.details() or "")
    (bad_request,) = strict_client.details(error)
    assert [violation.field for violation in bad_request.field_violations] == ["instance_name"]


@pytest.mark.parametrize("instance", KNOWN)
@pytest.mark.parametrize("name", INSTANCE_RPCS)
def test_the_known_ones_are_served(known_instance: EveryRpc, name: str, instance: str) -> None:
    every_rpc = known_instance.of_instance(instance)
    every_rpc.rpc("cas ActionCache/UpdateActionResult").plain_call()

    assert every_rpc.rpc(name).plain_call() == known_instance.rpc(name).plain_call()
