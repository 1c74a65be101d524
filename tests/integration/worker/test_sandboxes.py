"""What every sandbox promises, whatever it protects."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.required import require_programs
from tests.support.waiting import eventually

from lathe_worker.child_process import become_subreaper
from lathe_worker.sandbox import ActionUser, ResourceLimits, Sandbox, SandboxResult, SandboxSpec
from lathe_worker.sandboxes.bubblewrap_arguments import DEFAULT_READABLE_PATHS, ProcView, host_view, user_prefix
from lathe_worker.sandboxes.bubblewrap_sandbox import BubblewrapSandbox
from lathe_worker.sandboxes.plain_process_sandbox import PlainProcessSandbox
from lathe_worker.work_directory import WorkDirectories

if TYPE_CHECKING:
    from collections.abc import Callable

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def bubblewrap(_: Path) -> Sandbox:
    require_programs("bwrap")
    become_subreaper()
    user = ActionUser(64321, 64321) if os.geteuid() == 0 else None
    return BubblewrapSandbox(host_view(DEFAULT_READABLE_PATHS, []), action_user=user)


def plain(_: Path) -> Sandbox:
    return PlainProcessSandbox()


@dataclass
class Ran:
    result: SandboxResult
    stdout: bytes
    stderr: bytes


class Runner:
    def __init__(self, sandbox: Sandbox, directory: Path) -> None:
        self.sandbox = sandbox
        self.work = WorkDirectories(directory / "work", sandbox.action_user)
        self.work.purge()

    async def run(self, *argv: str, environment: dict[str, str] | None = None, **options: Any) -> Ran:
        work = self.work.make()
        spec = SandboxSpec(
            argv=argv if len(argv) > 1 else ("/bin/sh", "-c", argv[0]),
            environment=ENVIRONMENT if environment is None else environment,
            exec_root=work.exec_root,
            temporary_directory=work.temporary,
            stdout_path=work.stdout,
            stderr_path=work.stderr,
            **options,
        )
        result = await self.sandbox.run(spec)
        logs = [path.read_bytes() if path.exists() else b"" for path in (work.stdout, work.stderr)]
        return Ran(result, *logs)


@pytest.fixture(params=[bubblewrap, plain], ids=["bubblewrap", "plain"])
def runner(request: pytest.FixtureRequest, open_directory: Path) -> Runner:
    make: Callable[[Path], Sandbox] = request.param
    return Runner(make(open_directory), open_directory)


async def test_it_passes_its_own_probe(runner: Runner, tmp_path: Path) -> None:
    assert await runner.sandbox.probe(runner.work.make().path)


@pytest.mark.parametrize("code", [0, 1, 7, 255])
async def test_exit_codes_are_the_command_s(runner: Runner, code: int) -> None:
    assert (await runner.run(f"exit {code}")).result.exit_code == code


@pytest.mark.parametrize(("name", "number"), [("HUP", 1), ("KILL", 9), ("ABRT", 6), ("TERM", 15)])
async def test_signals_are_exit_codes(runner: Runner, name: str, number: int) -> None:
    assert (await runner.run(f"kill -{name} $$; sleep 1000")).result.exit_code == 128 + number


async def test_what_the_worker_ignores_an_action_does_not(runner: Runner) -> None:
    # As under nohup: a process that ignores a signal has those that it starts ignore it, too.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ran = await runner.run("kill -HUP $$; exit 3")
        os.kill(os.getpid(), signal.SIGHUP)  # which ends nobody here
    finally:
        signal.signal(signal.SIGHUP, before)

    assert ran.result.exit_code == 128 + signal.SIGHUP


@pytest.mark.parametrize(("program", "code"), [("no-such", 127), ("/no/such", 127), ("/etc/passwd", 126)])
async def test_programs_that_cannot_run(runner: Runner, program: str, code: int) -> None:
    ran = await runner.run(program, "argument")

    assert ran.result.exit_code == code
    assert program.encode() in ran.stderr


async def test_the_environment_is_the_spec_s(runner: Runner) -> None:
    ran = await runner.run("/usr/bin/env", "-0", environment={"X": "y z", "PWD": "/elsewhere"})

    assert sorted(ran.stdout.split(b"\0")) == [b"", b"PWD=/elsewhere", b"X=y z"]


async def test_standard_streams_are_apart_and_input_is_empty(runner: Runner) -> None:
    ran = await runner.run("cat; echo out; echo err >&2; echo more > /dev/stdout; echo less > /dev/stderr")

    assert (ran.stdout, ran.stderr) == (b"out\nmore\n", b"err\nless\n")


async def test_only_standard_descriptors_are_open(runner: Runner) -> None:
    fd = os.open("/", os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        ran = await runner.run("ls", "/proc/self/fd")
    finally:
        os.close(fd)

    assert ran.stdout.split() == [b"0", b"1", b"2", b"3"]  # 3 is what ls reads


async def test_time_over_kills_and_keeps_output(runner: Runner) -> None:
    ran = await runner.run("trap '' TERM INT HUP; echo said; sleep 1000; echo never", timeout_seconds=0.5)

    assert (ran.result.exit_code, ran.result.timed_out, ran.stdout) == (137, True, b"said\n")


async def test_output_is_bounded_to_the_byte(runner: Runner) -> None:
    exact = await runner.run("head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2", max_output_bytes=100_000)
    more = await runner.run("head -c 100001 /dev/zero >&2; sleep 1000", max_output_bytes=100_000)

    assert (exact.result.exit_code, exact.result.exceeded_output, len(exact.stdout)) == (0, "", 100_000)
    assert (more.result.exceeded_output, len(more.stderr)) == ("stderr", 100_000)


async def test_a_background_process_with_standard_output_does_not_delay_the_end(runner: Runner) -> None:
    ran = await runner.run("sleep 100000 & echo done")

    assert ran.stdout == b"done\n"
    assert ran.result.wall_seconds < 1000


async def test_large_output_arrives_whole(runner: Runner) -> None:
    ran = await runner.run("seq 200000")

    assert ran.stdout == b"".join(b"%d\n" % number for number in range(1, 200_001))


async def test_usage_counts_what_was_done(runner: Runner) -> None:
    usage = (await runner.run("i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done")).result.usage

    assert usage.user_seconds > 0
    assert usage.max_resident_bytes > 100_000


async def test_a_full_disk_is_the_sandbox_s_failure(runner: Runner, tmp_path: Path) -> None:
    from lathe_worker.sandbox import SandboxError

    work = runner.work.make()
    spec = SandboxSpec(
        argv=["/bin/sh", "-c", "echo x; sleep 1000"],
        environment=ENVIRONMENT,
        exec_root=work.exec_root,
        temporary_directory=work.temporary,
        stdout_path=Path("/dev/full/no"),
        stderr_path=work.stderr,
    )
    with pytest.raises(SandboxError, match="written to disk"):
        await runner.sandbox.run(spec)


async def test_cancellation_is_raised_when_all_is_over(runner: Runner) -> None:
    task = asyncio.ensure_future(runner.run("sleep 1000"))
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_limits_apply(open_directory: Path) -> None:
    runner = Runner(bubblewrap(open_directory), open_directory)
    limits = ResourceLimits(max_open_files=77, max_file_size_bytes=4096)
    ran = await runner.run("ulimit -n; ulimit -c; head -c 5000 /dev/zero > file; echo $?", limits=limits)

    assert ran.stdout.split() == [b"77", b"0", b"153"]  # SIGXFSZ


async def test_a_shared_proc_shows_who_runs_but_leads_into_nobody(open_directory: Path) -> None:
    require_programs("bwrap")
    become_subreaper()
    user = ActionUser(64321, 64321) if os.geteuid() == 0 else None
    view = host_view(DEFAULT_READABLE_PATHS, [])
    runner = Runner(BubblewrapSandbox(view, action_user=user, proc=(ProcView.SHARED,)), open_directory)
    # Of the actions' own user, as other actions and the outer bwrap are: only the user namespace is in between.
    command = [*user_prefix(user), "/bin/sleep", "86399.5"]
    other = await asyncio.create_subprocess_exec(*command, env={"SECRET": "hush"})
    try:
        eventually(lambda: b"sleep" in Path(f"/proc/{other.pid}/cmdline").read_bytes(), "it is the command")
        script = (
            f"cd /proc/{other.pid} && tr '\\0' ' ' < cmdline; for way in environ maps mem auxv io; do "
            "head -c 1 $way > /dev/null 2>&1 && echo $way; done; for way in root cwd fd/0; do readlink $way "
            "> /dev/null 2>&1 && echo $way; done; echo 900 2> /dev/null > oom_score_adj && echo oom_score_adj; true"
        )
        outside = await asyncio.create_subprocess_exec(
            *user_prefix(user), "/bin/sh", "-c", script, stdout=asyncio.subprocess.PIPE
        )
        seen_outside, _ = await outside.communicate()
        ran = await runner.run(f"readlink /proc/self/exe; {script}")
    finally:
        other.kill()
        await other.wait()

    assert {b"environ", b"root", b"cwd", b"fd/0", b"oom_score_adj"} <= set(seen_outside.split())
    assert ran.stdout.split() == [b"/usr/bin/readlink", b"/bin/sleep", b"86399.5"], ran.stderr


async def test_the_level_of_protection_names_what_proc_is(open_directory: Path) -> None:
    require_programs("bwrap")
    become_subreaper()
    user = ActionUser(64321, 64321) if os.geteuid() == 0 else None
    for choice, words in (
        (ProcView.FRESH, "own /proc"),
        (ProcView.SHARED, "the worker's /proc"),
        (ProcView.NONE, "no /proc"),
    ):
        sandbox = BubblewrapSandbox(host_view(DEFAULT_READABLE_PATHS, []), action_user=user, proc=(choice,))
        assert words in await sandbox.probe(Runner(sandbox, open_directory).work.make().path)
