"""What is asked of a compose stack under either docker-compose."""

from __future__ import annotations

from tests.support.bazel import Bazel, RunningBazel
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


def start_in_the_middle(stack: ComposeStack, bazel: Bazel) -> RunningBazel:
    """Start a build and return when it is well under way."""
    bazel.build("--nobuild", "//libs/...", "//apps/...")
    before = stack.scheduler_metrics().total("lathe_scheduler_actions_completed_total")
    build = bazel.start("build", "//libs/...", "//apps/...")

    def under_way() -> bool:
        metrics = stack.scheduler_metrics()
        completed = metrics.total("lathe_scheduler_actions_completed_total") - before
        return completed >= ACTIONS_BEFORE_THE_BLOW and metrics.total("lathe_scheduler_actions_executing") > 0

    eventually(under_way, "the build is under way")
    assert build.running
    return build


def check_removed(stack: ComposeStack) -> None:
    """Take the stack down with its volumes and look for what is left of it."""
    assert stack.remains()
    anonymous = set(docker("volume", "ls", "-q").stdout.split())
    stack.down("--volumes")
    assert stack.remains() == []
    assert set(docker("volume", "ls", "-q").stdout.split()) <= anonymous
    assert stack.authority.is_file(), "the cache in LATHE_DIR is the operator's, not the engine's"
