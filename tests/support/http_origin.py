"""An HTTP server on loopback that hands out what a test gives it, and remembers who asked."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple

from typing_extensions import override

HOST = "127.0.0.1"


class Answer(NamedTuple):
    """What one path is answered with."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = {}
    # Bytes that the length promises; None for as many as there are, -1 for no length at all.
    promised: int | None = None


class Asked(NamedTuple):
    """One request that came."""

    path: str
    headers: Mapping[str, str]


class HttpOrigin:
    """The server; its answers may change while it runs.

    Args:
        answers: By path.
        tls: Makes it an HTTPS server.
    """

    def __init__(self, answers: Mapping[str, Answer] | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.answers = dict(answers or {})
        self.asked: list[Asked] = []
        # A path in here is answered when the event is set.
        self.waits: dict[str, threading.Event] = {}
        self._was_asked = threading.Event()
        origin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                origin.asked.append(Asked(self.path, dict(self.headers)))
                origin._was_asked.set()
                if self.path in origin.waits:
                    origin.waits[self.path].wait(60)
                answer = origin.answers.get(self.path, Answer(b"nothing here", 404))
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.promised != -1:
                    self.send_header("Content-Length", str(answer.promised or len(answer.body)))
                self.end_headers()
                # Who has seen enough hangs up.
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(answer.body)

            @override
            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self._scheme = "http" if tls is None else "https"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def port(self) -> int:
        """Give the port that it listens on."""
        return self._server.server_address[1]

    def uri(self, path: str) -> str:
        """Give the address of a path."""
        return f"{self._scheme}://{HOST}:{self.port}{path}"

    def wait_asked(self) -> None:
        """Wait until the first request has come."""
        assert self._was_asked.wait(60), "nobody asked"

    def paths(self) -> list[str]:
        """List the paths that were asked for, in order."""
        return [asked.path for asked in self.asked]

    def __enter__(self) -> HttpOrigin:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for event in self.waits.values():
            event.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
