"""What the unit tests of the shared parts have in common."""

import pytest

from lathe_shared import grpc_transport
from lathe_shared.grpc_transport import Engine


@pytest.fixture(params=list(Engine), ids=lambda engine: engine.value)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Run a test once on each HTTP/2 engine: its servers and channels are made without naming one."""
    chosen: Engine = request.param
    monkeypatch.setattr(grpc_transport, "DEFAULT_ENGINE", chosen)
    return chosen
