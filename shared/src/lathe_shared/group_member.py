"""What a process knows of the group that it serves in: its place, its sockets, and the others' figures.

Each process counts for itself. Whoever is asked on the HTTP port asks the others, over Unix sockets in a folder that
only this service can enter, and tells all of it: metrics get a label ``process``, so that one that was started anew
begins its own counts again and nobody else's.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from typing_extensions import override

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

ASK_SECONDS = 2.0
"""How long the others have to answer; one that is being started anew does not, and is left out."""

_log = structlog.get_logger("lathe.group")


@dataclass(frozen=True, slots=True)
class Report:
    """What one process tells of itself.

    Attributes:
        number: Its place in the group, from 0.
        metrics: Everything that it counts, in Prometheus's text format.
        status: What its ``/status`` shows.
    """

    number: int
    metrics: str
    status: dict[str, Any]


class GroupMember:
    """One of several processes that share ports and data.

    Args:
        number: Its place in the group, from 0.
        count: How many there are.
        sockets: Bound sockets by the names of the ports.
        reports: Where this one's reports are asked for.
        directory: Where the others' sockets are, each named as ``report_socket`` says.
        on_ready: Called once it serves.
    """

    def __init__(
        self,
        number: int,
        count: int,
        sockets: Mapping[str, socket.socket],
        reports: socket.socket,
        directory: Path,
        on_ready: Callable[[], None],
    ) -> None:
        self.number = number
        self.count = count
        self.sockets = sockets
        self.on_ready = on_ready
        self._reports = reports
        self._directory = directory
        self._server: asyncio.AbstractServer | None = None

    async def serve_reports(self, report: Callable[[], tuple[str, dict[str, Any]]]) -> None:
        """Answer the others from now on.

        Args:
            report: Returns metrics and status, as ``Report`` has them.
        """

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                metrics, status = report()
                writer.write(json.dumps({"metrics": metrics, "status": status}, default=str).encode())
                await writer.drain()
            except OSError:
                pass  # who asked did not wait
            finally:
                writer.close()

        self._server = await asyncio.start_unix_server(answer, sock=self._reports)

    async def others(self) -> list[Report]:
        """Ask the others, all at the same time; those that answer, in order."""
        numbers = [number for number in range(self.count) if number != self.number]
        answers = await asyncio.gather(*(self._ask(number) for number in numbers))
        return [answer for answer in answers if answer is not None]

    async def _ask(self, number: int) -> Report | None:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                reader, writer = await asyncio.open_unix_connection(report_socket(self._directory, number))
                try:
                    answer = json.loads(await reader.read())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError) as error:
            _log.warning("process_not_heard_of", other=number, error=str(error) or "it does not answer")
            return None
        return Report(number, answer["metrics"], answer["status"])

    async def aclose(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


def report_socket(directory: Path, number: int) -> str:
    """Return the path of the socket on which a process is asked for its report."""
    return os.fspath(directory / f"{number}.sock")


def exposition_of(reports: Iterable[tuple[int, str]], common: Collection[str]) -> bytes:
    """Put the metrics of several processes together, in Prometheus's text format.

    Args:
        reports: For each process its number and its metrics. The first one speaks for all where they say the same.
        common: Names of metrics that are the same in every process, since they are about what these share.
    """
    return generate_latest(_Together(reports, common))


class _Together(Collector):
    def __init__(self, reports: Iterable[tuple[int, str]], common: Collection[str]) -> None:
        self._families: dict[str, Metric] = {}
        for place, (number, text) in enumerate(reports):
            for family in text_string_to_metric_families(text):
                if family.name not in common:
                    self._add(number, family)
                elif not place:
                    self._families[family.name] = family

    def _add(self, number: int, family: Metric) -> None:
        known = self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        for sample in family.samples:
            known.add_sample(sample.name, {**sample.labels, "process": str(number)}, sample.value)

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()
