"""What is asked of a compose stack under either docker-compose."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.support.bazel import Bazel, BazelResult, RunningBazel
from tests.support.compose_stack import SERVICES, WORKER_HTTP_PORT, ComposeStack, docker, inspect
from tests.support.probe import Probe
from tests.support.waiting import eventually

WORKER_DATA = "/var/lib/lathe/worker"
# Argument of `sleep` by which the processes are found that an action left behind; not that of the end-to-end tests.
MARK = "87124.75"
# Far enough into a build to have results, far enough from its end to have work left.
ACTIONS_BEFORE_THE_BLOW = 8


def check_hardening(stack: ComposeStack) -> None:
    """Look at what the engine lets each container do."""
    for service in SERVICES:
        for container in stack.containers(service):
            found = inspect(container)
            host = found["HostConfig"]
            assert not host["Privileged"]
            assert host["CapDrop"] == ["ALL"]
            assert not host["CapAdd"]
            assert host["ReadonlyRootfs"]
            assert "no-new-privileges:true" in host["SecurityOpt"]
            assert host["RestartPolicy"]["Name"] == "unless-stopped"
            assert host["Init"]
            assert found["Config"]["User"] == "10001:10001"
            # The kernel's own word on a process in there.
            status = stack.execute(container, "cat", "/proc/self/status")
            facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert {facts[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    published = docker("ps", "--filter=label=com.docker.compose.service=lathe_scheduler", "--format={{.Ports}}").stdout
    assert "->50052/tcp" in published
    assert "->50061/tcp" not in published, "the workers' port is not for others"


def check_containment(stack: ComposeStack, bazel: Bazel, probe: Probe, *, own_proc: bool) -> None:
    """Have actions try what they must not be able to do.

    Args:
        stack: Where they run.
        bazel: The client.
        probe: In a workspace whose script names the worker's port and data.
        own_proc: Whether actions have a /proc of their own.
    """
    worker = stack.containers("lathe_worker")[0]
    before = probe.run("look_at_input")
    assert before[0] == "the input as it was"
    for change in ("rewrite_input", "replace_input", "chmod_input"):
        probe.run(change)
    bazel.clean()
    assert probe.run("look_at_input") == before

    connect = f"exec 3<> /dev/tcp/127.0.0.1/{WORKER_HTTP_PORT} && echo done"
    assert stack.execute(worker, "bash", "-c", connect) == "done\n", "somebody listens there"
    assert probe.run("network")[0] == "connect: refused"

    assert stack.execute(worker, "sh", "-c", f"find {WORKER_DATA} -type f | head -n 1"), "there is something to read"
    assert probe.run("read_worker") == ["list: refused", "write: refused", "files: 0"]

    outside = stack.execute(worker, "sh", "-c", f"ls -d /proc/[0-9]*/root{WORKER_DATA} | wc -l")
    assert int(outside) > 1, "/proc leads there for those who are not contained"
    inside = probe.run("look_into_processes")
    assert inside[:2] == ["worker files: 0", "environments: 0"]
    assert own_proc or inside[2] == "write to pid 1: refused", "in a /proc of its own that is the action's"
    assert inside[3] == "self: /usr/bin/readlink", "what dynamic linking by $ORIGIN needs"

    assert probe.run("write_outside")[:2] == ["write to /usr: refused", "write to /etc: refused"]
    assert "lathe_probe" not in stack.execute(worker, "ls", "/tmp")

    assert probe.run("daemon") == ["started"]


def build_meanwhile(stack: ComposeStack, bazel: Bazel, name: str, change: Callable[[], None]) -> list[BazelResult]:
    """Have a build under way at every moment of a change to the stack.

    Builds follow each other, each compiling everything again, until the change is over.

    Args:
        stack: Where they run.
        bazel: The client.
        name: What these builds have in common with no others of this client, an identifier.
        change: What happens to the stack meanwhile; begins when the first build is well under way.

    Returns:
        The builds' results, whatever they are.
    """
    results: list[BazelResult] = []
    with ThreadPoolExecutor(1) as beside:
        build = _start_afresh(bazel, name, 0)
        _wait_under_way(stack, build)
        changing = beside.submit(change)
        results.append(build.wait())
        while not changing.done():
            results.append(_start_afresh(bazel, name, len(results)).wait())
        changing.result()
    return results


def _start_afresh(bazel: Bazel, name: str, number: int) -> RunningBazel:
    """Start a build that no cache knows."""
    return bazel.start("build", f"--copt=-D{name}={number}", "//libs/...", "//apps/...")


def _wait_under_way(stack: ComposeStack, build: RunningBazel) -> None:
    before = stack.scheduler_metrics().total("lathe_scheduler_actions_completed_total")

    def under_way() -> bool:
        metrics = stack.scheduler_metrics()
        completed = metrics.total("lathe_scheduler_actions_completed_total") - before
        return completed >= ACTIONS_BEFORE_THE_BLOW and metrics.total("lathe_scheduler_actions_executing") > 0

    eventually(under_way, "the build is under way")
    assert build.running


def check_removed(stack: ComposeStack) -> None:
    """Take the stack down with its volumes and look for what is left of it."""
    assert stack.remains()
    anonymous = set(docker("volume", "ls", "-q").stdout.split())
    stack.down("--volumes")
    assert stack.remains() == []
    assert set(docker("volume", "ls", "-q").stdout.split()) <= anonymous
    assert stack.authority.is_file(), "the cache in LATHE_DIR is the operator's, not the engine's"
