"""h2load as a client: the same unary request over and over, by a program in C that is never the limit.

It does not know gRPC. So it is watched by what it counts: every stream must have ended well, and the DATA that came
must be what that many right answers have; an error in gRPC is a response without any.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from tools.bench.errors import BenchError
from tools.bench.processes import run_client
from tools.bench.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FINISHED = re.compile(r"^finished in ([0-9.]+)(us|ms|s|m|h),", re.MULTILINE)
_REQUESTS = re.compile(r"^requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded,", re.MULTILINE)
_DATA = re.compile(r"^traffic: .*\((\d+)\) data$", re.MULTILINE)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Summary(NamedTuple):
    """What h2load says at its end.

    Attributes:
        seconds: How long it took.
        done: Requests that were answered.
        succeeded: Those with an HTTP status of success.
        data_bytes: Payload of DATA frames received.
    """

    seconds: float
    done: int
    succeeded: int
    data_bytes: int


def parse(output: str) -> Summary:
    """Read h2load's output.

    Raises:
        BenchError: It is not what h2load writes after a run.
    """
    finished, requests, data = (pattern.search(output) for pattern in (_FINISHED, _REQUESTS, _DATA))
    if finished is None or requests is None or data is None:
        raise BenchError(f"h2load says what was not expected:\n{output}")
    return Summary(float(finished[1]) * _SECONDS[finished[2]], int(requests[1]), int(requests[2]), int(data[1]))


def run_h2load(
    address: str,
    path: str,
    body: Path,
    *,
    calls: int,
    connections: int,
    streams: int,
    response_bytes: int,
    cores: frozenset[int],
    prefix: Sequence[str] = (),
) -> Timing:
    """Make unary calls with one request.

    Args:
        address: ``host:port`` of the server.
        path: The method.
        body: File with the request as it stands in a DATA frame: five bytes of prefix, and the message.
        calls: How many.
        connections: How many connections.
        streams: Calls in flight on each of them.
        response_bytes: DATA that each answer has at least.
        cores: Where h2load may run.
        prefix: Program and flags that start it, such as ``nice``.

    Raises:
        BenchError: Not all calls were answered well.
    """
    command = [*prefix, "h2load", f"-n{calls}", f"-c{min(connections, calls)}", f"-m{streams}", f"-d{body}"]
    # Windows of 1 GiB: a reader that never makes the server wait.
    command += ["-w30", "-W30", "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}{path}"]
    output = run_client(command, cores)
    summary = parse(output)
    if summary.succeeded != calls or summary.data_bytes < calls * response_bytes:
        raise BenchError(f"calls to {path} failed:\n{output}")
    return Timing(calls, summary.seconds)
