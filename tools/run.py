"""Run a whole Lathe on this machine: what ``make run`` starts once the virtual environment is there.

Starts lathe-cas, lathe-scheduler and the workers on loopback, in the foreground, prints ``lathe is ready`` and the
Bazel flags when all are healthy, starts again what dies, and stops everything on Ctrl-C or SIGTERM.

This module and its two neighbours use nothing but the standard library and import nothing of Lathe, so that they can
still say what is wrong when a service cannot even be imported. Start it as ``python -m tools.run``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from tools.run_service import Console, Keeper
from tools.run_settings import (
    HOST,
    VARIABLES,
    Settings,
    StartError,
    check_ports,
    lock_data_dir,
    read_settings,
    services,
)

# Everything must be healthy within this time, else the start has failed. A service needs about half a second.
READY_SECONDS = 60.0

# What has not stopped by then is killed, before the promised 10 s are over.
KILL_AFTER_SECONDS = 8.0


def ready_text(settings: Settings, seconds: float) -> str:
    """Compose what a user wants to copy once all is up."""
    ports = settings.ports
    workers = f"{settings.workers} worker{'' if settings.workers == 1 else 's'}"
    return f"""\
lathe is ready ({seconds:.1f} s, {workers}, data in {settings.data_dir}). Build with:

    bazel test //... --remote_instance_name=main \\
      --remote_cache=grpc://{HOST}:{ports["LATHE_CAS_PORT"]} \\
      --remote_executor=grpc://{HOST}:{ports["LATHE_SCHEDULER_PORT"]} \\
      --remote_default_exec_properties=cpu_count=1

For clients without gRPC (ccache, sccache, Gradle): http://{HOST}:{ports["LATHE_CAS_HTTP_PORT"]}/cache/
Metrics and state: http://{HOST}:{ports["LATHE_CAS_HTTP_PORT"]}/metrics, /status (cas), \
{ports["LATHE_SCHEDULER_HTTP_PORT"]} (scheduler), {ports["LATHE_WORKER_HTTP_PORT"]} (worker). Ctrl-C stops all.
"""


async def supervise(settings: Settings, environ: dict[str, str]) -> None:
    """Run everything until SIGINT, SIGTERM or SIGHUP; a second signal kills at once.

    Raises:
        StartError: The services did not become healthy.
    """
    started = time.monotonic()
    described = services(settings, Path(sys.executable).parent)
    console = Console(colour=sys.stdout.isatty(), width=max(len(service.name) for service in described))
    # The services take flags. Our variables would be settings to them, some of them unknown: LATHE_WORKER_API_PORT.
    inherited = {name: value for name, value in environ.items() if name not in VARIABLES}
    # On loopback alone, as all ports of a run are: whoever reaches it reaches the CAS itself.
    inherited.setdefault("LATHE_CAS_HTTP_CACHE", "read-write")
    keepers = [Keeper(service, console, inherited) for service in described]
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            for keeper in keepers:
                keeper.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    running = [asyncio.create_task(keeper.run(), name=keeper.service.name) for keeper in keepers]
    main = asyncio.create_task(_announce(keepers, settings, started))
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([*running, main, stopped], return_when=asyncio.FIRST_COMPLETED)
        while stopped not in done:
            for task in done:
                task.result()  # a StartError ends everything
            pending = [task for task in (*running, main, stopped) if not task.done()]
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        console.say("stopping")
    finally:
        main.cancel()
        stopped.cancel()
        await _stop(keepers, running, console)


async def _announce(keepers: list[Keeper], settings: Settings, started: float) -> None:
    try:
        async with asyncio.timeout(READY_SECONDS):
            for keeper in keepers:
                await keeper.healthy.wait()
    except TimeoutError:
        late = ", ".join(keeper.service.name for keeper in keepers if not keeper.healthy.is_set())
        raise StartError(f"not healthy after {READY_SECONDS:.0f} s: {late}") from None
    with contextlib.suppress(BrokenPipeError):
        print(ready_text(settings, time.monotonic() - started), flush=True)


async def _stop(keepers: list[Keeper], running: list[asyncio.Task[None]], console: Console) -> None:
    """Stop workers first and the CAS last, each when what needs it has ended; kill what is not done in time."""
    try:
        async with asyncio.timeout(KILL_AFTER_SECONDS):
            for prefix in ("worker", "scheduler", "cas"):
                group = [n for n, keeper in enumerate(keepers) if keeper.service.name.startswith(prefix)]
                for index in group:
                    keepers[index].terminate()
                await _ended([running[index] for index in group])
    except TimeoutError:
        for keeper, task in zip(keepers, running, strict=True):
            if not task.done():
                console.say(f"{keeper.service.name} did not stop in time; killing it")
                keeper.kill()
        await _ended(running)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for keepers, however they end."""
    if tasks:
        await asyncio.wait(tasks)


def main() -> int:
    """Run, and turn a StartError into a message and exit code 1."""
    try:
        settings = read_settings(dict(os.environ))
        lock = lock_data_dir(settings.data_dir)
        with lock:
            check_ports(settings)
            asyncio.run(supervise(settings, dict(os.environ)))
    except StartError as error:
        print(f"make run: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
