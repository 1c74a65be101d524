"""The whole life of a stack, in the order in which an operator meets it, under both docker-composes.

The tests of one docker-compose share a stack and follow each other.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bazel import REMOTE_ONLY_FLAGS, Bazel, BazelResult
from tests.support.bazel_tls import tls_startup_flags
from tests.support.compose_stack import (
    CAS_HTTP_PORT,
    CAS_TLS_PORT,
    COMPOSE_FOLDER,
    SERVICES,
    V1,
    V2,
    WORKER_HTTP_PORT,
    ComposeStack,
    docker,
    get,
    inspect,
)
from tests.support.probe import Probe, processes_with
from tests.support.stack_trials import (
    MARK,
    WORKER_DATA,
    build_meanwhile,
    check_containment,
    check_hardening,
    check_removed,
)
from tests.support.waiting import eventually
from tests.support.workspace import Workspace, make_workspace

# The examples for users are what these tests use.
PLAIN = (f"--bazelrc={COMPOSE_FOLDER / 'plain.bazelrc'}",)
TLS = (f"--bazelrc={COMPOSE_FOLDER / 'tls.bazelrc'}",)


@pytest.fixture(scope="module", params=["v1", "v2"])
def stack(
    request: pytest.FixtureRequest,
    images: None,
    tmp_path_factory: pytest.TempPathFactory,
    stacks_in_use: list[ComposeStack],
) -> Iterator[ComposeStack]:
    # LATHE_DIR does not exist yet: the stack has to make it.
    lathe_dir = tmp_path_factory.mktemp("stack") / "lathe"
    stack = ComposeStack(V1, lathe_dir) if request.param == "v1" else ComposeStack(V2, lathe_dir, ("fresh-proc.yml",))
    stacks_in_use.append(stack)
    try:
        stack.up()
        yield stack
    finally:
        stacks_in_use.remove(stack)
        stack.discard()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, stack: ComposeStack) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace") / "main")


@pytest.fixture(scope="module")
def bazel(tmp_path_factory: pytest.TempPathFactory, stack: ComposeStack, workspace: Workspace) -> Iterator[Bazel]:
    bazel = Bazel(workspace.root, tmp_path_factory.mktemp("bazel"), REMOTE_ONLY_FLAGS, PLAIN)
    yield bazel
    bazel.remove()


@pytest.fixture(scope="module")
def first_build(bazel: Bazel) -> BazelResult:
    return bazel.run("test", "//...")


def test_all_become_healthy_from_nothing_with_the_least_privilege(stack: ComposeStack) -> None:
    check_hardening(stack)
    status = stack.status("lathe_worker", WORKER_HTTP_PORT)
    assert "bubblewrap" in status["sandbox"]
    # v1.29 cannot ask for more.
    assert ("own /proc" if stack.has_fresh_proc else "the worker's /proc, read-only") in status["sandbox"]
    assert status["data_dir"] == f"{WORKER_DATA}/1"


def test_the_plain_file_means_the_same_to_both(stack: ComposeStack) -> None:
    for compose in (V1, V2):
        listed = ComposeStack(compose, stack.lathe_dir).compose("config", "--services").stdout.split()
        assert sorted(listed) == ["lathe_cas", "lathe_init", "lathe_scheduler", "lathe_worker"]


def test_bazel_builds_and_tests_through_the_plain_ports(first_build: BazelResult, workspace: Workspace) -> None:
    assert first_build.exit_code == 0, first_build.output
    assert set(first_build.spawns) == {"remote"}
    assert first_build.spawns["remote"] > workspace.compile_actions >= 60
    assert "9 tests pass" in first_build.output


def test_bazel_builds_and_tests_by_tls(
    tmp_path: Path, stack: ComposeStack, workspace: Workspace, first_build: BazelResult
) -> None:
    startup_flags = (*TLS, *tls_startup_flags(tmp_path / "tls"))
    flags = (
        "--remote_instance_name=by/tls",  # its action cache is empty: every action runs again
        f"--tls_certificate={stack.authority}",
        *REMOTE_ONLY_FLAGS,
    )
    bazel = Bazel(workspace.root, tmp_path / "bazel", flags, startup_flags)
    try:
        result = bazel.test("//...")
    finally:
        bazel.remove()
    assert result.spawns == {"remote": first_build.spawns["remote"]}


def test_the_certificate_is_for_the_host_s_name_and_address_too(stack: ComposeStack) -> None:
    names = json.loads(get(f"http://127.0.0.1:{CAS_HTTP_PORT}/status"))["tls"]["names"]
    host_name = Path("/etc/hostname").read_text().strip()
    assert {"localhost", "127.0.0.1", "::1", "lathe_cas", host_name} <= set(names)
    for name in ("localhost", "127.0.0.1", host_name):
        context = ssl.create_default_context(cafile=str(stack.authority))
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", CAS_TLS_PORT), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=name) as shaken,
        ):
            assert shaken.selected_alpn_protocol() == "h2"


def test_what_is_kept_is_limited_and_the_limits_are_shown(stack: ComposeStack, first_build: BazelResult) -> None:
    cas = json.loads(get(f"http://127.0.0.1:{CAS_HTTP_PORT}/status"))
    assert cas["limits"]["max_size_bytes"] == 10_000_000_000
    assert cas["store"]["stored_bytes"] > 0
    worker = stack.status("lathe_worker", WORKER_HTTP_PORT)
    assert worker["cache"]["max_size_bytes"] == 5_000_000_000
    assert "lathe_cas" in get(f"http://127.0.0.1:{CAS_HTTP_PORT}/metrics")
    assert get(f"http://127.0.0.1:{CAS_HTTP_PORT}/healthz") == "ok\n"


def test_actions_are_contained_in_the_container_too(
    stack: ComposeStack, bazel: Bazel, workspace: Workspace, first_build: BazelResult
) -> None:
    workspace.write_probe(port=WORKER_HTTP_PORT, worker_data=Path(WORKER_DATA), mark=MARK)
    check_containment(stack, bazel, Probe(bazel), own_proc=stack.has_fresh_proc)
    eventually(lambda: not processes_with(MARK), "no process of an action is left")


def test_workers_come_and_go_while_bazel_builds(stack: ComposeStack, bazel: Bazel) -> None:
    def scale() -> None:
        stack.up(workers=3)
        folders = {path.name for path in (stack.lathe_dir / "compose/worker").iterdir()}
        assert folders == {"1", "2", "3"}, "each worker has a folder of its own"
        stack.up(workers=1)

    for result in build_meanwhile(stack, bazel, "SCALED", scale):
        assert result.exit_code == 0, result.output
        assert set(result.spawns) <= {"remote", "remote cache hit"}
        assert result.spawns["remote"] >= 60, "each compiles all libraries again"


def test_builds_survive_each_container_killed_in_turn(stack: ComposeStack, bazel: Bazel) -> None:
    def kill() -> None:
        for service in SERVICES:
            stack.kill(stack.containers(service)[0])
            stack.wait_healthy()

    for result in build_meanwhile(stack, bazel, "KILLED", kill):
        assert result.exit_code == 0, result.output
        assert set(result.spawns) <= {"remote", "remote cache hit"}


def test_everything_is_still_cached_after_down_and_up(
    stack: ComposeStack, bazel: Bazel, first_build: BazelResult
) -> None:
    authority = stack.authority.read_bytes()
    workers = stack.containers("lathe_worker")
    docker("stop", *workers)
    assert [inspect(worker)["State"]["ExitCode"] for worker in workers] == [0]
    stack.down()
    stack.up()
    bazel.clean()
    again = bazel.test("//...")
    assert again.spawns == {"remote cache hit": first_build.spawns["remote"]}
    assert stack.authority.read_bytes() == authority, "clients need no other one"


def test_down_leaves_nothing(stack: ComposeStack) -> None:
    check_removed(stack)
