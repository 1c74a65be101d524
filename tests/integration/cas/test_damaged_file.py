"""A CAS whose file has a page that ends the process: the log says so, and what is whole is saved for the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.contract.cas.blob_making import content, put, read
from tests.contract.cas.lmdb_store import LmdbStore

from lathe_cas.fsck.command import main as fsck
from lathe_shared.digest import Digest

CRASHED, SOMETHING_LOST = 5, 1


def serve(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lathe_cas", f"--data-dir={path}", "--port=0", "--http-port=0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


async def test_a_page_that_ends_the_process_is_told_by_the_log_and_survived_by_salvage(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "old")
    await store.open()
    blobs = [content(1_000, seed) for seed in range(200)]
    await put(store.blobs, *blobs)
    await store.close()
    with (store.path / "data.mdb").open("r+b") as file:
        file.truncate(40 * 4096)

    died = serve(store.path)
    assert died.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in died.stderr
    assert "lmdb_environment.py" in died.stderr

    assert fsck([f"--data-dir={store.path}"], {}) == CRASHED
    assert fsck([f"--data-dir={store.path}", f"--salvage={tmp_path / 'new'}"], {}) == SOMETHING_LOST
    new = LmdbStore(tmp_path / "new")
    await new.open()
    there = [data for data in blobs if not new.blobs.find_missing([(d := Digest.of(data), d.key, d.size_bytes)])]
    assert there
    for data in there:
        assert await read(new.blobs, Digest.of(data)) == data
    await new.recount()
    await new.close()
