"""GetCapabilities, Health.Check and Health.Watch of both services that clients talk to."""

from typing import Any

import grpc
import pytest
from tests.integration.independent_client.client import INSTANCE, IndependentClient

CAS_SERVICES = [
    "build.bazel.remote.execution.v2.ContentAddressableStorage",
    "build.bazel.remote.execution.v2.ActionCache",
    "build.bazel.remote.execution.v2.Capabilities",
    "google.bytestream.ByteStream",
]
SCHEDULER_SERVICES = [
    "build.bazel.remote.execution.v2.Execution",
    "build.bazel.remote.execution.v2.ActionCache",
    "build.bazel.remote.execution.v2.Capabilities",
    "google.longrunning.Operations",
]
SERVICES = [("cas", name) for name in ["", *CAS_SERVICES]] + [("scheduler", name) for name in ["", *SCHEDULER_SERVICES]]


def capabilities(client: IndependentClient, channel: grpc.Channel) -> Any:
    stub: Any = client.api.reapi_stubs.CapabilitiesStub(channel)
    return stub.GetCapabilities(client.api.reapi.GetCapabilitiesRequest(instance_name=INSTANCE))


def health(client: IndependentClient, where: str) -> Any:
    return client.api.health_stubs.HealthStub(client.cas_channel if where == "cas" else client.scheduler_channel)


def test_the_cas_tells_what_it_can(client: IndependentClient) -> None:
    answer = capabilities(client, client.cas_channel)
    cache = answer.cache_capabilities

    # Bazel 4.2.3 refuses a server whose lowest version is above 2.0.
    assert (answer.low_api_version.major, answer.low_api_version.minor) == (2, 0)
    assert answer.high_api_version.major == 2
    assert client.api.reapi.DigestFunction.SHA256 in cache.digest_functions
    assert cache.action_cache_update_capabilities.update_enabled
    # So that a full batch and what frames it fits the 4 MiB that gRPC libraries take by default.
    assert 0 < cache.max_batch_total_size_bytes < 4 << 20
    assert cache.symlink_absolute_path_strategy != client.api.reapi.SymlinkAbsolutePathStrategy.UNKNOWN
    assert not answer.HasField("execution_capabilities")


def test_the_scheduler_tells_what_the_cas_and_itself_can(client: IndependentClient) -> None:
    answer = capabilities(client, client.scheduler_channel)
    execution = answer.execution_capabilities

    assert answer.cache_capabilities == capabilities(client, client.cas_channel).cache_capabilities
    assert execution.exec_enabled
    assert execution.digest_function == client.api.reapi.DigestFunction.SHA256
    assert client.api.reapi.DigestFunction.SHA256 in execution.digest_functions


def test_the_cas_tells_how_it_splits_blobs(client: IndependentClient) -> None:
    cache = capabilities(client, client.cas_channel).cache_capabilities

    assert cache.split_blob_support
    assert cache.splice_blob_support
    assert cache.HasField("fast_cdc_2020_params")
    # What the specification recommends; clients ignore FastCDC where it is not within 1 KiB and 1 MiB.
    assert cache.fast_cdc_2020_params.avg_chunk_size_bytes == 512 << 10
    assert cache.fast_cdc_2020_params.seed == 0
    assert not cache.HasField("rep_max_cdc_params")


@pytest.mark.parametrize(("where", "service"), SERVICES)
def test_every_service_is_healthy(client: IndependentClient, where: str, service: str) -> None:
    answer = health(client, where).Check(client.api.health.HealthCheckRequest(service=service))

    assert answer.status == client.api.health.HealthCheckResponse.SERVING


@pytest.mark.parametrize("where", ["cas", "scheduler"])
def test_health_of_an_unknown_service(client: IndependentClient, where: str) -> None:
    request = client.api.health.HealthCheckRequest(service="no.such.Service")
    with pytest.raises(grpc.RpcError) as refused:
        health(client, where).Check(request)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND

    watch = health(client, where).Watch(request)
    assert next(watch).status == client.api.health.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize("where", ["cas", "scheduler"])
def test_watching_begins_with_the_state_now(client: IndependentClient, where: str) -> None:
    watch = health(client, where).Watch(client.api.health.HealthCheckRequest())

    assert next(watch).status == client.api.health.HealthCheckResponse.SERVING
    watch.cancel()
