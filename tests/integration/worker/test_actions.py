"""Actions in the real sandbox: what they see, what comes out of them, how they end."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
from typing import TYPE_CHECKING

import pytest
from grpclib.const import Status
from tests.support.probe import processes_with as processes_by_argument
from tests.support.waiting import eventually

from lathe_protos import reapi, rpc, worker_v1
from lathe_shared.digest import Digest
from lathe_shared.errors import UnavailableError
from lathe_shared.status_details import unpack_any
from lathe_shared.testing.builders import BlobSet
from lathe_shared.tree_wire import read_tree
from lathe_worker.action_outcome import OutcomeKind
from lathe_worker.action_request import DEFAULT_PATH

if TYPE_CHECKING:
    from tests.integration.worker.workbench import Workbench


async def test_an_action_reads_its_inputs_and_writes_an_output(bench: Workbench) -> None:
    ran = await bench.run(
        "cat in/one in/two > out/deep/both; test -x in/tool && in/tool",
        inputs={"in/one": b"1", "in/two": b"2", "in/tool": (b"#!/bin/sh\necho tool ran", True), "in/empty": b""},
        output_files=["out/deep/both"],
    )

    assert ran.exit_code == 0
    assert ran.file("out/deep/both") == b"12"
    assert ran.result.stdout_raw == b"tool ran\n" == ran.stdout
    assert not ran.result.output_files[0].is_executable
    assert ran.outcome.kind is OutcomeKind.SUCCEEDED


async def test_the_environment_is_exactly_what_the_command_says_over_a_default_path(bench: Workbench) -> None:
    plain = await bench.run("/usr/bin/env", "-0")
    given = await bench.run("/usr/bin/env", "-0", environment={"PATH": "/bin", "PWD": "/proc/self/cwd", "A": "b=c\nd"})

    assert plain.stdout == f"PATH={DEFAULT_PATH}\0".encode()
    assert sorted(given.stdout.split(b"\0")) == [b"", b"A=b=c\nd", b"PATH=/bin", b"PWD=/proc/self/cwd"]


async def test_an_action_runs_in_its_working_directory_and_names_paths_from_there(bench: Workbench) -> None:
    ran = await bench.run(
        "pwd; cp input ../beside; cp input sub/inside",
        inputs={"here/there/input": b"x"},
        working_directory="here/there",
        output_paths=["sub/inside", "../beside"],
    )

    assert ran.stdout == b"/lathe/root/here/there\n"
    assert ran.file("sub/inside") == ran.file("../beside") == b"x"


@pytest.mark.parametrize("inputs", [{"inputs": {"here": b"a file"}}, {"symlinks": {"here": "nowhere"}}])
async def test_a_working_directory_that_is_none_is_the_action_s_failure(
    bench: Workbench, inputs: dict[str, object]
) -> None:
    ran = await bench.run("true; true", working_directory="here", **inputs)

    assert ran.exit_code == 126
    assert b"'here'" in ran.stderr
    assert ran.outcome.kind is OutcomeKind.FAILED


async def test_the_program_may_be_relative_to_the_working_directory(bench: Workbench) -> None:
    ran = await bench.run(
        "./tool", "argument", inputs={"here/tool": (b'#!/bin/sh\necho "$0" "$@"', True)}, working_directory="here"
    )

    assert ran.stdout == b"./tool argument\n"


@pytest.mark.parametrize(
    ("program", "code"),
    [("no_such_program", 127), ("/no/such", 127), ("./data", 126), ("-i", 127), ("-", 127), ("--help", 127)],
)
async def test_a_program_that_cannot_be_run_fails_as_in_a_shell(bench: Workbench, program: str, code: int) -> None:
    ran = await bench.run(program, "x", inputs={"data": b"no program"})

    assert ran.exit_code == code
    assert program.encode() in ran.stderr
    assert ran.outcome.kind is OutcomeKind.FAILED


@pytest.mark.parametrize("environment", [{}, {"PWD": "/proc/self/cwd"}], ids=["plain", "with PWD"])
@pytest.mark.parametrize("count", [1, 10_000])
async def test_a_program_may_have_a_name_like_an_option(
    bench: Workbench, environment: dict[str, str], count: int
) -> None:
    tool = (b'#!/bin/sh\necho "$# $1"', True)
    environment = {"PATH": "/lathe/root:/bin", **environment}
    ran = await bench.run("-i", *["-x"] * count, inputs={"-i": tool}, environment=environment)

    assert ran.stdout == b"%d -x\n" % count


async def test_commands_longer_than_bubblewrap_takes_keep_arguments_and_environment(bench: Workbench) -> None:
    arguments = [f"argument {number}" for number in range(10_000)]
    ran = await bench.run(
        "/bin/sh", "-c", 'echo $#; echo "$10000"; echo "${10000}"; env', "name", *arguments, environment={"A": "b"}
    )

    assert ran.exit_code == 0
    lines = ran.stdout.decode().splitlines()
    assert lines[0] == "10000"
    assert lines[2] == "argument 9999"
    assert {"A=b", f"PATH={DEFAULT_PATH}"} <= set(lines[3:]) <= {"A=b", f"PATH={DEFAULT_PATH}", "PWD=/lathe/root"}


@pytest.mark.parametrize(("arguments", "variables"), [(1, 3_200), (7_900, 400)])
async def test_commands_with_more_variables_than_bubblewrap_takes_run(
    bench: Workbench, arguments: int, variables: int
) -> None:
    environment = {f"V{number}": str(number) for number in range(variables)}
    ran = await bench.run(
        "/bin/sh", "-c", f'echo $# $V{variables - 1} "$PWD"', "name", *["x"] * arguments, environment=environment
    )

    assert ran.stdout == b"%d %d /lathe/root\n" % (arguments, variables - 1)


async def test_output_files_keep_exec_bit_and_missing_ones_are_left_out(bench: Workbench) -> None:
    ran = await bench.run(
        "echo x > plain; echo y > run; chmod +x run; : > empty",
        output_files=["plain", "run", "empty", "never"],
    )

    assert {file.path: file.is_executable for file in ran.result.output_files} == {
        "plain": False,
        "run": True,
        "empty": False,
    }
    assert ran.file("empty") == b""


async def test_an_output_directory_is_a_tree_with_each_directory_once(bench: Workbench) -> None:
    ran = await bench.run(
        "mkdir -p d/a d/b d/c/a d/empty; for f in d/a d/b d/c/a; do echo same > $f/file; done; ln -s ../a d/c/link;"
        "chmod +x d/b/file; chmod -x d/b/file",
        output_directories=["d"],
    )

    [directory] = ran.result.output_directories
    root, children = read_tree(ran.read(directory.tree_digest))
    assert directory.is_topologically_sorted
    assert [entry.name for entry in root.directories] == ["a", "b", "c", "empty"]
    hashes = {entry.name: entry.hash for entry in root.directories}
    assert hashes["a"] == hashes["b"]
    assert len(children) == 3  # a (which is b and c/a, too), c, empty
    [with_link] = [child for child in children if child.symlinks]
    assert with_link.symlinks[0].target == "../a"
    assert [entry.hash for entry in with_link.directories] == [hashes["a"]]
    assert children.index(with_link) < next(index for index, child in enumerate(children) if child.files)


@pytest.mark.parametrize(
    ("name", "has_tree", "has_root"),
    [("TREE_ONLY", True, False), ("DIRECTORY_ONLY", False, True), ("TREE_AND_DIRECTORY", True, True)],
)
async def test_the_output_directory_format_is_the_command_s(
    bench: Workbench, name: str, has_tree: bool, has_root: bool
) -> None:
    request = bench.request("mkdir -p d/sub; echo x > d/sub/f", output_paths=["d"])
    request.command.output_directory_format = reapi.CommandOutputDirectoryFormat[name]
    ran = await bench.execute(request)

    [directory] = ran.result.output_directories
    assert bool(directory.tree_digest.hash) == has_tree
    assert bool(directory.root_directory_digest.hash) == has_root
    if has_root:
        root = reapi.Directory().parse(ran.read(directory.root_directory_digest))
        sub = reapi.Directory().parse(ran.read(root.directories[0].digest))
        assert ran.read(sub.files[0].digest) == b"x\n"


async def test_symlinks_are_outputs_and_never_followed(bench: Workbench) -> None:
    script = "ln -s /etc/passwd absolute; ln -s ../up relative; ln -s /lathe/root/in/file inside; ln -s nowhere d"
    ran = await bench.run(script, inputs={"in/file": b"x"}, output_paths=["absolute", "relative", "inside", "d"])
    old = await bench.run(
        script, inputs={"in/file": b"x"}, output_files=["absolute", "relative"], output_directories=["d"]
    )

    targets = {link.path: link.target for link in ran.result.output_symlinks}
    assert targets == {"absolute": "/etc/passwd", "relative": "../up", "inside": "in/file", "d": "nowhere"}
    assert not ran.result.output_files
    assert not ran.result.output_file_symlinks
    assert [link.path for link in old.result.output_file_symlinks] == ["absolute", "relative"]
    assert [link.path for link in old.result.output_directory_symlinks] == ["d"]


async def test_an_output_behind_a_symlink_out_of_the_input_root_is_not_read(bench: Workbench) -> None:
    ran = await bench.run("ln -s /etc out", output_paths=["out/passwd"])

    assert ran.exit_code == 0
    assert not ran.result.output_files


async def test_special_files_are_refused_with_their_log_kept(bench: Workbench) -> None:
    ran = await bench.run("mkdir d; mkfifo d/pipe; echo said", output_paths=["d"])

    assert ran.response.status.code == Status.FAILED_PRECONDITION.value
    assert "'d/pipe' is a named pipe" in ran.response.status.message
    assert ran.stdout == b"said\n"
    assert not ran.outcome.worker_fault


async def test_outputs_that_are_refused_do_not_hide_how_an_action_failed(bench: Workbench) -> None:
    script = "mkdir d; mkfifo d/pipe; echo said;"
    failed = await bench.run(f"{script} exit 3", output_paths=["d"])
    late = await bench.run(f"{script} sleep 1000", output_paths=["d"], timeout=datetime.timedelta(seconds=0.7))

    assert (failed.exit_code, failed.stdout) == (3, b"said\n")
    assert failed.outcome.kind is OutcomeKind.FAILED
    assert late.response.status.code == Status.DEADLINE_EXCEEDED.value
    assert late.stdout == b"said\n"
    assert not bench.blobs.results


async def test_outputs_without_read_permission_are_collected(bench: Workbench) -> None:
    ran = await bench.run("mkdir -p d/sub; echo x > d/sub/f; chmod 0 d/sub/f d/sub d", output_directories=["d"])

    root, [sub] = read_tree(ran.read(ran.result.output_directories[0].tree_digest))
    assert root.directories[0].name == "sub"
    assert sub.files[0].hash == Digest.of(b"x\n").hash


async def test_a_file_where_a_directory_was_promised_is_refused(bench: Workbench) -> None:
    ran = await bench.run("echo x > d", output_directories=["d"])

    assert ran.response.status.code == Status.FAILED_PRECONDITION.value


@pytest.mark.parametrize("kind", ["output_paths", "output_files"])
async def test_outputs_whose_result_could_not_be_sent_are_refused_with_their_log_kept(
    bench: Workbench, kind: str
) -> None:
    # 5,000 targets of 4,000 bytes: more than the scheduler takes in one message.
    names = [f"link{number}" for number in range(5_000)]
    script = "import os; [os.symlink('x' * 4000, f'link{number}') for number in range(5000)]; print('said')"
    ran = await bench.run("python3", "-c", script, **{kind: names})

    assert ran.response.status.code == Status.FAILED_PRECONDITION.value
    assert "bytes" in ran.response.status.message
    assert len(ran.outcome.execute_response) < 1 << 20
    assert ran.stdout == b"said\n"
    assert not ran.outcome.worker_fault
    assert not bench.blobs.results


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../b"])
async def test_output_paths_out_of_the_input_root_are_refused(bench: Workbench, path: str) -> None:
    ran = await bench.run("true; true", output_paths=[path])

    assert ran.response.status.code == Status.INVALID_ARGUMENT.value
    assert "command.output_paths" in ran.response.status.message
    assert not ran.outcome.worker_fault


async def test_a_timeout_keeps_output_and_outputs(bench: Workbench) -> None:
    ran = await bench.run(
        "echo before; echo half > out; sleep 1000; echo after",
        output_paths=["out"],
        timeout=datetime.timedelta(seconds=0.7),
    )

    assert ran.response.status.code == Status.DEADLINE_EXCEEDED.value
    assert ran.stdout == b"before\n"
    assert ran.file("out") == b"half\n"
    assert ran.result.exit_code == 137
    assert ran.outcome.kind is OutcomeKind.TIMED_OUT
    assert not bench.blobs.results


async def test_the_default_timeout_applies_to_actions_without_one(bench: Workbench) -> None:
    ran = await bench.run("sleep 1000; true", start={"default_timeout": datetime.timedelta(seconds=0.2)})

    assert ran.response.status.code == Status.DEADLINE_EXCEEDED.value


@pytest.mark.parametrize(("signal", "code"), [("SEGV", 139), ("KILL", 137), ("TERM", 143)])
async def test_death_by_a_signal_is_an_exit_code(bench: Workbench, signal: str, code: int) -> None:
    ran = await bench.run(f"kill -{signal} $$; sleep 1000")

    assert ran.exit_code == code
    assert not bench.blobs.results


async def test_an_action_that_floods_its_output_is_killed_and_told_so(bench: Workbench) -> None:
    ran = await bench.run("exec yes")

    assert ran.exit_code != 0
    assert ran.result.stdout_digest.size_bytes == 1 << 20
    assert b"more than 1048576 bytes to stdout" in ran.stderr


async def test_small_logs_are_inline_and_large_ones_are_not(bench: Workbench) -> None:
    ran = await bench.run("head -c 4096 /dev/zero; head -c 4097 /dev/zero >&2")

    assert len(ran.result.stdout_raw) == 4096
    assert ran.result.stderr_raw == b""
    assert len(ran.stderr) == 4097


async def test_output_files_are_inline_where_asked_for(bench: Workbench) -> None:
    ran = await bench.run(
        "echo one > one; echo two > two", output_paths=["one", "two"], start={"inline_output_files": ["two", "three"]}
    )

    assert {file.path: file.contents for file in ran.result.output_files} == {"one": b"", "two": b"two\n"}


async def test_a_good_result_is_in_the_action_cache_before_it_is_reported(bench: Workbench) -> None:
    request = bench.request("echo x > out", output_paths=["out"])
    ran = await bench.execute(request)

    assert bench.blobs.results == {("main", request.digest): bytes(ran.result)}


@pytest.mark.parametrize(
    ("script", "options"),
    [("exit 3", {}), ("true; true", {"do_not_cache": True}), ("true; true", {"start": {"do_not_cache": True}})],
)
async def test_what_must_not_be_cached_is_not(bench: Workbench, script: str, options: dict[str, object]) -> None:
    ran = await bench.run(script, **options)

    assert ran.response.status.code == 0
    assert not bench.blobs.results


async def test_all_missing_inputs_are_named(bench: Workbench) -> None:
    blobs = BlobSet()
    gone = [Digest.of(b"gone"), Digest.of(b"gone, too")]
    request = bench.request("true; true", inputs={"a": b"gone", "b/c": b"gone, too", "d/e": b"directory gone"})
    directory = blobs.directory({"e": b"directory gone"})
    for digest in [*gone, directory]:
        del bench.blobs.blobs[digest]
    ran = await bench.execute(request)

    assert ran.response.status.code == Status.FAILED_PRECONDITION.value
    assert not ran.outcome.worker_fault
    failure = unpack_any(ran.response.status.details[0], rpc.PreconditionFailure)
    assert {violation.subject for violation in failure.violations} == {
        f"blobs/{digest}" for digest in [*gone, directory]
    }
    assert {violation.type for violation in failure.violations} == {"MISSING"}


async def test_of_very_many_missing_inputs_as_many_are_named_as_a_client_can_receive(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lathe_worker.action_executor.MAX_MISSING_LISTED", 3)
    contents = [b"%d" % number for number in range(5)]
    request = bench.request("true; true", inputs={content.decode(): content for content in contents})
    for content in contents:
        del bench.blobs.blobs[Digest.of(content)]
    ran = await bench.execute(request)

    failure = unpack_any(ran.response.status.details[0], rpc.PreconditionFailure)
    assert len(failure.violations) == 3


async def test_storage_that_is_away_is_the_worker_s_fault(bench: Workbench) -> None:
    bench.blobs.failure = UnavailableError("the CAS is away")
    ran = await bench.run("true; true")

    assert ran.outcome.worker_fault
    assert ran.response.status.code == Status.UNAVAILABLE.value


async def test_metadata_tells_the_whole_story(bench: Workbench) -> None:
    ran = await bench.run("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done", inputs={"a": b"b"})

    metadata = ran.result.execution_metadata
    assert metadata.worker == "bench"
    times = [
        metadata.queued_timestamp,
        metadata.worker_start_timestamp,
        metadata.input_fetch_start_timestamp,
        metadata.input_fetch_completed_timestamp,
        metadata.execution_start_timestamp,
        metadata.execution_completed_timestamp,
        metadata.output_upload_start_timestamp,
        metadata.output_upload_completed_timestamp,
        metadata.worker_completed_timestamp,
    ]
    assert times == sorted(times)
    assert times[1].year > 2000
    assert bench.started == [metadata.execution_start_timestamp]
    assert metadata.virtual_execution_duration > datetime.timedelta()
    usage = unpack_any(metadata.auxiliary_metadata[0], worker_v1.ResourceUsage)
    assert usage.user_time + usage.system_time > datetime.timedelta()
    assert 100_000 < usage.max_resident_bytes < 30_000_000


async def test_several_actions_run_at_once(bench: Workbench) -> None:
    """None of them ends before it is ended, so they can be seen side by side only if none waits for another."""
    marks = [str(os.getpid() * 10**6 + 4720 + number) for number in range(6)]

    def sleepers() -> list[int]:
        return [pid for mark in marks for pid in processes_by_argument(mark)]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(bench.run(f"sleep {mark}; echo {mark}")) for mark in marks]
        await asyncio.to_thread(eventually, lambda: len(sleepers()) == len(marks), "all actions run")
        for pid in sleepers():
            os.kill(pid, signal.SIGKILL)

    assert [task.result().stdout for task in tasks] == [f"{mark}\n".encode() for mark in marks]


async def test_input_symlinks_and_empty_directories_are_there(bench: Workbench) -> None:
    ran = await bench.run(
        "cat link; readlink absolute; test -d empty/dir && rmdir empty/dir && echo gone",
        inputs={"file": b"content\n", "empty/dir/": b""},
        symlinks={"link": "file", "absolute": "/etc/passwd"},
    )

    assert ran.stdout == b"content\n/etc/passwd\ngone\n"


async def test_the_work_directory_is_gone_after_the_action_whatever_it_did(bench: Workbench) -> None:
    await bench.run("mkdir -p a/b/c; touch a/b/c/f; chmod 0 a/b/c a/b a; ln -s /etc link")
    await bench.run("i=0; while [ $i -lt 300 ]; do mkdir d; cd d; i=$((i+1)); done; chmod 0 /lathe/root; true")
    await bench.work.close()

    assert list((bench.directory / "work").iterdir()) == []
