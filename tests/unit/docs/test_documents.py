"""The documents against the code: links, file names, metrics, dependencies."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from tests.unit.worker.memory_blobs import MemoryBlobs

from lathe_cas.cas_metrics import CasCounters, CasMetrics, HttpCacheCounts
from lathe_cas.config import CasSettings
from lathe_cas.stores.lmdb_blob_store import LmdbBlobStore
from lathe_cas.stores.lmdb_storage import LmdbStorage
from lathe_scheduler.scheduler_metrics import SchedulerMetrics
from lathe_shared.metrics import ServiceMetrics
from lathe_shared.rpc_observer import RpcObserver
from lathe_shared.testing.fake_clock import FakeClock
from lathe_worker.file_cache import FileCache
from lathe_worker.worker_metrics import WorkerMetrics

ROOT = Path(__file__).parents[3]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "services").glob("*/README.md")),
]
DISTRIBUTIONS = ["protos", "shared", "services/cas", "services/scheduler", "services/worker"]

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|toml|proto|md)|/)", re.ASCII)
_METRIC = re.compile(r"lathe_(?:cas|scheduler|worker)_[a-z_]+", re.ASCII)


@cache
def prose(document: Path) -> str:
    """Return a document without its code blocks."""
    return _FENCED.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


def test_the_ways_from_the_readme_lead_to_every_document() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in _LINK.findall(prose(ROOT / "README.md"))}

    assert [d for d in DOCUMENTS[1:] if d not in linked and d.parent not in linked] == []


def test_files_named_by_the_architecture_exist() -> None:
    places = [ROOT, *(ROOT / name / "src" for name in DISTRIBUTIONS), *ROOT.glob("services/*/src/lathe_*")]
    named = [code for code in _CODE.findall(prose(ROOT / "docs/architecture.md")) if _PATH.fullmatch(code)]

    assert len(named) > 50, "the pattern for paths does not find what is there"
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def exposed_name(metric: Metric) -> str:
    return metric.name + "_total" if metric.type == "counter" else metric.name


async def registered_metrics(directory: Path) -> set[str]:
    """Make every service's metrics, and return their names as ``/metrics`` shows them."""
    registry = CollectorRegistry()
    for service in ("cas", "scheduler", "worker"):
        RpcObserver(ServiceMetrics(service, registry))
    storage = LmdbStorage(directory, CasSettings().storage_options(), FakeClock())
    try:
        CasMetrics(ServiceMetrics("cas", registry), CasCounters(), LmdbBlobStore(storage).status)
        HttpCacheCounts(ServiceMetrics("cas", registry))
        SchedulerMetrics(ServiceMetrics("scheduler", registry))
        worker = WorkerMetrics(ServiceMetrics("worker", registry))
        worker.watch_cache(FileCache(directory / "inputs", 1, MemoryBlobs()))
        return {exposed_name(metric) for metric in registry.collect()}
    finally:
        await storage.aclose()


async def test_operations_names_the_metrics_that_there_are(tmp_path: Path) -> None:
    described = set(_METRIC.findall(" ".join(_CODE.findall(prose(ROOT / "docs/operations.md")))))

    assert described == await registered_metrics(tmp_path / "cas")


def test_no_other_module_registers_metrics() -> None:
    makers = re.compile(r"\bmetrics\.(?:counter|gauge|histogram)\(|\bregistry\.register\(")
    modules = {
        path.stem
        for name in DISTRIBUTIONS
        for path in (ROOT / name / "src").rglob("*.py")
        if makers.search(path.read_text())
    }

    # `metrics` itself makes the counters that somebody else counts.
    assert modules == {"metrics", "rpc_observer", "cas_metrics", "scheduler_metrics", "worker_metrics"}


def names_of_dependencies(distribution: str) -> set[str]:
    project = tomllib.loads((ROOT / distribution / "pyproject.toml").read_text())["project"]
    return {re.split(r"[\[<>=~! ;]", requirement)[0] for requirement in project["dependencies"]}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_dependency_has_its_reason(distribution: str) -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", prose(ROOT / "docs/adr/0007-dependencies.md"), re.MULTILINE)
    explained = {
        package
        for packages, users in rows
        for package in packages.split(", ")
        if Path(distribution).name in re.findall(r"\w+", users)
    }

    assert {name for name in names_of_dependencies(distribution) if not name.startswith("lathe-")} - explained == set()
