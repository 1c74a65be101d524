"""The ``lathe-health-check`` command: ask a service whether it is well, for containers and for people.

It runs every few seconds beside each service, so it starts in a tenth of a second: it speaks the one RPC that it needs
itself, and loads no library of the services but h2, nor what only the other kind of target needs.

    lathe-health-check 127.0.0.1:50051                  the gRPC health service
    lathe-health-check http://127.0.0.1:50083/healthz   an HTTP port, of a worker: it serves no gRPC

Exit code 0 if the service is serving, 1 if it is not or does not answer, 2 for wrong usage.

Spec: grpc/health/v1/health.proto, gRPC's doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
import urllib.parse
from typing import TYPE_CHECKING

from lathe_shared.endpoint import Endpoint, parse_endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_PORT = 50051
"""Of the CAS, where people point most often."""

DEFAULT_TIMEOUT_SECONDS = 4.0
"""Less than the containers' own bound on a check, so that the reason is told instead of a kill."""

_METHOD = "/grpc.health.v1.Health/Check"
_MESSAGE_PREFIX_BYTES = 5
_EMPTY_REQUEST = bytes(_MESSAGE_PREFIX_BYTES)
"""HealthCheckRequest for the whole server, uncompressed, of length 0."""

_STATUS_FIELD = 0x08
"""HealthCheckResponse.status: field 1, a varint."""

_STATUSES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
SERVING = "SERVING"
MAX_ANSWER_BYTES = 1 << 16
"""Whoever sends more is no health service."""


class NoAnswerError(Exception):
    """There was no answer that could be understood; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check what the arguments name and say what came of it.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="lathe-health-check", description="Ask a service of Lathe whether it is well: exit code 0 if it is."
    )
    parser.add_argument(
        "target", help="host or host:port of a gRPC port, or the http:// URL of a /healthz, as workers have it"
    )
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT_SECONDS, metavar="SECONDS", help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.target.startswith("http://"):
            status = check_http(arguments.target, arguments.timeout)
        else:
            try:
                endpoint = parse_endpoint(arguments.target, DEFAULT_PORT)
            except ValueError as error:
                parser.error(str(error))
            status = check_grpc(endpoint, arguments.timeout)
    except NoAnswerError as error:
        sys.stdout.write(f"{arguments.target}: {error}\n")
        return 1
    sys.stdout.write(f"{arguments.target}: {status}\n")
    return 0 if status == SERVING else 1


def check_http(url: str, timeout_seconds: float) -> str:
    """Ask a ``/healthz``.

    Returns:
        SERVING for the answer 200, NOT_SERVING for any other.

    Raises:
        NoAnswerError: Nobody answered in time.
    """
    import http.client

    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_seconds)
    try:
        connection.request("GET", parts.path or "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError(_reason(error)) from None
    finally:
        connection.close()
    return SERVING if status == http.client.OK else "NOT_SERVING"


def check_grpc(endpoint: Endpoint, timeout_seconds: float) -> str:
    """Ask a gRPC health service about the whole server.

    Returns:
        The status by its name.

    Raises:
        NoAnswerError: Nobody answered in time, or not as a health service does.
    """
    import h2.exceptions

    end = time.monotonic() + timeout_seconds
    try:
        with socket.create_connection(endpoint, timeout_seconds) as sock:
            answer = _call(sock, str(endpoint), end)
    except (OSError, h2.exceptions.ProtocolError) as error:
        raise NoAnswerError(_reason(error)) from None
    if len(answer) < _MESSAGE_PREFIX_BYTES:
        raise NoAnswerError("the answer is no message of gRPC")
    message = answer[_MESSAGE_PREFIX_BYTES:]
    if not message:
        return _STATUSES[0]
    if message[0] != _STATUS_FIELD or len(message) < 2:
        raise NoAnswerError("the answer is not a health service's")
    return _STATUSES.get(message[1], f"status {message[1]}")


def _call(sock: socket.socket, authority: str, end: float) -> bytes:
    import h2.config
    import h2.connection
    import h2.events

    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": _METHOD,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    stream_id = connection.get_next_available_stream_id()
    connection.send_headers(stream_id, list(headers.items()))
    connection.send_data(stream_id, _EMPTY_REQUEST, end_stream=True)
    answer = b""
    while len(answer) <= MAX_ANSWER_BYTES:
        sock.sendall(connection.data_to_send())
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        data = sock.recv(1 << 16)
        if not data:
            raise NoAnswerError("the connection was closed without an answer")
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                answer += event.data
            elif isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                _check_status({str(name): str(value) for name, value in event.headers})
            elif isinstance(event, h2.events.StreamReset):
                raise NoAnswerError("the call was reset")
            elif isinstance(event, h2.events.StreamEnded):
                return answer
    raise NoAnswerError("the answer is far too long for a health service's")


def _check_status(headers: dict[str, str]) -> None:
    if headers.get(":status", "200") != "200":
        raise NoAnswerError(f"HTTP status {headers[':status']}")
    if headers.get("grpc-status", "0") != "0":
        raise NoAnswerError(f"gRPC status {headers['grpc-status']}: {headers.get('grpc-message', '')}")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


if __name__ == "__main__":
    sys.exit(main())
