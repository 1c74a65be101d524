"""Keep one service process of ``make run`` running, and its output readable."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time

from tools.run_settings import HOST, Service, StartError

HEALTH_POLL_SECONDS = 0.05
HEALTH_REQUEST_SECONDS = 2.0

# A service that dies starts again at once, then after doubling pauses; having lived this long clears its record.
BACKOFF_FIRST_SECONDS = 0.5
BACKOFF_LIMIT_SECONDS = 30.0
BACKOFF_FORGIVEN_SECONDS = 60.0
# Before the first readiness a service that ends this often in a row has an error that no further start will cure.
START_ATTEMPTS = 3

# How long a dead service's last lines are waited for.
LAST_WORDS_SECONDS = 0.5

# A log line (a traceback can be one) longer than this is passed on in pieces.
LINE_LIMIT_BYTES = 1 << 20

# Runs between fork and the service, in the child itself: asks the kernel to kill it when the supervisor dies by
# whatever cause, then becomes the service. As a preexec_fn it would run Python code in a fork of this process, which is
# not safe with threads; as a program of its own it costs 10 ms. The second look at the parent closes the race with a
# supervisor that died before the request.
TETHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the supervisor is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

LEVEL_COLOURS = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
DIM, BOLD, RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Console:
    """Print the services' lines, JSON log records as something to read, and the supervisor's own.

    Args:
        colour: Whether the terminal shows colours.
        width: Columns for the name in front of each line.
    """

    def __init__(self, *, colour: bool, width: int) -> None:
        self._colour = colour
        self._width = width

    def say(self, text: str) -> None:
        """Print as the supervisor."""
        self._print("lathe", text, BOLD)

    def service_line(self, name: str, line: str) -> None:
        """Print a line that a service wrote: a structlog record in JSON, or anything else as it is."""
        record = None
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
        if not isinstance(record, dict) or "event" not in record:
            self._print(name, line, "")
            return
        level = str(record.pop("level", "info"))
        moment = str(record.pop("timestamp", "")).partition("T")[2][:8]
        trace = record.pop("exception", None)
        record.pop("service", None)
        text = " ".join([moment, f"{level:7}", str(record.pop("event")), *(f"{k}={v}" for k, v in record.items())])
        self._print(name, text.strip(), LEVEL_COLOURS.get(level, ""))
        for part in str(trace).splitlines() if trace else ():
            self._print(name, f"    {part}", DIM)

    def _print(self, name: str, text: str, colour: str) -> None:
        front = f"[{name}]".ljust(self._width + 2)
        if self._colour:
            front = f"{DIM}{front}{RESET}"
            text = f"{colour}{text}{RESET}" if colour else text
        # Whoever read our output may be gone while the services still stop.
        with contextlib.suppress(BrokenPipeError):
            print(front, text, flush=True)


class Keeper:
    """Keep one service running until told to stop.

    Args:
        service: What to run.
        console: Where its output goes.
        environ: Its environment.

    Attributes:
        healthy: Set from the first healthy answer on.
    """

    def __init__(self, service: Service, console: Console, environ: dict[str, str]) -> None:
        self.service = service
        self.healthy = asyncio.Event()
        self._console = console
        self._environ = environ
        self._process: asyncio.subprocess.Process | None = None
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Start the service, and again whenever it ends, until `terminate` or `kill`.

        Raises:
            StartError: It ended `START_ATTEMPTS` times before it was ever healthy.
        """
        failures = 0
        while not self._stop.is_set():
            started = time.monotonic()
            code = await self._run_once()
            if self._stop.is_set():
                return
            failures = 1 if time.monotonic() - started > BACKOFF_FORGIVEN_SECONDS else failures + 1
            ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if not self.healthy.is_set() and failures == START_ATTEMPTS:
                raise StartError(f"{self.service.name} {ending} before it was healthy; its own lines above say why")
            pause = min(BACKOFF_FIRST_SECONDS * 2 ** (failures - 1), BACKOFF_LIMIT_SECONDS)
            self._console.say(f"{self.service.name} {ending}; starting it again in {pause:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)

    def terminate(self) -> None:
        """Ask the service to end, and let it not come back."""
        self._stop.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the service without asking."""
        self._stop.set()
        self._signal(signal.SIGKILL)

    async def _run_once(self) -> int:
        """Run the service to its end and return its exit code, negative for a signal."""
        output, child_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid())],
                *self.service.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=child_end,
                stderr=child_end,
                env=self._environ,
                # Ctrl-C on the terminal reaches the supervisor alone, which then stops the services in their order.
                process_group=0,
            )
        finally:
            os.close(child_end)
        self._process = process
        if self._stop.is_set():  # told while the process was being made
            self._signal(signal.SIGTERM)
        reader = asyncio.create_task(self._pass_on(output))
        watch = asyncio.create_task(self._watch_health())
        try:
            code = await process.wait()
            # What the service left running may hold the other end, but has no say in when the service is over.
            await asyncio.wait([reader], timeout=LAST_WORDS_SECONDS)
            return code
        finally:
            reader.cancel()
            watch.cancel()

    async def _pass_on(self, output: int) -> None:
        stream = asyncio.StreamReader(limit=LINE_LIMIT_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(output, "rb")
        )
        try:
            while line := await _read_line(stream):
                self._console.service_line(self.service.name, line.decode(errors="replace").rstrip("\n"))
        finally:
            transport.close()

    async def _watch_health(self) -> None:
        while not await answers_healthy(self.service.http_port):  # noqa: ASYNC110 -- another process has no event to wait for
            await asyncio.sleep(HEALTH_POLL_SECONDS)
        if self.healthy.is_set():
            self._console.say(f"{self.service.name} is healthy again")
        self.healthy.set()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """Read a line, or a piece of one that is beyond the limit; nothing at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as rest:
        return rest.partial
    except asyncio.LimitOverrunError:
        return await stream.read(LINE_LIMIT_BYTES)


async def answers_healthy(port: int) -> bool:
    """Ask /healthz on a port of loopback."""
    try:
        async with asyncio.timeout(HEALTH_REQUEST_SECONDS):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split(b" ")[1:2] == [b"200"]
