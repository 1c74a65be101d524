"""The benchmark itself, on real servers with real clients, and as few calls as there can be."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tools.bench.__main__ import main
from tools.bench.errors import BenchError
from tools.bench.h2load import run_h2load
from tools.bench.lean_client import WRITE
from tools.bench.message_file import write_framed
from tools.bench.processes import run_client, server
from tools.bench.rows import all_rows

# Several stages, and a part chunk.
LARGE_BYTES = 3_000_000

SHORT = ["--seconds=0", "--turns=1", f"--large-bytes={LARGE_BYTES}"]


def measured(results: Path) -> list[dict[str, Any]]:
    (path,) = results.iterdir()
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_every_row_can_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--engine=lathe", f"--results={tmp_path}"]) == 0

    rows = measured(tmp_path)
    assert [row["call"] for row in rows] == [row.name for row in all_rows()]
    assert all(row["engines"]["lathe"]["best"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in all_rows())


def test_both_engines_in_one_run(tmp_path: Path) -> None:
    assert main([*SHORT, "--rows=Async|async|1 present", f"--results={tmp_path}"]) == 0

    for row in measured(tmp_path):
        assert set(row["engines"]) == {"lathe", "grpclib"}
        assert row["ratio"] > 0


def test_server_by_address(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "lathe-cas"),
        *("--host=127.0.0.1", "--port=0", "--http-port=0", "--instance-names=other", f"--data-dir={tmp_path / 'cas'}"),
    ]
    results = tmp_path / "results"
    with server(command, frozenset(os.sched_getaffinity(0)), tmp_path / "log") as cas:
        arguments = [*SHORT, f"--target={cas.address}", "--instance-name=other", f"--results={results}"]
        assert main([*arguments, "--rows=echo|outputs|Read, 1 KiB|Write, 1 KiB"]) == 0

    rows = measured(results)
    # The echo is our own server's alone.
    assert {row["call"] for row in rows} == {
        "GetActionResult hit, 3 outputs",
        "ByteStream.Read, 1 KiB",
        "ByteStream.Write, 1 KiB",
    }
    assert all(list(row["engines"]) == ["target"] for row in rows)


def test_calls_that_fail_are_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        str(Path(sys.executable).parent / "lathe-cas"),
        *("--host=127.0.0.1", "--port=0", "--http-port=0", "--instance-names=other", f"--data-dir={tmp_path / 'cas'}"),
    ]
    cores = frozenset(os.sched_getaffinity(0))
    with server(command, cores, tmp_path / "log") as cas:
        assert main([*SHORT, f"--target={cas.address}", f"--results={tmp_path}", "--rows=1 present"]) == 1
        assert "instance" in capsys.readouterr().err
        # An error in gRPC is a success in HTTP.
        with pytest.raises(BenchError, match="failed"):
            run_h2load(
                cas.address,
                WRITE,
                write_framed(tmp_path, b""),
                calls=10,
                connections=1,
                streams=1,
                response_bytes=5,
                cores=cores,
            )
        flags = [f"--address={cas.address}", "--instance-name=main", "--salt=x", "--blob-bytes=100", "--calls=3"]
        with pytest.raises(BenchError, match="instance"):
            run_client([sys.executable, "-m", "tools.bench.lean_client", *flags], cores)


def test_server_that_does_not_start_is_told_with_its_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no room here')"]
    cores = frozenset(os.sched_getaffinity(0))

    with pytest.raises(BenchError, match="no room here"), server(command, cores, tmp_path / "log"):
        pass
