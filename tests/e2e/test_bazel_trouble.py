"""What Bazel tells its user when something is wrong with an action."""

from __future__ import annotations

import time

import pytest
from tests.support.bazel import Bazel
from tests.support.cluster import Cluster
from tests.support.reapi_client import ReapiClient, digest_of, reapi_message

BUILD_FAILED, TESTS_FAILED = 1, 3
# "At once" for an error about a property, with all of Bazel's own time on a loaded machine. Without an answer Bazel
# would wait for ever.
SOON_SECONDS = 60.0


def test_a_failing_test_shows_its_log(bazel: Bazel) -> None:
    result = bazel.run("test", "--test_output=errors", "//odd:failing_test")
    assert result.exit_code == TESTS_FAILED, result.output
    assert "this line explains the failure" in result.output
    assert set(result.spawns) == {"remote"}


def test_a_test_that_times_out_is_a_timeout_and_shows_what_it_printed(bazel: Bazel) -> None:
    result = bazel.run("test", "--test_output=errors", "--test_timeout=2", "//odd:slow_test")
    assert result.exit_code == TESTS_FAILED, result.output
    assert "TIMEOUT" in result.output
    assert "this line was printed before the timeout" in result.output


def test_a_failing_action_shows_its_stderr(bazel: Bazel) -> None:
    result = bazel.run("build", "//odd:failing_action")
    assert result.exit_code == BUILD_FAILED, result.output
    assert "the reason on stderr" in result.output
    assert "Exit 7" in result.output


def test_a_missing_output_is_named(bazel: Bazel) -> None:
    result = bazel.run("build", "//odd:missing_output")
    assert result.exit_code == BUILD_FAILED, result.output
    assert "never_written.txt" in result.output
    assert "was not created" in result.output


def test_a_no_cache_action_runs_each_time(bazel: Bazel, cluster: Cluster) -> None:
    contents = set()
    dispatched = cluster.actions_dispatched()
    for _ in range(2):
        bazel.clean()
        assert bazel.build("//odd:not_cached").spawns == {"remote": 1}
        contents.add(bazel.output_file("odd/not_cached.txt").read_text())
    assert len(contents) == 2
    assert cluster.actions_dispatched() - dispatched == 2


def test_a_do_not_cache_action_is_never_in_the_action_cache(client: ReapiClient, cluster: Cluster) -> None:
    command = reapi_message("Command", arguments=["cat", "/proc/sys/kernel/random/uuid"]).SerializeToString()
    action = reapi_message(
        "Action", command_digest=digest_of(command), input_root_digest=digest_of(b""), do_not_cache=True
    ).SerializeToString()
    _, action_digest = client.upload(command, action)
    dispatched = cluster.actions_dispatched()
    results = [client.execute(action_digest) for _ in range(2)]
    assert [(result.status.code, result.result.exit_code, result.cached_result) for result in results] == [
        (0, 0, False)
    ] * 2
    assert cluster.actions_dispatched() - dispatched == 2
    assert client.action_result(action_digest) is None


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("//odd:unknown_property", ("flux_capacitor", "cpu_count")),
        ("//odd:too_many_cpus", ("cpu_count", "100000")),
    ],
)
def test_a_property_that_no_worker_has_is_a_clear_error_at_once(
    bazel: Bazel, target: str, expected: tuple[str, ...]
) -> None:
    began = time.monotonic()
    result = bazel.start("build", target).wait(SOON_SECONDS)
    print(f"{target}: {time.monotonic() - began:.1f} s")
    assert result.exit_code not in (0, TESTS_FAILED), result.output
    for word in expected:
        assert word in result.output
