"""What an action must not be able to do, tried in the real sandbox."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.integration.worker.processes import processes_with

from lathe_shared.digest import Digest, DigestFunction
from lathe_worker.action_executor import ExecutionSettings
from lathe_worker.cache_files import file_name
from lathe_worker.sandbox import SandboxSpec

if TYPE_CHECKING:
    from tests.integration.worker.workbench import Workbench

VICTIM = b"the input as it was\n"


def cached(bench: Workbench, content: bytes = VICTIM, *, is_executable: bool = False) -> Path:
    """Return where the cache keeps an input."""
    digest = Digest.of(content)
    name = file_name(digest.hash, digest.size_bytes, DigestFunction.SHA256, is_executable=is_executable)
    return Path(bench.cache.path(name))


@pytest.mark.parametrize("is_executable", [False, True])
@pytest.mark.parametrize(
    "attack",
    [
        "echo more >> victim",
        ": > victim",
        "chmod 0777 victim; echo more >> victim",
        "touch -d 2001-01-01 victim; truncate -s 3 victim",
        "rm -f victim; echo replaced > victim",
        "ln victim link; chmod 0666 link; echo more >> link",
        "mv victim renamed; dd if=/dev/zero of=renamed conv=notrunc count=1",
        "chown $(id -u) victim; setfattr -n user.x -v y victim; exec 3<> victim && echo more >&3",
        'python3 -c \'import mmap; f=open("victim","r+b"); mmap.mmap(f.fileno(),0)[:1]=b"X"\'',
    ],
)
async def test_a_cached_input_stays_as_it_was(bench: Workbench, attack: str, is_executable: bool) -> None:
    await bench.run("cat victim", inputs={"victim": (VICTIM, is_executable)})
    path = cached(bench, is_executable=is_executable)
    before = path.stat()

    ran = await bench.run(f"( {attack} ); true", inputs={"victim": (VICTIM, is_executable)})
    again = await bench.run("cat victim; stat -c %a victim", inputs={"victim": (VICTIM, is_executable)})

    assert ran.exit_code == 0
    after = path.stat()
    assert path.read_bytes() == VICTIM
    assert (after.st_mode, after.st_uid, after.st_gid, after.st_ino, after.st_mtime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
        before.st_ino,
        before.st_mtime_ns,
    )
    assert again.stdout == VICTIM + (b"555\n" if is_executable else b"444\n")


async def test_there_is_no_network(bench: Workbench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = await bench.run(
            "/bin/bash",
            "-c",
            f"exec 3<> /dev/tcp/127.0.0.1/{port} && echo connected; cat /proc/net/dev | tail -n +3 | cut -d: -f1",
        )

    assert ran.stdout.split() == [b"lo"]
    assert b"refused" in ran.stderr


async def test_the_network_is_there_where_operator_and_action_want_it(bench: Workbench) -> None:
    settings = ExecutionSettings("bench", network="on_request")
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = f"exec 3<> /dev/tcp/127.0.0.1/{server.getsockname()[1]} && echo connected"
        wanting = bench.request("/bin/bash", "-c", script, platform={"network": "on"})
        silent = bench.request("/bin/bash", "-c", script)
        assert settings.allows_network(wanting)
        assert not settings.allows_network(silent)
        assert not ExecutionSettings("bench").allows_network(wanting)

        work = bench.work.make()
        spec = SandboxSpec(
            argv=wanting.command.arguments,
            environment=wanting.environment,
            exec_root=work.exec_root,
            temporary_directory=work.temporary,
            stdout_path=work.stdout,
            stderr_path=work.stderr,
            network=True,
        )
        result = await bench.sandbox.run(spec)

    assert result.exit_code == 0
    assert work.stdout.read_bytes() == b"connected\n"
    bench.work.discard(work)


async def test_the_worker_s_files_and_home_directories_are_out_of_sight(bench: Workbench) -> None:
    ran = await bench.run(
        f"ls -A {bench.cache_directory} {bench.directory} /root /home /var/lib /srv /run /sys; "
        f"echo x > {bench.directory}/x; ls -A /tmp; echo done"
    )

    assert ran.stdout == b"done\n"
    assert list(bench.directory.glob("x")) == []


async def test_a_data_directory_inside_a_readable_path_is_hidden(open_directory: Path) -> None:
    from lathe_worker.sandboxes.bubblewrap_arguments import host_view

    view = host_view([str(open_directory.parent)], [open_directory])

    assert list(view.arguments[-4:]) == ["--tmpfs", str(open_directory), "--remount-ro", str(open_directory)]


async def test_nothing_outside_the_input_root_and_tmp_can_be_written(bench: Workbench) -> None:
    ran = await bench.run(
        "for d in / /usr /etc /lathe /bin /proc/sys/kernel; do touch $d/lathe_probe && echo $d; done;"
        "touch /tmp/fine /var/tmp/fine /dev/shm/fine /lathe/root/fine; echo end"
    )

    assert ran.stdout == b"end\n"


async def test_tmp_is_empty_for_each_action(bench: Workbench) -> None:
    await bench.run("echo secret > /tmp/secret; echo secret > /dev/shm/secret")
    ran = await bench.run("ls -A /tmp /var/tmp /dev/shm; mount > /dev/null; true")

    assert ran.stdout == b"/dev/shm:\n\n/tmp:\n\n/var/tmp:\n"


@pytest.mark.parametrize(
    "start",
    [
        "sleep MARK & true",
        "setsid sleep MARK > /dev/null 2>&1 < /dev/null & true",
        "(setsid sh -c 'sleep MARK & sleep MARK & wait' > /dev/null 2>&1 &) & true",
        "nohup setsid sleep MARK &",
        "python3 -c 'import os,time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(1e6); \"MARK\"'",
    ],
)
async def test_no_process_outlives_its_action(bench: Workbench, start: str) -> None:
    mark = str(uuid.uuid4().int % 10**12)
    ran = await bench.run(start.replace("MARK", mark) + "\necho started")

    assert ran.stdout == b"started\n"
    assert processes_with(mark) == []


async def test_a_daemon_that_holds_standard_output_open_does_not_hold_the_action(bench: Workbench) -> None:
    ran = await bench.run("sleep 100000 & echo parent is done")

    assert ran.stdout == b"parent is done\n"
    assert ran.exit_code == 0


async def test_a_cancelled_action_is_dead_when_the_cancellation_is_raised(bench: Workbench) -> None:
    mark = str(uuid.uuid4().int % 10**12)
    request = bench.request(f"setsid sleep {mark} & trap '' TERM INT; sleep {mark}")
    task = asyncio.ensure_future(bench.execute(request))
    while not processes_with(f"sleep\0{mark}"):
        assert not task.done()
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert processes_with(mark) == []


async def test_an_action_cancelled_at_any_moment_leaves_nothing(bench: Workbench) -> None:
    mark = str(uuid.uuid4().int % 10**12)
    for turns in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55):
        task = asyncio.ensure_future(bench.run(f"sleep {mark}", inputs={"a": b"a"}))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert processes_with(mark) == []


async def test_it_runs_as_nobody_in_particular(bench: Workbench) -> None:
    ran = await bench.run(
        "id -G; grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs' /proc/self/status; hostname; ls /proc/self/fd; tty"
    )

    lines = ran.stdout.decode().split("\n")
    user = bench.sandbox.action_user
    assert lines[0] == (str(user.gid) if user else str(os.getgid()))
    assert {line.split()[1] for line in lines[1:4]} == {"0000000000000000"}
    assert lines[4].split()[1] == "1"
    assert lines[5] == "lathe"
    # 3 is the directory that ls reads.
    assert lines[6:10] == ["0", "1", "2", "3"]
    assert lines[10] == "not a tty"
