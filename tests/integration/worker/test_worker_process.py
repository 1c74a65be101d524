"""The worker as a process: its settings, its conversation over gRPC, its start and its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.integration.worker.fake_scheduler import FakeScheduler
from tests.integration.worker.processes import processes_with
from tests.support.probe import processes_with as processes_by_argument
from tests.support.required import require_programs
from tests.support.waiting import eventually

from lathe_protos import reapi, worker_v1
from lathe_shared.clients.rpc_client import RetryPolicy
from lathe_shared.digest import Digest
from lathe_shared.errors import UnavailableError
from lathe_shared.testing.builders import BlobSet
from lathe_shared.testing.fake_cas import FakeCas
from lathe_shared.testing.serving import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_SECONDS = 30.0
NOBODY = 54321
"""A user without any rights, to run a worker as."""

CHECKOUT = Path(__file__).parents[3]
CHECKOUT_FOR_ALL = "/mnt"
"""Where everybody sees the checkout in a mount namespace of its own: it may lie in root's home directory."""


@dataclass(frozen=True)
class Command:
    """A way to start the worker."""

    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


OWN_COMMAND = Command((str(Path(sys.executable).parent / "lathe-worker"),))


def unprivileged_command() -> Command:
    """Return how to start the worker as a user without rights.

    That user may be kept from this checkout, and from this interpreter, if they lie in root's home directory. The one
    is shown elsewhere; for the other, one of the same version that the machine has for all will do.
    """
    if os.geteuid() != 0:
        return OWN_COMMAND
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = [path for path in sys.path if path.endswith("site-packages") or "/src" in path]
    paths = [path.replace(str(CHECKOUT), CHECKOUT_FOR_ALL) for path in libraries]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"}
    show = 'mount --bind "$0" "$1"; shift; exec "$@"'
    shown = ("unshare", "--mount", "--", "sh", "-euc", show, str(CHECKOUT), CHECKOUT_FOR_ALL)
    prefix = (*shown, "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
    for interpreter in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        argv = (*prefix, interpreter, "-m", "lathe_worker")
        if Path(interpreter).exists():
            found = subprocess.run([*argv, "--version"], env=environment, capture_output=True, check=False)
            if found.returncode == 0:
                return Command(argv, environment)
    require_programs(f"{version} for all users")
    raise AssertionError


@dataclass
class WorkerProcess:
    """A running ``lathe-worker``."""

    process: asyncio.subprocess.Process
    log: list[dict[str, Any]] = field(default_factory=list)

    async def logged(self, event: str) -> dict[str, Any]:
        """Read the log up to an event."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT_SECONDS):
            while line := await self.process.stdout.readline():
                self.log.append(json.loads(line))
                if self.log[-1]["event"] == event:
                    return self.log[-1]
        raise AssertionError(f"it ended without {event}: {self.log}")

    async def status(self, port: int) -> dict[str, Any]:
        def fetch() -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=WAIT_SECONDS) as answer:
                return json.load(answer)

        result: dict[str, Any] = await asyncio.to_thread(fetch)
        return result

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(WAIT_SECONDS):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@dataclass
class Surroundings:
    """A scheduler and a CAS for workers to connect to."""

    scheduler: FakeScheduler
    cas: FakeCas
    scheduler_endpoint: str
    cas_endpoint: str
    directory: Path

    @contextlib.asynccontextmanager
    async def worker(self, *flags: str, command: Command = OWN_COMMAND) -> AsyncIterator[WorkerProcess]:
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            f"--scheduler-endpoint={self.scheduler_endpoint}",
            f"--cas-endpoint={self.cas_endpoint}",
            f"--data-dir={self.directory}",
            "--host=127.0.0.1",
            "--http-port=0",
            "--worker-name=tested",
            *flags,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"],
                "LATHE_WORKER_SLOTS": "2",
                "SECRET": "of the worker",
                **command.environment,
            },
        )
        worker = WorkerProcess(process)
        try:
            yield worker
        finally:
            if process.returncode is None:
                await worker.stop(signal.SIGKILL)

    def put(self, *arguments: str, **options: Any) -> tuple[Digest, dict[Digest, bytes]]:
        blobs = BlobSet()
        digest = blobs.action(arguments, **options)
        for data in blobs.blobs.values():
            self.cas.put(data)
        return digest, blobs.blobs


@pytest.fixture
async def surroundings(tmp_path: Path) -> AsyncIterator[Surroundings]:
    """Data lies in pytest's closed directory: a worker that is root must cope with that."""
    require_programs("bwrap")
    scheduler, cas = FakeScheduler(), FakeCas()
    async with serve([scheduler]) as first, serve(cas.servicers()) as second:
        yield Surroundings(scheduler, cas, str(first), str(second), tmp_path / "data")


async def test_a_worker_registers_runs_an_action_and_leaves_when_asked(surroundings: Surroundings) -> None:
    scheduler = surroundings.scheduler
    blobs = BlobSet()
    root = blobs.directory({"in/a": b"a", "in/tool": (b"#!/bin/sh\ncat in/a; env", True)})
    for data in blobs.blobs.values():
        surroundings.cas.put(data)
    digest, stored = surroundings.put("sh", "-c", "in/tool > out", input_root=root, output_paths=["out"])
    async with surroundings.worker("--properties", '{"OS": "linux", "tools": {"command": "echo a; echo b"}}') as worker:
        ready = await worker.logged("ready")
        register = await scheduler.hear("register")
        assert register.worker_id.startswith("tested-")
        assert register.slots == 2
        offered = [(item.name, item.value) for item in register.properties]
        assert offered[1:] == [("OS", "linux"), ("tools", "a"), ("tools", "b")]
        assert offered[0][0] == "cpu_count"
        assert int(offered[0][1]) >= 1

        scheduler.start("l1", digest, stored)
        assert (await scheduler.hear("action_started")).lease_id == "l1"
        finished = await scheduler.hear("action_finished")
        status = await worker.status(ready["http_port"])
        code = await worker.stop()

    response = reapi.ExecuteResponse().parse(finished.execute_response)
    assert response.status.code == 0
    assert response.result.execution_metadata.worker == "tested"
    output = surroundings.cas.get(Digest.from_message(response.result.output_files[0].digest))
    assert output is not None
    assert output.startswith(b"a")
    assert b"SECRET" not in output
    assert b"LATHE" not in output
    assert surroundings.cas.calls["UpdateActionResult"] == 1
    assert status["sandbox"].startswith("bubblewrap")
    assert status["cache"]["files"] == 2
    assert status["scheduler"]["registered"] is True
    assert code == 0


async def end_sleep(mark: int) -> None:
    """End the `sleep` with this argument, for which an action waits, however long it has taken to begin."""
    await asyncio.to_thread(eventually, lambda: processes_by_argument(str(mark)) != [], "the action waits")
    for pid in processes_by_argument(str(mark)):
        os.kill(pid, signal.SIGKILL)


async def test_a_terminated_worker_finishes_what_it_runs(surroundings: Surroundings) -> None:
    scheduler = surroundings.scheduler
    mark = os.getpid() * 10**6 + 4712
    digest, stored = surroundings.put("sh", "-c", f"sleep {mark}; echo ended")
    async with surroundings.worker("--drain-seconds=20") as worker:
        await scheduler.hear("register")
        scheduler.start("l1", digest, stored)
        await scheduler.hear("action_started")
        worker.process.send_signal(signal.SIGTERM)
        await scheduler.hear("draining")
        await end_sleep(mark)
        finished = await scheduler.hear("action_finished")
        async with asyncio.timeout(WAIT_SECONDS):
            await worker.process.communicate()

    assert reapi.ExecuteResponse().parse(finished.execute_response).result.stdout_raw == b"ended\n"
    assert worker.process.returncode == 0


async def test_an_action_outlives_its_connection_and_is_reported_on_the_next(surroundings: Surroundings) -> None:
    scheduler = surroundings.scheduler
    mark = os.getpid() * 10**6 + 4713
    digest, stored = surroundings.put("sh", "-c", f"sleep {mark}; echo ended")
    async with surroundings.worker() as worker:
        first = await scheduler.hear("register")
        scheduler.start("l1", digest, stored)
        await scheduler.hear("action_started")
        scheduler.hang_up()
        second = await scheduler.hear("register")
        assert second.worker_id == first.worker_id
        assert [held.lease_id for held in second.held] == ["l1"]
        assert (await scheduler.hear("action_started")).lease_id == "l1"
        await end_sleep(mark)
        finished = await scheduler.hear("action_finished")
        assert await worker.stop() == 0

    assert finished.lease_id == "l1"
    assert reapi.ExecuteResponse().parse(finished.execute_response).result.stdout_raw == b"ended\n"


async def test_an_action_outwaits_a_storage_that_is_away_and_runs_once(
    surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More tries than other clients make; which is what a restart of some seconds takes.
    tries_in_vain = RetryPolicy().attempts + 2
    get, calls = surroundings.cas.get, itertools.count(1)

    def away_at_first(digest: Digest) -> bytes | None:
        if next(calls) <= tries_in_vain:
            raise UnavailableError("away")
        return get(digest)

    monkeypatch.setattr(surroundings.cas, "get", away_at_first)
    scheduler = surroundings.scheduler
    digest, stored = surroundings.put("sh", "-c", "echo made > out", output_paths=["out"])
    async with surroundings.worker():
        await scheduler.hear("register")
        scheduler.start("l1", digest, stored)
        finished = await scheduler.hear_until("action_finished")

    assert next(calls) > tries_in_vain
    assert not finished.worker_fault
    assert reapi.ExecuteResponse().parse(finished.execute_response).status.code == 0


async def test_a_cancelled_action_is_reported_as_such(surroundings: Surroundings) -> None:
    scheduler = surroundings.scheduler
    digest, stored = surroundings.put("sleep", "100000")
    async with surroundings.worker() as worker:
        await scheduler.hear("register")
        scheduler.start("l1", digest, stored)
        await scheduler.hear("action_started")
        scheduler.say(cancel_action=worker_v1.CancelAction(lease_id="l1", reason="the client has gone"))
        finished = await scheduler.hear("action_finished")
        scheduler.start("never began", digest, stored)
        scheduler.say(cancel_action=worker_v1.CancelAction(lease_id="never began", reason="changed its mind"))
        heard = await scheduler.hear_until("action_finished")
        assert await worker.stop() == 0

    for message, reason in ((finished, "the client has gone"), (heard, "changed its mind")):
        response = reapi.ExecuteResponse().parse(message.execute_response)
        assert (response.status.code, response.status.message) == (1, reason)
        assert not message.worker_fault


async def test_a_killed_worker_takes_its_actions_with_it(surroundings: Surroundings) -> None:
    scheduler = surroundings.scheduler
    mark = str(os.getpid() * 10**6 + 4711)
    digest, stored = surroundings.put("sh", "-c", f"setsid sleep {mark} & sleep {mark}")
    async with surroundings.worker() as worker:
        await scheduler.hear("register")
        scheduler.start("l1", digest, stored)
        await scheduler.hear("action_started")
        await asyncio.to_thread(eventually, lambda: processes_with(f"sleep\0{mark}") != [], "the action runs")
        await worker.stop(signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: processes_with(mark) == [], "the action is dead")
    async with surroundings.worker() as worker:
        await scheduler.hear_until("register")

        assert await worker.stop() == 0


async def test_two_workers_do_not_share_a_data_directory(surroundings: Surroundings) -> None:
    async with surroundings.worker() as first:
        await first.logged("ready")
        async with surroundings.worker() as second:
            async with asyncio.timeout(WAIT_SECONDS):
                _, stderr = await second.process.communicate()
        await first.stop()

    assert second.process.returncode == 1
    assert f"is in use by another worker (process {first.process.pid})".encode() in stderr


async def test_without_its_sandbox_a_worker_does_not_start(surroundings: Surroundings, tmp_path: Path) -> None:
    async with surroundings.worker("--sandbox=docker") as worker:
        async with asyncio.timeout(WAIT_SECONDS):
            _, stderr = await worker.process.communicate()
        assert worker.process.returncode == 2
        assert b"sandbox" in stderr
    async with surroundings.worker("--readable-paths=/etc") as worker:
        async with asyncio.timeout(WAIT_SECONDS):
            _, stderr = await worker.process.communicate()

    assert worker.process.returncode == 1
    assert b"add them to readable_paths" in stderr


async def test_a_property_whose_command_fails_is_refused_by_name(surroundings: Surroundings) -> None:
    async with surroundings.worker("--properties", '{"gpu": {"command": "echo none >&2; exit 3"}}') as worker:
        async with asyncio.timeout(WAIT_SECONDS):
            _, stderr = await worker.process.communicate()

    assert worker.process.returncode == 1
    assert b"properties.gpu" in stderr
    assert b"exit code 3: none" in stderr


async def test_no_sandbox_must_be_asked_for_and_is_said(surroundings: Surroundings) -> None:
    scheduler = surroundings.scheduler
    digest, stored = surroundings.put("sh", "-c", "echo $0; echo x > out", output_paths=["out"])
    async with surroundings.worker("--sandbox=none") as worker:
        ready = await worker.logged("ready")
        await scheduler.hear("register")
        scheduler.start("l1", digest, stored)
        await scheduler.hear("action_started")
        finished = await scheduler.hear("action_finished")
        status = await worker.status(ready["http_port"])
        assert await worker.stop() == 0

    response = reapi.ExecuteResponse().parse(finished.execute_response)
    assert response.result.stdout_raw == b"sh\n"
    assert [file.path for file in response.result.output_files] == ["out"]
    assert status["sandbox"].startswith("none")


async def test_an_unprivileged_worker_keeps_its_inputs_by_copying(
    surroundings: Surroundings, open_directory: Path
) -> None:
    command = unprivileged_command()
    surroundings.directory = open_directory / "data"
    surroundings.directory.mkdir()
    if os.geteuid() == 0:
        os.chown(surroundings.directory, NOBODY, NOBODY)
    scheduler = surroundings.scheduler
    script = (
        "chmod 0777 victim run; echo more >> victim; truncate -s 0 run; rm -f victim; echo new > victim;"
        f"id -u; ls -A {surroundings.directory} /root /home; echo x > out; mkdir -p d/e; chmod 0 d/e d"
    )
    blobs = BlobSet()
    root = blobs.directory({"victim": b"as it was", "run": (b"#!/bin/sh", True)})
    for data in blobs.blobs.values():
        surroundings.cas.put(data)
    digest, stored = surroundings.put("sh", "-c", script, input_root=root, output_paths=["out", "d"])
    async with surroundings.worker(command=command) as worker:
        await worker.logged("sandbox_ready")
        ready = await worker.logged("ready")
        await scheduler.hear("register")
        scheduler.start("l1", digest, stored)
        await scheduler.hear("action_started")
        finished = await scheduler.hear("action_finished")
        status = await worker.status(ready["http_port"])
        assert await worker.stop() == 0

    response = reapi.ExecuteResponse().parse(finished.execute_response)
    assert response.result.stdout_raw == f"{NOBODY if os.geteuid() == 0 else os.geteuid()}\n".encode()
    assert [file.path for file in response.result.output_files] == ["out"]
    assert [directory.path for directory in response.result.output_directories] == ["d"]
    assert status["sandbox"].endswith("the worker's uid")
    cached = {path.read_bytes(): path.stat() for path in (surroundings.directory / "cache").rglob("*-*")}
    assert {content: f"{found.st_mode & 0o777:o}" for content, found in cached.items()} == {
        b"as it was": "444",
        b"#!/bin/sh": "555",
    }
    assert {found.st_nlink for found in cached.values()} == {1}
    assert list((surroundings.directory / "work").iterdir()) == []
