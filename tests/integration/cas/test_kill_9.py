"""A real CAS process under mixed load is killed at moments that nobody chose, again and again.

What it acknowledged must be there afterwards, what it did not acknowledge must be there whole or not at all, and fsck
must find nothing. ``LATHE_KILLS`` says how often (200 for a release).
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.reapi_client import ReapiClient, digest_of, reapi_message
from tests.support.service_process import HOST, ServiceProcess, free_ports
from typing_extensions import override

from lathe_cas.fsck.command import main as fsck

KILLS = int(os.environ.get("LATHE_KILLS", "16"))
CLIENTS = 3

# What one client brings between two kills. Twice that, for what was under way, times the number of clients is less than
# what a store of SMALL_BYTES keeps when it evicts: so what was acknowledged since the last kill has not been evicted.
CLIENT_BYTES = 2 << 20
SMALL_BYTES = 20 << 20
AMPLE_BYTES = 8 << 30
SIZES_BYTES = (9, 500, 2_010, 2_011, 65_520, 65_521, 400_000, 1_900_000)
LARGEST_DELAY_OPERATIONS = 120

GONE = (None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

# The classes of messages are made at the first use, which must not happen in several threads at once.
digest_of(b"")


@dataclass
class Load:
    """What one client did since the last kill.

    Attributes:
        blobs: Blobs that it began to upload, by hash.
        acknowledged: Hashes of those that were acknowledged.
        results: ActionResults that were acknowledged, by the hash of their action.
        trouble: What should not have happened.
    """

    blobs: dict[str, bytes] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    results: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)


class Client(threading.Thread):
    """Uploads, reads and stores results until the CAS is gone.

    Args:
        port: Of the CAS.
        seed: Of what it does.
        begin: Called before each operation.
    """

    def __init__(self, port: int, seed: str, begin: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.load = Load()
        self._client = ReapiClient(port, port, own_connection=True)
        self._stopped = threading.Event()
        self._random = random.Random(seed)
        self._begin = begin

    def stop(self) -> None:
        """End what it waits for, now that the CAS is gone."""
        self._stopped.set()
        self._client.close()

    @override
    def run(self) -> None:
        acknowledged_bytes = 0
        client = self._client
        try:
            while True:
                self._begin.release()
                if acknowledged_bytes < CLIENT_BYTES and self._random.random() < 0.6:
                    acknowledged_bytes += self._upload(client)
                elif self._random.random() < 0.5:
                    self._store_result(client)
                else:
                    self._read(client)
        except (grpc.RpcError, ValueError) as error:
            # grpcio raises a ValueError for a call on a channel that was closed.
            code = error.code() if isinstance(error, grpc.RpcError) else None
            if code not in GONE or not self._stopped.wait(60):
                self.load.trouble.append(repr(error))
        except AssertionError as error:
            self.load.trouble.append(repr(error))

    def _new_blob(self) -> tuple[str, bytes]:
        data = self._random.randbytes(self._random.choice(SIZES_BYTES))
        hash_ = digest_of(data).hash
        self.load.blobs[hash_] = data
        return hash_, data

    def _upload(self, client: ReapiClient) -> int:
        if self._random.random() < 0.5:
            hash_, data = self._new_blob()
            client.write(data)
            self.load.acknowledged.add(hash_)
            return len(data)
        batch = [self._new_blob() for _ in range(self._random.randrange(1, 20))]
        small = [(hash_, data) for hash_, data in batch if len(data) < 100_000]
        client.upload(*[data for _, data in small])
        self.load.acknowledged.update(hash_ for hash_, _ in small)
        return sum(len(data) for _, data in small)

    def _store_result(self, client: ReapiClient) -> None:
        hashes = self._random.sample(sorted(self.load.acknowledged), min(3, len(self.load.acknowledged)))
        action = digest_of(self._random.randbytes(20))
        result = reapi_message("ActionResult", exit_code=self._random.randrange(100))
        for hash_ in hashes:
            result.output_files.add(path=hash_, digest=digest_of(self.load.blobs[hash_]))
        client.put_action_result(action, result)
        self.load.results[action.hash] = action, result

    def _read(self, client: ReapiClient) -> None:
        if self.load.acknowledged:
            data = self.load.blobs[self._random.choice(sorted(self.load.acknowledged))]
            assert client.read_stream(digest_of(data)) == data, "bytes that were never written"


class CasUnderLoad:
    """A CAS process over one data directory."""

    def __init__(self, root: Path, name: str, limit_bytes: int, processes: int = 1) -> None:
        self.data_dir = root / name
        self.port, http_port = free_ports(2)
        flags = [
            f"--host={HOST}",
            f"--port={self.port}",
            f"--http-port={http_port}",
            f"--data-dir={self.data_dir}",
            f"--max-size-bytes={limit_bytes}",
            "--lease-seconds=0",
            f"--processes={processes}",
        ]
        self.process = ServiceProcess(name, "lathe-cas", flags, http_port, root / f"{name}.log")

    def run_until_killed(self, seed: str) -> Load:
        """Put it under load and kill it; return what its clients did."""
        begun = threading.Semaphore(0)
        clients = [Client(self.port, f"{seed} {number}", begun) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for _ in range(random.Random(seed).randrange(1, LARGEST_DELAY_OPERATIONS)):
            assert begun.acquire(timeout=20), [client.load.trouble for client in clients]
        self.process.kill()
        for client in clients:
            client.stop()
        total = Load()
        for client in clients:
            client.join(60)
            assert not client.is_alive()
            total.blobs |= client.load.blobs
            total.acknowledged |= client.load.acknowledged
            total.results |= client.load.results
            total.trouble += client.load.trouble
        assert total.trouble == []
        return total

    def start(self) -> None:
        self.process.start()
        self.process.wait_healthy()

    def check(self, load: Load, *, results: bool) -> None:
        """Look at what the kill left: with fsck, then as a client of the next process, which stays."""
        assert fsck([f"--data-dir={self.data_dir}"], {}) == 0
        self.start()
        with ReapiClient(self.port, self.port) as client:
            missing = {digest.hash for digest in client.missing(*map(digest_of, load.blobs.values()))}
            assert missing & load.acknowledged == set(), "acknowledged, and lost"
            for hash_, data in load.blobs.items():
                if hash_ not in missing:
                    assert client.read_stream(digest_of(data)) == data, "part of a blob"
            for action, result in load.results.values():
                found = client.action_result(action)
                assert found == result or (found is None and not results)


@pytest.fixture
def ample(tmp_path: Path) -> Iterator[CasUnderLoad]:
    """A CAS that never evicts: all that was acknowledged must be there."""
    cas = CasUnderLoad(tmp_path, "ample", AMPLE_BYTES)
    cas.start()
    yield cas
    cas.process.discard()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[CasUnderLoad]:
    """A CAS that evicts all the time."""
    cas = CasUnderLoad(tmp_path, "small", SMALL_BYTES)
    cas.start()
    yield cas
    cas.process.discard()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[CasUnderLoad]:
    """Several processes over one store."""
    cas = CasUnderLoad(tmp_path, "shared", AMPLE_BYTES, processes=3)
    cas.start()
    yield cas
    cas.process.discard()


def test_nothing_that_several_processes_acknowledged_is_lost(shared: CasUnderLoad) -> None:
    for kill in range(KILLS // 4):
        shared.check(shared.run_until_killed(f"shared {kill}"), results=True)


def test_nothing_acknowledged_is_lost(ample: CasUnderLoad) -> None:
    everything = Load()
    for kill in range(KILLS - KILLS // 2):
        load = ample.run_until_killed(f"ample {kill}")
        ample.check(load, results=True)
        everything.acknowledged |= load.acknowledged
        everything.blobs |= {hash_: load.blobs[hash_] for hash_ in load.acknowledged}
        everything.results |= load.results
    assert everything.results
    ample.process.kill()
    ample.check(everything, results=True)


def test_nothing_acknowledged_is_lost_beside_eviction(small: CasUnderLoad) -> None:
    evicted = 0.0
    for kill in range(KILLS // 2):
        load = small.run_until_killed(f"small {kill}")
        # A result may have been evicted: those of a step go before its blobs.
        small.check(load, results=False)
        with ReapiClient(small.port, small.port) as client:
            client.upload(*[random.Random(f"{kill} {number}").randbytes(90_000) for number in range(40)])
        evicted += small.process.metrics().total("lathe_cas_evicted_blobs_total")
    assert evicted > 0
