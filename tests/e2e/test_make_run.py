"""``make run`` as a user meets it: the ready line, the restart of a dead service, the stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.required import require_programs
from tests.support.service_process import free_ports
from tests.support.waiting import eventually
from tools.run_settings import VARIABLES

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 10.0


@dataclass
class MakeRun:
    """A started ``make run`` with ports and a data directory of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    ports: dict[str, int]
    data_dir: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.output
            return any(line.startswith("lathe is ready") for line in self.output.splitlines())

        eventually(ready, "make run is ready")

    def service_pids(self) -> dict[str, int]:
        """Find the services by the data directory and the ports in their command lines."""
        marks = {
            "cas": f"--data-dir={self.data_dir}/cas",
            "scheduler": f"--port={self.ports['LATHE_SCHEDULER_PORT']}",
            "worker-1": f"--data-dir={self.data_dir}/worker-1",
        }
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_text().split("\0")
            except OSError:  # ended while we looked
                continue
            found.update({name: int(folder.name) for name, mark in marks.items() if mark in arguments})
        return found

    def stop(self) -> int:
        """End it as a terminal or an init system would, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


StartRun = Callable[..., MakeRun]


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[StartRun]:
    require_programs("make", "bwrap")
    ports = [name for name in VARIABLES if name.endswith("_PORT")]
    numbers = dict(zip(ports, free_ports(len(ports)), strict=True))
    runs: list[MakeRun] = []

    def start(*, data_dir: Path = tmp_path / "data", **changes: str) -> MakeRun:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LATHE_", "MAKE"))}
        variables = {"LATHE_DATA_DIR": str(data_dir), **{name: str(port) for name, port in numbers.items()}, **changes}
        log = tmp_path / f"run_{len(runs)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["make", "run"],
                cwd=ROOT,
                env=kept | variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        runs.append(MakeRun(process, log, numbers, data_dir))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait()


def test_prints_the_flags_and_stops_cleanly(start_run: StartRun) -> None:
    began = time.monotonic()
    run = start_run()
    run.wait_ready()
    print(f"ready after {time.monotonic() - began:.1f} s")
    ports = run.ports
    for flag in (
        "--remote_instance_name=main",
        f"--remote_cache=grpc://127.0.0.1:{ports['LATHE_CAS_PORT']}",
        f"--remote_executor=grpc://127.0.0.1:{ports['LATHE_SCHEDULER_PORT']}",
        "--remote_default_exec_properties=cpu_count=1",
    ):
        assert flag in run.output
    values = f"http://127.0.0.1:{ports['LATHE_CAS_HTTP_PORT']}/cache/"
    assert values in run.output
    put = urllib.request.Request(values + "key", data=b"a value", method="PUT")
    with urllib.request.urlopen(put), urllib.request.urlopen(values + "key") as found:
        assert found.read() == b"a value"
    pids = run.service_pids()
    assert set(pids) == {"cas", "scheduler", "worker-1"}
    # GNU make waits for its command, then dies of the signal itself; the command's own exit code is the next test's.
    assert run.stop() in (0, -signal.SIGTERM), run.output
    assert run.service_pids() == {}
    assert "killing it" not in run.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_behind_make_exits_with_0(start_run: StartRun, number: signal.Signals) -> None:
    run = start_run()
    run.wait_ready()
    os.kill(_only_child(run.process.pid), number)
    assert run.process.wait(STOP_SECONDS) == 0, run.output
    assert run.service_pids() == {}


def test_starts_a_dead_service_again_and_says_so(start_run: StartRun) -> None:
    run = start_run()
    run.wait_ready()
    before = run.service_pids()
    os.kill(before["scheduler"], signal.SIGKILL)
    eventually(lambda: "scheduler is healthy again" in run.output, "the scheduler is back")
    after = run.service_pids()
    assert after["scheduler"] != before["scheduler"]
    assert {name: after[name] for name in ("cas", "worker-1")} == {name: before[name] for name in ("cas", "worker-1")}
    assert "scheduler was ended by SIGKILL" in run.output


def test_leaves_no_service_when_it_is_killed_itself(start_run: StartRun) -> None:
    run = start_run()
    run.wait_ready()
    os.kill(_only_child(run.process.pid), signal.SIGKILL)
    run.process.wait(STOP_SECONDS)
    eventually(lambda: run.service_pids() == {}, "no service is left")


def test_names_the_variable_of_a_port_in_use(start_run: StartRun, tmp_path: Path) -> None:
    start_run().wait_ready()
    second = start_run(data_dir=tmp_path / "other")
    assert second.process.wait(STOP_SECONDS) != 0
    assert re.search(r"port \d+ on 127\.0\.0\.1 .*in use", second.output)
    assert re.search(r"LATHE_\w+_PORT=PORT make run", second.output)


def test_refuses_a_data_directory_in_use(start_run: StartRun) -> None:
    first = start_run()
    first.wait_ready()
    second = start_run()
    assert second.process.wait(STOP_SECONDS) != 0
    assert f"{first.data_dir} is in use by another `make run`" in second.output


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("LATHE_CAS_PORT", "no port", "whole number from 1 to 65535"),
        ("LATHE_WORKERS", "-1", "whole number from 0 to 1000"),
        ("LATHE_DATA_DIR", "/dev/null/below", "cannot be used"),
    ],
)
def test_refuses_a_bad_variable_by_name(start_run: StartRun, variable: str, value: str, complaint: str) -> None:
    run = start_run(**{variable: value})
    assert run.process.wait(STOP_SECONDS) != 0
    assert variable in run.output
    assert complaint in run.output


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])
