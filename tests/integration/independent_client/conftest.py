"""One real cluster for all tests of the independent client, and that client."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.independent_client.actions import Actions
from tests.integration.independent_client.client import IndependentClient
from tests.integration.independent_client.generated_api import GeneratedApi, generate_api
from tests.support.cluster import Cluster
from tests.support.required import require_programs
from tests.support.service_process import HOST

UniqueBytes = Callable[[int], bytes]


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> GeneratedApi:
    """Generate stock Python code from our .proto files."""
    return generate_api(tmp_path_factory.mktemp("generated_api"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run CAS, scheduler and one worker as processes."""
    require_programs("bwrap")
    cluster = Cluster(tmp_path_factory.mktemp("independent_client"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.discard()


@pytest.fixture(scope="session")
def client(api: GeneratedApi, cluster: Cluster) -> Iterator[IndependentClient]:
    """Connect to the cluster."""
    client = IndependentClient(api, f"{HOST}:{cluster.cas_port}", f"{HOST}:{cluster.scheduler_port}")
    yield client
    client.close()


@pytest.fixture
def unique_bytes(request: pytest.FixtureRequest) -> UniqueBytes:
    """Make bytes that no other test stores: the cluster is shared, and what one stored the others find."""
    count = 0

    def make(size: int) -> bytes:
        nonlocal count
        count += 1
        pattern = f"{request.node.nodeid} #{count} ".encode()
        assert size >= len(pattern), f"{size} bytes are too few to be unique"
        return (pattern * (size // len(pattern) + 1))[:size]

    return make


@pytest.fixture
def actions(client: IndependentClient, unique_bytes: UniqueBytes) -> Actions:
    """Make actions that no other test has."""
    return Actions(client, unique_bytes(200))


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder for services that single tests start."""
    return tmp_path_factory.mktemp("own_services")
