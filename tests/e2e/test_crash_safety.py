"""What the CAS has acknowledged is there after kill -9, and nothing partial ever is."""

from __future__ import annotations

import os

import grpc
import pytest
from tests.support.cluster import Cluster
from tests.support.reapi_client import ReapiClient, digest_of


@pytest.mark.parametrize("size_bytes", [1, 1 << 10, 1 << 20, 24 << 20])
def test_an_acknowledged_blob_survives_kill_9(client: ReapiClient, cluster: Cluster, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    digest = client.write(data)
    cluster.cas.kill()
    cluster.cas.start()
    cluster.wait_ready()
    assert client.missing(digest) == []
    assert client.read_stream(digest) == data


def test_a_blob_cut_off_by_kill_9_is_not_there(client: ReapiClient, cluster: Cluster) -> None:
    data = os.urandom(8 << 20)
    digest = digest_of(data)
    half_sent = client.start_half_a_write(data)
    cluster.cas.kill()
    with pytest.raises(grpc.RpcError):
        half_sent.result()
    cluster.cas.start()
    cluster.wait_ready()
    assert client.missing(digest) == [digest]
    with pytest.raises(grpc.RpcError) as refused:
        client.read_stream(digest)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert client.write(data) == digest
    assert client.read_stream(digest) == data
