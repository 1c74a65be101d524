"""Metrics of several processes, told by one of them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from lathe_shared import group_member
from lathe_shared.group_member import GroupMember, Report, exposition_of, report_socket
from lathe_shared.metrics import ServiceMetrics

COUNT = 3


def metrics_of(number: int) -> str:
    """What a process counts: of its own, and of what all of them share."""
    metrics = ServiceMetrics("cas", CollectorRegistry())
    metrics.counter("calls", "Calls, \\ and\nmore", ["method"]).labels('with "quotes"').inc(10 + number)
    metrics.histogram("seconds", "How long", buckets=(1, 2)).observe(number)
    metrics.gauge("blobs", "Of the store").set(100 + number)
    return metrics.exposition().decode()


def samples(exposition: bytes, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    found = {}
    for family in text_string_to_metric_families(exposition.decode()):
        for sample in family.samples:
            if sample.name == name:
                key = tuple(sorted(sample.labels.items()))
                assert key not in found
                found[key] = sample.value
    return found


def test_each_process_is_told_apart_and_what_they_share_is_told_once() -> None:
    together = exposition_of([(number, metrics_of(number)) for number in (2, 0, 1)], {"lathe_cas_blobs"})
    calls = samples(together, "lathe_cas_calls_total")
    assert calls == {(("method", 'with "quotes"'), ("process", str(number))): 10 + number for number in range(3)}
    assert samples(together, "lathe_cas_blobs") == {(): 102}, "the one that is asked speaks"
    buckets = samples(together, "lathe_cas_seconds_bucket")
    assert buckets[("le", "1.0"), ("process", "1")] == buckets[("le", "2.0"), ("process", "2")] == 1
    for name, kind in (("calls_total", "counter"), ("seconds", "histogram"), ("blobs", "gauge")):
        assert together.decode().count(f"# TYPE lathe_cas_{name} {kind}\n") == 1


@asynccontextmanager
async def members(directory: Path, count: int = COUNT) -> AsyncIterator[list[GroupMember]]:
    async with AsyncExitStack() as stack:
        found = []
        for number in range(count):
            reports = socket.socket(socket.AF_UNIX)
            reports.bind(report_socket(directory, number))
            reports.listen()
            found.append(GroupMember(number, count, {}, reports, directory, lambda: None))
            stack.callback(reports.close)
            stack.push_async_callback(found[-1].aclose)
        yield found


async def test_members_hear_of_each_other(tmp_path: Path) -> None:
    large = "# much to tell\n" * 100_000
    async with members(tmp_path) as group:
        for member in group:
            number = member.number
            await member.serve_reports(lambda number=number: (large + metrics_of(number), {"number": number}))  # type: ignore[misc]
        for member in group:
            others = [number for number in range(COUNT) if number != member.number]
            assert [(other.number, other.status) for other in await member.others()] == [
                (number, {"number": number}) for number in others
            ]


async def test_one_that_does_not_answer_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is being started anew has its socket already; one that is gone for good has none."""
    monkeypatch.setattr(group_member, "ASK_SECONDS", 0.05)
    async with members(tmp_path, 4) as group:
        await group[1].serve_reports(lambda: ("text", {}))
        os.unlink(report_socket(tmp_path, 3))
        assert await group[0].others() == [Report(1, "text", {})]
        # Whoever asks and goes away disturbs nobody.
        _, writer = await asyncio.open_unix_connection(report_socket(tmp_path, 1))
        writer.close()
        assert await group[0].others() == [Report(1, "text", {})]
