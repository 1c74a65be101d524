"""A CAS whose operator made batches small: actions with more than one batch of inputs and outputs run all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.cluster import Cluster
from tests.support.reapi_client import ReapiClient, digest_of, reapi_message
from tests.support.required import require_programs

LIMIT_BYTES = 150_000
NAMES = [f"blob-{number}" for number in range(10)]


@pytest.fixture
def small_cluster(tmp_path: Path) -> Iterator[Cluster]:
    require_programs("bwrap")
    cluster = Cluster(tmp_path / "cluster", cas_flags=(f"--max-batch-total-size-bytes={LIMIT_BYTES}",))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.discard()


@pytest.mark.parametrize("size_bytes", [60_000, 200_000], ids=["several batches", "none fits a batch"])
def test_an_action_with_more_than_a_batch_runs(small_cluster: Cluster, size_bytes: int) -> None:
    inputs = [name.encode() * (size_bytes // len(name)) for name in NAMES]
    # The Directory itself is larger than a batch, too.
    root = reapi_message("Directory")
    for name, data in zip(NAMES, inputs, strict=True):
        root.files.add(name=name, digest=digest_of(data))
    for number in range(200):
        root.symlinks.add(name=f"link-{number}-{'x' * 240}", target="y" * 1000)
    outputs = [f"out-{name}" for name in NAMES]
    script = f"for name in {' '.join(NAMES)}; do tr a-z A-Z <$name >out-$name; done"
    command = reapi_message("Command", arguments=["sh", "-c", script], output_paths=outputs)
    action = reapi_message(
        "Action",
        command_digest=digest_of(command.SerializeToString()),
        input_root_digest=digest_of(root.SerializeToString()),
    )
    with ReapiClient(small_cluster.cas_port, small_cluster.scheduler_port) as client:
        for blob in (*inputs, root.SerializeToString(), command.SerializeToString(), action.SerializeToString()):
            client.write(blob)

        response = client.execute(digest_of(action.SerializeToString()))

        assert response.status.code == 0, response
        assert response.result.exit_code == 0, response
        read = {file.path: client.read_stream(file.digest) for file in response.result.output_files}
    assert read == {name: data.upper() for name, data in zip(outputs, inputs, strict=True)}
