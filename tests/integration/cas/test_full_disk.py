"""A real CAS process on a file system that really fills up, and has room again later."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.reapi_client import ReapiClient, digest_of, reapi_message
from tests.support.required import require_private_mounts
from tests.support.service_process import HOST, ServiceProcess, free_ports

from lathe_cas.fsck.command import main as fsck

DISK_BYTES = 48 << 20
BALLAST_BYTES = 24 << 20
LIMIT_BYTES = 1 << 30
MANY = 5_000
"""More than fit."""

# The disk is this process's alone, and is gone with it. What is removed to make room must lie on the same disk.
START = """
mount -t tmpfs -o size={disk_bytes} tmpfs "{folder}" &&
head -c {ballast_bytes} /dev/zero > "{folder}/ballast" &&
exec "$@"
"""


class SmallDisk:
    """A CAS whose data lies on a small disk."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "disk"
        self.folder.mkdir()
        require_private_mounts(self.folder)
        self.port, http_port = free_ports(2)
        script = START.format(folder=self.folder, disk_bytes=DISK_BYTES, ballast_bytes=BALLAST_BYTES)
        flags = [
            f"--host={HOST}",
            f"--port={self.port}",
            f"--http-port={http_port}",
            f"--data-dir={self.folder / 'cas'}",
            f"--max-size-bytes={LIMIT_BYTES}",
        ]
        probe = ServiceProcess("cas", "lathe-cas", flags, http_port, root / "cas.log")
        command = ["--mount", "sh", "-c", script, "sh", *probe.command]
        self.process = ServiceProcess("cas", "/usr/bin/unshare", command, http_port, root / "cas.log")

    @property
    def seen_from_here(self) -> Path:
        """Locate the disk's folder from outside of the process's own mounts."""
        return Path(f"/proc/{self.process.pid}/root{self.folder}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path)
    disk.process.start()
    try:
        disk.process.wait_healthy()
        yield disk
    finally:
        disk.process.discard()


def content(size_bytes: int, seed: int) -> bytes:
    return random.Random(f"{size_bytes} {seed}").randbytes(size_bytes)


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "full" in (refused.value.details() or "")
    return refused.value


def fits(call: Callable[[], object]) -> bool:
    """Do something; False if it was refused for want of room."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or "the disk is full" not in (error.details() or ""):
            raise
        return False
    return True


def all_fit(statuses: list[Any]) -> bool:
    """Tell whether all blobs of a batch were stored; those that were not were refused for want of room."""
    for status in statuses:
        if status.code:
            assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert "the disk is full" in status.message
    return not any(status.code for status in statuses)


def action_result(exit_code: int, blob: bytes) -> Any:
    result = reapi_message("ActionResult", exit_code=exit_code)
    result.output_files.add(path="out", digest=digest_of(blob))
    return result


def test_a_full_disk_refuses_what_does_not_fit_and_loses_nothing(disk: SmallDisk) -> None:
    first = content(1_000, 0)
    kept = [first]
    results = [(digest_of(b"action"), action_result(1, first))]
    later = digest_of(b"later")
    with ReapiClient(disk.port, disk.port) as client:
        client.upload(first)
        client.put_action_result(*results[0])
        # In large pieces, then in small ones: down to where nothing at all fits.
        for size_bytes in (1 << 18, 3_000):
            for seed in range(MANY):
                data = content(size_bytes, seed)
                if not all_fit(client.try_to_upload(data)):
                    break
                kept.append(data)
        for number in range(MANY):
            later = digest_of(b"later %d" % number)
            if not fits(lambda later=later: client.put_action_result(later, action_result(2, first))):  # type: ignore[misc]
                break
            results.append((later, action_result(2, first)))
        assert client.action_result(later) is None
        assert len(kept) > 20

        refused = content(900_000, 1)
        large = content(6 << 20, 1)
        refusal(lambda: client.write(refused))
        refusal(lambda: client.write(large))
        assert len(client.missing(digest_of(refused), digest_of(large))) == 2

        def check_kept() -> None:
            assert client.missing(*map(digest_of, kept)) == []
            for data in kept:
                assert client.read_stream(digest_of(data)) == data
            for action, result in results:
                assert client.action_result(action) == result

        check_kept()
        assert disk.process.metrics().total("lathe_cas_failed_commits_total") > 0
        assert fsck([f"--data-dir={disk.seen_from_here / 'cas'}"], {}) == 0

        (disk.seen_from_here / "ballast").unlink()
        client.write(refused)
        client.write(large)
        client.put_action_result(later, action_result(2, refused))
        kept += [refused, large]
        check_kept()
        assert client.action_result(later) == action_result(2, refused)
        assert fsck([f"--data-dir={disk.seen_from_here / 'cas'}"], {}) == 0
    assert disk.process.stop() == 0


def test_of_a_batch_only_what_the_disk_has_no_room_for_is_refused(disk: SmallDisk) -> None:
    with ReapiClient(disk.port, disk.port) as client:
        seed = 0
        while all_fit(client.try_to_upload(content(1 << 20, seed))):
            seed += 1
        ballast = disk.seen_from_here / "ballast"
        os.truncate(ballast, BALLAST_BYTES - (512 << 10))
        small = [content(1_000, seed) for seed in range(20)]
        large = [content(3 << 19, seed) for seed in range(2)]
        batch = [*small[:5], large[0], *small[5:15], large[1], *small[15:]]
        statuses = client.try_to_upload(*batch)
        assert [all_fit([status]) for status in statuses] == [blob in small for blob in batch]
        assert client.missing(*map(digest_of, batch)) == [digest_of(blob) for blob in large]
        ballast.unlink()
        assert all_fit(client.try_to_upload(*batch))
        assert client.missing(*map(digest_of, batch)) == []
    assert disk.process.stop() == 0
