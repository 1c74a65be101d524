"""Each image alone, as `docker run` starts it, with the least that it may have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.compose_stack import COMPOSE_FOLDER, docker, inspect
from tests.support.waiting import eventually

IMAGES = ("lathe-cas", "lathe-scheduler", "lathe-worker")
PROFILE = COMPOSE_FOLDER / "seccomp-worker.json"
HARDENED = ("--init", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
SANDBOX = (f"--security-opt=seccomp={PROFILE}", "--security-opt=apparmor=unconfined")
# Longer than a drain with nothing under way, far shorter than what a kill after the grace period would need.
GRACE_SECONDS = 20

Start = Callable[..., str]

pytestmark = pytest.mark.usefixtures("images")


@pytest.fixture
def start() -> Iterator[Start]:
    """Start containers that are removed at the end, whatever became of them."""
    started: list[str] = []

    def run(image: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
        data = f"/var/lib/lathe/{image.removeprefix('lathe-')}"
        writable = () if image == "lathe-scheduler" else (f"--tmpfs={data}:uid=10001,mode=0755",)
        container = docker("run", "--detach", *HARDENED, *writable, *options, image, *arguments).stdout.strip()
        started.append(container)
        return container

    yield run
    for container in started:
        docker("rm", "--force", "--volumes", container)


def logs(container: str) -> str:
    both = docker("logs", container)
    return both.stdout + both.stderr


def wait_healthy(container: str) -> None:
    def healthy() -> bool:
        state = inspect(container)["State"]
        assert state["Running"], logs(container)
        return bool(state["Health"]["Status"] == "healthy")

    eventually(healthy, "the container is healthy")


def ended(container: str) -> Callable[[], bool]:
    return lambda: inspect(container)["State"]["Status"] == "exited"


@pytest.mark.parametrize("image", IMAGES)
def test_it_says_its_version(image: str) -> None:
    said = docker("run", "--rm", image, "--version").stdout
    configuration = inspect(image)["Config"]
    assert said == f"{image} {configuration['Labels']['org.opencontainers.image.version']}\n"
    assert configuration["Entrypoint"] == [image], "exec form: signals reach the service"
    assert configuration["User"] == "10001:10001"


@pytest.mark.parametrize("image", IMAGES)
def test_it_holds_one_service_and_nothing_to_build_with(image: str) -> None:
    script = """
import importlib.util, json, pathlib, shutil
print(json.dumps({
    "services": [name for name in ("cas", "scheduler", "worker") if importlib.util.find_spec(f"lathe_{name}")],
    "tests": [name for name in ("pytest", "mypy", "hatchling") if importlib.util.find_spec(name)],
    "compilers": [name for name in ("cc", "gcc", "g++", "ld", "make") if shutil.which(name)],
    "left": [path for path in ("/root/.cache", "/build", "/src") if pathlib.Path(path).exists()],
    "lists": [path.name for path in pathlib.Path("/var/lib/apt/lists").glob("*_Packages*")],
}))
"""
    found = json.loads(
        docker("run", "--rm", "--user=0", "--entrypoint=/srv/lathe/bin/python", image, "-c", script).stdout
    )
    # The worker of these tests was told to have a compiler.
    compilers = found.pop("compilers")
    assert bool(compilers) == (image == "lathe-worker"), compilers
    assert found == {"services": [image.removeprefix("lathe-")], "tests": [], "left": [], "lists": []}


@pytest.mark.parametrize("image", ["lathe-cas", "lathe-scheduler"])
def test_it_becomes_healthy_alone_and_stops_when_told(image: str, start: Start) -> None:
    container = start(image)
    wait_healthy(container)
    docker("stop", f"--time={GRACE_SECONDS}", container)
    state = inspect(container)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False), logs(container)
    assert '"event": "stopped"' in logs(container)


def test_settings_come_by_flag_and_by_variable(start: Start) -> None:
    container = start(
        "lathe-cas",
        "--env=LATHE_CAS_PORT=1234",
        "--env=LATHE_CAS_TLS_PORT=1235",
        arguments=("--max-size-bytes=2000000",),
    )
    wait_healthy(container)  # on that port
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:50081/status').read().decode())"
    status = json.loads(docker("exec", container, "python", "-c", script).stdout)
    assert status["limits"]["max_size_bytes"] == 2_000_000
    assert "localhost" in status["tls"]["names"]


def test_a_worker_alone_reaches_its_protection_and_stops_when_told(start: Start) -> None:
    container = start("lathe-worker", *SANDBOX)
    eventually(lambda: '"event": "ready"' in logs(container), "the worker is ready")
    assert '"protection": "bubblewrap: own user, pid, mount, net, ipc and uts namespaces' in logs(container)
    docker("stop", f"--time={GRACE_SECONDS}", container)
    assert inspect(container)["State"]["ExitCode"] == 0, logs(container)


def test_a_worker_that_cannot_protect_the_machine_does_not_start(start: Start) -> None:
    container = start("lathe-worker")  # under the engine's own profile, which forbids namespaces
    eventually(ended(container), "the worker has given up")
    assert inspect(container)["State"]["ExitCode"] == 1
    assert "seccomp profile, which must allow clone, unshare, mount, umount2 and pivot_root" in logs(container)


def test_a_worker_goes_without_protection_only_if_told_so_by_name(start: Start) -> None:
    container = start("lathe-worker", "--env=LATHE_WORKER_SANDBOX=none")
    eventually(lambda: '"event": "ready"' in logs(container), "the worker is ready")
    assert '"protection": "none' in logs(container)


# Numbers of x86-64. Only calls that an ordinary user may make where there is no filter, so that the filter is what
# is seen; what needs a capability anyway (bpf, kexec_load, …) is no proof of anything.
PROBE_CALLS = """
import ctypes, errno, json, socket
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(number, *arguments)
    return errno.errorcode.get(ctypes.get_errno(), "done")

def family(number):
    try:
        socket.socket(number, socket.SOCK_DGRAM).close()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]

print(json.dumps({
    "forbidden": {name: call(number, -1, -1, -1, -1, -1) for name, number in dict(
        add_key=248, request_key=249, keyctl=250, io_uring_setup=425, io_uring_enter=426, io_uring_register=427,
        name_to_handle_at=303, process_vm_writev=311, setns=308).items()},
    "clone3": call(435, 0, 0),
    "families": {name: family(number) for name, number in dict(alg=38, vsock=40).items()},
    "allowed": {name: family(number) for name, number in dict(unix=1, inet=2, inet6=10).items()},
}))
"""


def probe_calls(*options: str) -> dict[str, Any]:
    program = ("--entrypoint=/srv/lathe/bin/python", "lathe-worker", "-c", PROBE_CALLS)
    answers: dict[str, Any] = json.loads(docker("run", "--rm", *HARDENED, *options, *program).stdout)
    return answers


def test_the_worker_s_profile_allows_no_more_than_it_should() -> None:
    without = probe_calls("--security-opt=seccomp=unconfined")
    filtered = probe_calls(*SANDBOX)
    assert "EPERM" not in without["forbidden"].values(), "otherwise the next line proves nothing"
    assert set(filtered["forbidden"].values()) == {"EPERM"}
    assert filtered["clone3"] == "ENOSYS", "so that libraries fall back to clone, whose flags a filter sees"
    assert set(filtered["families"].values()) == {"EPERM"}
    assert set(filtered["allowed"].values()) == {"done"}
