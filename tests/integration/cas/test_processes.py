"""Several processes serve one store as if they were one, and outlive one another."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.support.reapi_client import ReapiClient, digest_of, reapi_message
from tests.support.service_process import HOST, ServiceProcess, free_ports
from tests.support.waiting import eventually

from lathe_cas.stores.lmdb_environment import LmdbEnvironment

PROCESSES = 3
MAX_CONNECTIONS = 200
DIGEST_COUNTER = "lathe_cas_digests_asked_for_total"

# The classes of messages are made at the first use, which must not happen in several threads at once.
digest_of(b"")


class Group:
    """A CAS of several processes.

    Args:
        root: For its data and its log.
        flags: Beside those that it needs.
    """

    def __init__(self, root: Path, *flags: str) -> None:
        self.port, self.http_port = free_ports(2)
        self.log = root / "log"
        self.flags = [
            f"--host={HOST}",
            f"--port={self.port}",
            f"--http-port={self.http_port}",
            f"--data-dir={root / 'data'}",
            f"--processes={PROCESSES}",
            *flags,
        ]
        self.process = ServiceProcess("cas", "lathe-cas", self.flags, self.http_port, self.log)
        self._clients = contextlib.ExitStack()

    def __enter__(self) -> Group:
        self.process.start()
        self.process.wait_healthy()
        eventually(lambda: len(self.events("process_ready")) == PROCESSES, "all processes are ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._clients.close()
        self.process.discard()

    def events(self, name: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def pids(self) -> dict[int, int]:
        """Return the process id of each process that was started last, by its number."""
        return {int(str(event["process"])): int(str(event["pid"])) for event in self.events("process_ready")}

    def client(self) -> ReapiClient:
        return self._clients.enter_context(ReapiClient(self.port, self.port, own_connection=True))

    def one_client_each(self) -> list[ReapiClient]:
        """Connect until every process has a client; return one of each, in the order of their numbers."""
        clients: dict[int, ReapiClient] = {}
        for _ in range(MAX_CONNECTIONS):
            before = self.asked()
            client = self.client()
            client.missing(digest_of(b"nobody has this"))
            after = self.asked()
            (number,) = (number for number in range(PROCESSES) if after[number] > before[number])
            clients[number] = client
            if len(clients) == PROCESSES:
                return [clients[number] for number in range(PROCESSES)]
        raise AssertionError(f"{MAX_CONNECTIONS} connections, and all of them to {clients.keys()}")

    def asked(self) -> list[float]:
        metrics = self.process.metrics()
        return [metrics.total(DIGEST_COUNTER, process=str(number)) for number in range(PROCESSES)]

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection(HOST, self.http_port, timeout=10.0)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    with Group(tmp_path) as group:
        yield group


def test_what_one_acknowledges_all_have(group: Group) -> None:
    clients = group.one_client_each()
    rng = random.Random(1)
    for size in (10, 100_000, 3_000_000):
        for writer in clients:
            data = rng.randbytes(size)
            digest = writer.write(data)
            for reader in clients:
                assert reader.missing(digest) == []
                assert reader.read_stream(digest) == data
            action = digest_of(rng.randbytes(10))
            result = reapi_message("ActionResult", exit_code=3)
            result.output_files.add(path="out", digest=digest)
            writer.put_action_result(action, result)
            assert [reader.action_result(action) for reader in clients] == [result] * PROCESSES


def test_an_upload_goes_on_in_another_process(group: Group) -> None:
    first, second, third = group.one_client_each()
    data = random.Random(2).randbytes(5_000_000)
    upload_id = str(uuid.uuid4())
    committed = first.write_part(data, upload_id, 0, 3_000_000)
    assert committed == 3_000_000
    assert {client.write_status(data, upload_id) for client in (first, second, third)} == {(committed, False)}
    assert second.write_part(data, upload_id, committed, len(data)) == len(data)
    assert third.read_stream(digest_of(data)) == data
    assert first.write_status(data, upload_id) == (len(data), True)


def test_whoever_is_asked_speaks_for_all(group: Group) -> None:
    clients = group.one_client_each()
    digests = [client.write(bytes([number]) * 1000) for number, client in enumerate(clients)]
    asked = sum(group.asked())
    for number, client in enumerate(clients):
        client.missing(*digests * (number + 1))
    # As often as it takes for each of them to have been asked, most likely.
    for _ in range(12):
        metrics = group.process.metrics()
        assert metrics.total(DIGEST_COUNTER) == asked + 3 + 6 + 9
        assert metrics.total("lathe_cas_blobs") == 3, "they share them"
        assert metrics.total("lathe_cas_written_blobs_total") == 3
        assert [metrics.total("lathe_cas_written_blobs_total", process=str(n)) for n in range(PROCESSES)] == [1, 1, 1]
        text = group.get("/metrics")
        assert text.count("# TYPE lathe_cas_written_blobs_total ") == 1
        status = json.loads(group.get("/status"))
        assert status["processes"] == status["answering_processes"] == PROCESSES
        assert status["since_start"]["digests_asked_for"] == asked + 3 + 6 + 9
        assert status["store"]["blobs"] == 3


def test_a_temporary_folder_with_a_long_path_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / ("long" * 50)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with Group(tmp_path) as group:
        assert len(list(temporary.iterdir())) == 1
        assert json.loads(group.get("/status"))["answering_processes"] == PROCESSES
        os.kill(group.pids()[0], signal.SIGKILL)
        eventually(lambda: len(group.events("process_ready")) == PROCESSES + 1, "another one is ready")
        assert json.loads(group.get("/status"))["answering_processes"] == PROCESSES
        group.process.stop()
    assert list(temporary.iterdir()) == []


def test_one_that_is_killed_is_followed_by_another_and_the_rest_go_on(group: Group) -> None:
    """Also when it is killed in the middle of a transaction, which the others then find unfinished."""
    rng = random.Random(3)
    stopped = threading.Event()
    acknowledged: list[bytes] = []
    trouble: list[str] = []

    def work(seed: int) -> None:
        mine = random.Random(seed)
        client = group.client()
        while not stopped.is_set():
            data = mine.randbytes(mine.choice([100, 70_000, 1_500_000]))
            try:
                client.write(data)
                acknowledged.append(data)
                assert client.missing(digest_of(data)) == []
            except grpc.RpcError as error:
                if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
                    trouble.append(repr(error))
                    return
            except AssertionError as error:
                trouble.append(repr(error))
                return

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    keeper = group.process.pid
    for kill in range(1, 6):
        count = len(acknowledged)
        eventually(lambda count=count: len(acknowledged) > count + rng.randrange(5, 20), "they work")  # type: ignore[misc]
        os.kill(rng.choice(list(group.pids().values())), signal.SIGKILL)
        eventually(
            lambda kill=kill: len(group.events("process_ready")) == PROCESSES + kill,  # type: ignore[misc]
            "another one takes its place",
        )
    count = len(acknowledged)
    eventually(lambda: len(acknowledged) > count + 20, "they still work")
    stopped.set()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert trouble == []
    assert group.process.pid == keeper
    assert [event["code"] for event in group.events("process_ended")] == [-signal.SIGKILL] * 5
    for client in group.one_client_each():
        assert client.missing(*map(digest_of, acknowledged)) == []
    pids = group.pids().values()
    assert group.process.stop() == 0
    assert not any(map(is_running, pids))


def test_connections_wait_for_the_next_process(group: Group) -> None:
    """Nobody is refused while a process is started anew: its sockets stay, and with them who connects."""
    for pid in group.pids().values():
        os.kill(pid, signal.SIGKILL)
    clients = [group.client() for _ in range(10)]
    assert [len(client.missing(digest_of(b"nobody has this"))) for client in clients] == [1] * 10


def test_a_keeper_without_descriptors_tries_again_and_the_rest_go_on(group: Group) -> None:
    keeper = group.process.pid
    clients = group.one_client_each()
    # The lowest free descriptor is the first one that the limit forbids.
    used = {int(name) for name in os.listdir(f"/proc/{keeper}/fd")}
    first_free = min(set(range(len(used) + 1)) - used)
    _, hard = resource.prlimit(keeper, resource.RLIMIT_NOFILE)
    before = resource.prlimit(keeper, resource.RLIMIT_NOFILE, (first_free, hard))
    os.kill(group.pids()[0], signal.SIGKILL)
    eventually(lambda: group.events("process_not_started") != [], "it cannot be started")
    data = os.urandom(1000)
    clients[1].write(data)
    assert clients[2].missing(digest_of(data)) == []
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, before)
    eventually(lambda: len(group.events("process_ready")) == PROCESSES + 1, "another one takes its place")
    for client in group.one_client_each():
        assert client.missing(digest_of(data)) == []
    assert group.process.stop() == 0


def test_nothing_is_left_when_the_keeper_is_killed(group: Group) -> None:
    pids = group.pids().values()
    os.kill(group.process.pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_running, pids)), "they end with it")


def test_a_second_signal_ends_all_at_once(group: Group) -> None:
    client = group.client()
    call = client.start_half_a_write(bytes(1_000_000))
    eventually(lambda: group.process.metrics().total("lathe_cas_received_bytes_total") > 400_000, "it has begun")
    pids = group.pids().values()
    os.kill(group.process.pid, signal.SIGTERM)
    eventually(lambda: group.events("draining") != [], "the stop has begun")
    os.kill(group.process.pid, signal.SIGTERM)
    eventually(lambda: not any(map(is_running, pids)), "they are gone, drained or not")
    assert [event["signal"] for event in group.events("killed")] == ["SIGTERM"]
    assert call.exception() is not None


def run(flags: list[str]) -> subprocess.CompletedProcess[str]:
    process = ServiceProcess("cas", "lathe-cas", flags, 0, Path(os.devnull))
    return subprocess.run(process.command, capture_output=True, text=True, timeout=60, check=False)


def test_another_service_on_the_port_is_not_joined(group: Group, tmp_path: Path) -> None:
    """Two groups that share a port would each get a part of the other's clients."""
    flags = [f"--data-dir={tmp_path / 'other'}", f"--http-port={free_ports(1)[0]}"]
    for processes in (1, 2):
        ended = run([*group.flags, *flags, f"--processes={processes}"])
        assert ended.returncode == 1
        assert f"cannot listen on {HOST}:{group.port} (grpc): address already in use" in ended.stderr


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        ended = run([f"--host={HOST}", f"--port={port}", "--http-port=0", f"--data-dir={tmp_path}", "--processes=2"])
    assert ended.returncode == 1
    assert ended.stderr == f"lathe-cas: cannot listen on {HOST}:{port} (grpc): address already in use\n"


def test_a_store_that_cannot_be_used_is_refused_once(tmp_path: Path) -> None:
    environment = LmdbEnvironment(tmp_path, 1 << 30)
    with environment.env.begin(write=True) as txn:
        txn.put(b"format", (99).to_bytes(4, "big"), db=environment.meta)
    environment.close()
    ended = run([f"--host={HOST}", "--port=0", "--http-port=0", f"--data-dir={tmp_path}", "--processes=2"])
    assert ended.returncode == 1
    assert ended.stderr.count("holds a store of format 99") == 1


def test_what_only_the_processes_find_out_stops_all(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    (tmp_path / "certificate").write_text("no certificate")
    ended = run(
        [
            f"--host={HOST}",
            "--port=0",
            "--http-port=0",
            f"--data-dir={tmp_path / 'data'}",
            "--processes=2",
            "--tls-port=0",
            f"--tls-certificate={tmp_path / 'certificate'}",
            f"--tls-key={tmp_path / 'key'}",
        ]
    )
    assert ended.returncode == 1
    assert "is not a certificate in PEM form" in ended.stderr
