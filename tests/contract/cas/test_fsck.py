"""``lathe-cas fsck``: what it finds, what it leaves alone, what it repairs, and what its exit codes say."""

from __future__ import annotations

import asyncio
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lmdb as lmdb_library
import pytest
import xxhash
import zstandard
from tests.contract.cas.blob_making import content, feed, missing, put, read, upload_name
from tests.contract.cas.lmdb_store import LmdbStore

from lathe_cas.action_result_store import StoredActionResult
from lathe_cas.fsck.child import check_here
from lathe_cas.fsck.command import main
from lathe_cas.fsck.findings import Problem
from lathe_cas.fsck.store_access import opened_alone
from lathe_cas.stores import lmdb_records as records
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_shared.compressor import Compressor
from lathe_shared.digest import Digest, DigestFunction

CHUNK = 65_520
CLEAN, PROBLEMS, CANNOT_CHECK, REPAIRED, BROKEN, CRASHED = range(6)
BLOBS = [content(size_bytes, 1) for size_bytes in (1, 100, 2_000, 3_000, CHUNK, CHUNK + 1, 3 * CHUNK)]
DIGESTS = [Digest.of(data) for data in BLOBS]
ACTION = Digest.of(b"action")
RESULT_KEY = records.action_result_key("main", ACTION.key)


def fsck(path: Path, *flags: str) -> int:
    return int(main([f"--data-dir={path}", f"--temp-dir={path.parent}", *flags], {}, check_here))


async def fill(store: LmdbStore) -> None:
    """Store something of every kind: blobs, an action result, an unfinished upload, garbage, stale entries."""
    await put(store.blobs, *BLOBS)
    await store.blobs.put_many([(Digest.of(b"other", DigestFunction.SHA512), memoryview(b"other"))])
    await store.results.put("main", ACTION, StoredActionResult(b"result", [(d.key, d.size_bytes) for d in DIGESTS]))
    await store.results.put("main", Digest.of(b"empty"), StoredActionResult(b"", []))
    upload = await store.blobs.open_upload(upload_name(Digest.of(content(9 * CHUNK))))
    await feed(upload, content(9 * CHUNK)[: 2 * CHUNK + 100])
    await upload.suspend()
    store.now += 300
    assert missing(store.blobs, DIGESTS[0]) == []
    await store.settle()


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A store of everything, closed."""
    store = LmdbStore(tmp_path / "store")
    await store.open()
    await fill(store)
    await store.close()
    return store.path


def test_a_store_of_everything_is_clean(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (path / "data.mdb").read_bytes()
    assert fsck(path) == CLEAN
    assert fsck(path, "--digests") == CLEAN
    assert (path / "data.mdb").read_bytes() == before
    shown = capsys.readouterr()
    assert "the store is clean" in shown.out
    assert "unfinished uploads" in shown.out
    assert "stale entries" in shown.out
    assert shown.err.replace("\n", "").isprintable(), "no control characters where there is no terminal"
    assert fsck(path, "--repair") == CLEAN
    assert (path / "data.mdb").read_bytes() == before


async def test_garbage_is_in_order(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store")
    await store.open()
    await put(store.blobs, content(6 << 20))
    await store.close()
    environment = LmdbEnvironment(store.path, 1 << 30)
    with environment.env.begin(write=True) as txn:
        key = Digest.of(content(6 << 20)).key
        record = records.BlobRecord.unpack(txn.get(key, b"", environment.blobs))
        txn.delete(key, db=environment.blobs)
        garbage = records.GarbageRecord(record.chunks, record.disk_bytes)
        txn.put(records.STORAGE_ID.pack(record.storage_id), garbage.pack(), db=environment.garbage)
        totals = environment.totals_in(txn)
        totals.blobs -= 1
        totals.blob_bytes -= record.size_bytes
        totals.stored_bytes -= record.disk_bytes
        totals.garbage_bytes += record.disk_bytes
        environment.put_totals(txn, totals)
    environment.close()
    assert fsck(store.path) == CLEAN


# Damage, each with what it is found as

Change = Callable[[LmdbEnvironment, "lmdb_library.Transaction[bytes]"], None]


def change_blob(index: int, **fields: int) -> Change:
    def change(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
        key = DIGESTS[index].key
        record = records.BlobRecord.unpack(txn.get(key, b"", environment.blobs))
        txn.put(key, record._replace(**fields).pack(), db=environment.blobs)

    return change


def change_result(**fields: int) -> Change:
    def change(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
        record = records.ActionResultRecord.unpack(txn.get(RESULT_KEY, b"", environment.action_results))
        txn.put(RESULT_KEY, record._replace(**fields).pack(), db=environment.action_results)

    return change


def change_first(database: str, change_value: Callable[[bytes], bytes | None]) -> Change:
    """Change the first record's value, or delete it for None."""

    def change(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
        cursor = txn.cursor(getattr(environment, database))
        assert cursor.first()
        key, value = cursor.item()
        changed = change_value(value)
        if changed is None:
            txn.delete(key, db=getattr(environment, database))
        else:
            txn.put(key, changed, db=getattr(environment, database))

    return change


def change_chunk(piece: bytes, new_key: Callable[[bytes], bytes], new_piece: bytes | None) -> Change:
    def change(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
        (key,) = [key for key, value in txn.cursor(environment.chunks) if value == piece]
        txn.delete(key, db=environment.chunks)
        if new_piece is not None:
            txn.put(new_key(key), new_piece, db=environment.chunks)

    return change


def same(key: bytes) -> bytes:
    return key


def put_entry(database: str, key: bytes, value: bytes) -> Change:
    def change(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
        txn.put(key, value, db=getattr(environment, database))

    return change


def share(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
    """Let garbage claim the chunks of a blob, which freeing it would destroy."""
    record = records.BlobRecord.unpack(txn.get(DIGESTS[-1].key, b"", environment.blobs))
    garbage = records.GarbageRecord(record.chunks, 1)
    txn.put(records.STORAGE_ID.pack(record.storage_id), garbage.pack(), db=environment.garbage)


LAST = BLOBS[-1][2 * CHUNK :]
TOTALS = records.Totals(next_storage_id=1, blobs=5)
DAMAGE: dict[str, tuple[Change, Problem]] = {
    "flipped chunk": (change_chunk(LAST, same, LAST[:-1] + bytes((LAST[-1] ^ 1,))), Problem.CHUNK_DAMAGED),
    "flipped small chunk": (change_chunk(BLOBS[1], same, b"\0" + BLOBS[1][1:]), Problem.CHUNK_DAMAGED),
    "lost chunk": (change_chunk(LAST, same, None), Problem.CHUNKS_WRONG),
    "lost only chunk": (change_chunk(BLOBS[1], same, None), Problem.CHUNKS_WRONG),
    "renumbered chunk": (
        change_chunk(LAST, lambda key: key[:11] + b"\7" + key[12:], LAST),
        Problem.CHUNKS_WRONG,
    ),
    "chunk of nobody": (put_entry("chunks", struct.pack(">QI8s", 10**6, 0, b"checksum"), b"bytes"), Problem.ORPHANS),
    "chunk under a short key": (put_entry("chunks", b"\0\0\0\0", b"bytes"), Problem.CHUNK_KEY),
    "blob in the wrong place": (change_blob(2, storage_id=1), Problem.CHUNK_DAMAGED),
    "blob of another size": (change_blob(2, size_bytes=1_999), Problem.RECORD),
    "blob with too few chunks": (change_blob(6, chunks=2), Problem.RECORD),
    "blob with other disk bytes": (change_blob(6, disk_bytes=0), Problem.RECORD),
    "blob of a future layout": (change_blob(6, layout=1), Problem.RECORD),
    "blob under no digest": (put_entry("blobs", b"\1abc", bytes(42)), Problem.RECORD),
    "short blob record": (change_first("blobs", lambda value: value[:-1]), Problem.RECORD),
    "blob in another step": (change_blob(6, step=1 << 31), Problem.LOG_ENTRY),
    "result in another step": (change_result(step=1), Problem.LOG_ENTRY),
    "result with a reference less": (change_result(references=6), Problem.CHUNK_DAMAGED),
    "result with other flags": (change_result(flags=1), Problem.CHUNK_DAMAGED),
    "result with unknown flags": (change_result(flags=4), Problem.RECORD),
    "result that is too small": (change_result(payload_bytes=10), Problem.RECORD),
    "upload with more than it has": (
        change_first(
            "uploads",
            lambda value: (
                value[:8]
                + struct.pack(">QQI", 3 * CHUNK, records.blob_disk_bytes(3 * CHUNK), 3)
                + value[28:44]
                + struct.pack(">Q", 3 * CHUNK)
                + value[52:]
            ),
        ),
        Problem.CHUNKS_WRONG,
    ),
    "short upload record": (change_first("uploads", lambda value: value[:7]), Problem.RECORD),
    "lost upload record": (change_first("uploads", lambda value: None), Problem.ORPHANS),
    "garbage without chunks": (
        put_entry("garbage", struct.pack(">Q", 10**6), struct.pack(">IQ", 5, 5)),
        Problem.CHUNKS_WRONG,
    ),
    "garbage under a short key": (put_entry("garbage", b"short", struct.pack(">IQ", 5, 5)), Problem.RECORD),
    "garbage that is in use": (share, Problem.SHARED),
    "lost log group": (change_first("access", lambda value: None), Problem.LOG_ENTRY),
    "garbled log group": (change_first("access", lambda value: b"\xff" + value[1:]), Problem.LOG_GROUP),
    "log group of no kind": (put_entry("access", struct.pack(">IBQ", 1, 9, 1), b"\1a"), Problem.LOG_GROUP),
    "empty log group": (put_entry("access", struct.pack(">IBQ", 1, 1, 1), b""), Problem.LOG_GROUP),
    "wrong totals": (put_entry("meta", b"totals", TOTALS.pack()), Problem.TOTALS),
    "short totals": (put_entry("meta", b"totals", b"short"), Problem.TOTALS),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_is_found_and_repaired(path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, problem = DAMAGE[name]
    environment = LmdbEnvironment(path, 1 << 30)
    with environment.env.begin(write=True) as txn:
        change(environment, txn)
    environment.close()
    before = (path / "data.mdb").read_bytes()
    assert fsck(path) == PROBLEMS
    assert problem.value in capsys.readouterr().out
    assert (path / "data.mdb").read_bytes() == before, "nothing is changed without --repair"
    assert fsck(path, "--repair") == REPAIRED
    assert fsck(path, "--digests") == CLEAN
    store = LmdbStore(path)
    await store.open()
    # The whole store is in order again by the count of another program, and takes back what was lost.
    await store.recount()
    lost = missing(store.blobs, *DIGESTS)
    assert len(lost) <= 1, "what was not damaged is still there"
    await put(store.blobs, *BLOBS)
    for digest, data in zip(DIGESTS, BLOBS, strict=True):
        assert await read(store.blobs, digest) == data
    await store.close()


async def test_bytes_that_never_matched_their_digest_are_found_by_hashing_alone(path: Path) -> None:
    environment = LmdbEnvironment(path, 1 << 30)
    key = DIGESTS[1].key
    with environment.env.begin(write=True) as txn:
        (old,) = [key for key, value in txn.cursor(environment.chunks) if value == BLOBS[1]]
        txn.delete(old, db=environment.chunks)
        wrong = b"\0" * len(BLOBS[1])
        seed = xxhash.xxh3_64_intdigest(key)
        txn.put(old[:12] + xxhash.xxh3_64_digest(wrong, seed), wrong, db=environment.chunks)
    environment.close()
    assert fsck(path) == CLEAN
    assert fsck(path, "--digests") == PROBLEMS
    assert fsck(path, "--digests", "--repair") == REPAIRED
    assert fsck(path, "--digests") == CLEAN


# A store whose blobs are compressed

SENT = content(5 * CHUNK, 3)
SENT_DIGEST = Digest.of(SENT)
SENT_STREAM = zstandard.compress(SENT)


@pytest.fixture
async def compressed_path(tmp_path: Path) -> Path:
    """A store of everything that compresses, with blobs and an upload that clients compressed, closed."""
    store = LmdbStore(tmp_path / "store", compress_stored=True)
    await store.open()
    await fill(store)
    assert await store.blobs.put_many_zstd([(SENT_DIGEST, memoryview(SENT_STREAM))]) == [None]
    name = upload_name(Digest.of(content(99 * CHUNK)))._replace(compressor=Compressor.ZSTD)
    upload = await store.blobs.open_upload(name)
    await feed(upload, zstandard.compress(content(99 * CHUNK))[: 20 * CHUNK])
    await store.settle()
    await store.close()
    with_compression = [record for record in uploads_of(store.path) if record.compression]
    assert len(with_compression) == 2, "one that the store compresses, one that the client does"
    return store.path


def uploads_of(path: Path) -> list[records.UploadRecord]:
    environment = LmdbEnvironment(path, 1 << 30)
    with environment.read() as txn:
        found = [records.UploadRecord.unpack(value) for _, value in txn.cursor(environment.uploads)]
    environment.close()
    return found


def change_sent(**more: int) -> Change:
    """Add to the fields of the record of a blob that is stored compressed."""

    def change(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
        record = records.BlobRecord.unpack(txn.get(SENT_DIGEST.key, b"", environment.blobs))
        assert record.compression
        fields = {name: getattr(record, name) + number for name, number in more.items()}
        txn.put(SENT_DIGEST.key, record._replace(**fields).pack(), db=environment.blobs)

    return change


def change_uploads(**more: int) -> Change:
    def change(environment: LmdbEnvironment, txn: lmdb_library.Transaction[bytes]) -> None:
        for key, value in list(txn.cursor(environment.uploads)):
            record = records.UploadRecord.unpack(value)
            fields = {name: getattr(record, name) + number for name, number in more.items()}
            txn.put(key, record._replace(**fields).pack(), db=environment.uploads)

    return change


SECOND = SENT_STREAM[CHUNK : 2 * CHUNK]
COMPRESSED_DAMAGE: dict[str, tuple[Change, Problem]] = {
    "flipped chunk": (change_chunk(SECOND, same, bytes((SECOND[0] ^ 1,)) + SECOND[1:]), Problem.CHUNK_DAMAGED),
    "lost chunk": (change_chunk(SECOND, same, None), Problem.CHUNKS_WRONG),
    "blob that counts for less": (change_sent(disk_bytes=-4096), Problem.CHUNKS_WRONG),
    "blob that counts for nothing": (change_sent(disk_bytes=-(10**5)), Problem.CHUNKS_WRONG),
    "blob with more stored": (change_sent(stored_bytes=1), Problem.CHUNKS_WRONG),
    "blob with another chunk": (change_sent(chunks=1), Problem.CHUNKS_WRONG),
    "blob with too few chunks": (change_sent(chunks=-1), Problem.RECORD),
    "blob that says that it is plain": (change_sent(compression=-1), Problem.RECORD),
    "blob of a future compression": (change_sent(compression=1), Problem.RECORD),
    "uploads that say that they are plain": (change_uploads(compression=-1), Problem.RECORD),
    "uploads with more stored": (change_uploads(stored_bytes=1, committed_bytes=1), Problem.CHUNKS_WRONG),
    "uploads that count for more": (change_uploads(disk_bytes=4096), Problem.CHUNKS_WRONG),
}


def test_a_compressed_store_is_clean(compressed_path: Path) -> None:
    before = (compressed_path / "data.mdb").read_bytes()
    assert fsck(compressed_path) == CLEAN
    assert fsck(compressed_path, "--digests") == CLEAN
    assert fsck(compressed_path, "--repair") == CLEAN
    assert (compressed_path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("name", COMPRESSED_DAMAGE)
async def test_damage_to_a_compressed_store_is_found_and_repaired(
    compressed_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, problem = COMPRESSED_DAMAGE[name]
    environment = LmdbEnvironment(compressed_path, 1 << 30)
    with environment.env.begin(write=True) as txn:
        change(environment, txn)
    environment.close()
    assert fsck(compressed_path) == PROBLEMS
    assert problem.value in capsys.readouterr().out
    assert fsck(compressed_path, "--repair") == REPAIRED
    assert fsck(compressed_path, "--digests") == CLEAN
    store = LmdbStore(compressed_path)
    await store.open()
    await store.recount()
    assert missing(store.blobs, *DIGESTS) == [], "what was not damaged is still there"
    await put(store.blobs, SENT)
    assert await read(store.blobs, SENT_DIGEST) == SENT
    await store.close()


OTHER = zstandard.compress(content(5 * CHUNK, 4))


@pytest.mark.parametrize("stream", [OTHER, OTHER[:-1], OTHER + b"x", b"x" * 1000, zstandard.compress(SENT[:-1])])
def test_a_stream_that_never_decoded_to_its_blob_is_found_by_decoding_alone(
    compressed_path: Path, stream: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = LmdbEnvironment(compressed_path, 1 << 30)
    key = SENT_DIGEST.key
    seed = xxhash.xxh3_64_intdigest(key + b"\1")
    with environment.env.begin(write=True) as txn:
        old = records.BlobRecord.unpack(txn.get(key, b"", environment.blobs))
        for chunk_key, _ in list(txn.cursor(environment.chunks)):
            if records.CHUNK_KEY.unpack(chunk_key)[0] == old.storage_id:
                txn.delete(chunk_key, db=environment.chunks)
        pieces = [stream[start : start + CHUNK] for start in range(0, len(stream), CHUNK)]
        for number, piece in enumerate(pieces):
            checksum = xxhash.xxh3_64_digest(piece, (seed + number) % 2**64)
            txn.put(records.CHUNK_KEY.pack(old.storage_id, number, checksum), piece, db=environment.chunks)
        disk_bytes = sum(records.chunk_disk_bytes(len(piece)) for piece in pieces) + records.INDEX_OVERHEAD_BYTES
        new = old._replace(stored_bytes=len(stream), disk_bytes=disk_bytes, chunks=len(pieces))
        txn.put(key, new.pack(), db=environment.blobs)
        totals = environment.totals_in(txn)
        totals.stored_bytes += new.disk_bytes - old.disk_bytes
        environment.put_totals(txn, totals)
    environment.close()
    assert fsck(compressed_path) == CLEAN
    assert fsck(compressed_path, "--digests") == PROBLEMS
    assert Problem.DIGEST.value in capsys.readouterr().out
    assert fsck(compressed_path, "--digests", "--repair") == REPAIRED
    assert fsck(compressed_path, "--digests") == CLEAN


async def test_an_action_result_whose_blob_is_gone_is_counted_and_in_order(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LmdbStore(path)
    await store.open()
    await store.blobs.remove([DIGESTS[0]])
    await store.close()
    assert fsck(path) == CLEAN
    assert "action results that name a blob that is gone" in capsys.readouterr().out


def test_a_damaged_page_is_told_from_other_damage_and_not_repaired(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = bytearray((path / "data.mdb").read_bytes())
    leaf = next(start for start in range(8192, len(image), 4096) if BLOBS[1] in image[start : start + 4096])
    for start in range(leaf, len(image), 4096):
        if image[start + 10] == 2:
            image[start + 13] ^= 0x80
    (path / "data.mdb").write_bytes(image)
    for flags in ((), ("--repair",)):
        assert fsck(path, *flags) == BROKEN
        assert (path / "data.mdb").read_bytes() == image
    assert "lathe-cas fsck --salvage NEW_DIR" in capsys.readouterr().out


def test_a_page_that_ends_the_process_is_a_finding(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (path / "data.mdb").open("r+b") as file:
        # Where a mapped file ends, SIGBUS begins.
        file.truncate(8192)
    assert main([f"--data-dir={path}", f"--temp-dir={path.parent}"], {}) == CRASHED
    shown = capsys.readouterr().out
    assert "LMDB ended the process by SIGBUS" in shown
    assert "lathe-cas fsck --salvage NEW_DIR" in shown


def test_the_child_tells_what_it_found_and_what_went_wrong(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--data-dir={path}", f"--temp-dir={tmp_path}"], {}) == CLEAN
    assert "unfinished uploads" in capsys.readouterr().out
    assert main([f"--data-dir={tmp_path}"], {}) == CANNOT_CHECK
    assert "holds no store" in capsys.readouterr().err
    assert main([f"--data-dir={path}", f"--temp-dir={tmp_path / 'absent'}"], {}) == CANNOT_CHECK
    assert "No such file or directory" in capsys.readouterr().err


async def test_a_store_in_use_is_checked_and_not_repaired(path: Path) -> None:
    store = LmdbStore(path)
    await store.open()
    # From another process: LMDB wants an environment opened once in each.
    command = [sys.executable, "-m", "lathe_cas", "fsck", f"--data-dir={path}"]
    looked = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert (looked.returncode, "the store is clean" in looked.stdout) == (CLEAN, True)
    refused = await asyncio.to_thread(subprocess.run, [*command, "--repair"], capture_output=True, text=True)
    assert (refused.returncode, "stop lathe-cas first" in refused.stderr) == (CANNOT_CHECK, True)
    await put(store.blobs, b"and it goes on")
    await store.close()
    assert fsck(path, "--repair") == CLEAN


WAITING_SERVICE = """
import pathlib, sys
from lathe_cas.stores.lmdb_environment import LmdbEnvironment
environment = LmdbEnvironment(pathlib.Path(sys.argv[1]), 1 << 30)
with environment.env.begin(write=True) as txn:
    print(txn.get(b"repaired", db=environment.meta).decode())
    txn.put(b"stored", b"x", db=environment.meta)
"""


# LMDB has two meta pages, which transactions take turns with.
@pytest.mark.parametrize("transactions", [1, 2])
def test_a_service_that_waits_for_a_repair_goes_on_from_there(path: Path, transactions: int) -> None:
    with opened_alone(path, 1 << 20) as environment:
        service = subprocess.Popen([sys.executable, "-c", WAITING_SERVICE, path], stdout=subprocess.PIPE, text=True)
        inode = (path / "lock.mdb").stat().st_ino
        waits = re.compile(rf"-> POSIX +ADVISORY +READ {service.pid} \S+:{inode} ")
        while service.poll() is None and not waits.search(Path("/proc/locks").read_text()):
            time.sleep(0.01)
        for number in range(transactions):
            with environment.env.begin(write=True) as txn:
                txn.put(b"repaired", b"%d" % number, db=environment.meta)
    assert service.communicate(timeout=60)[0] == f"{transactions - 1}\n"
    environment = LmdbEnvironment(path, 1 << 30)
    with environment.env.begin() as txn:
        assert txn.get(b"repaired", db=environment.meta) == b"%d" % (transactions - 1)
        assert txn.get(b"stored", db=environment.meta) == b"x"
    environment.close()


def test_what_cannot_be_checked_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: str) -> str:
        assert main(list(arguments), {}) == CANNOT_CHECK
        return capsys.readouterr().err

    assert "holds no store" in refusal("--data-dir", str(tmp_path))
    assert "--reapir" in refusal("--reapir")
    assert "--temp-dir" in refusal("--temp-dir")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    with lmdb_library.Environment(str(tmp_path)) as env, env.begin(write=True) as txn:
        txn.put(b"another", b"program")
    assert "lacks its database meta" in refusal("--data-dir", str(tmp_path))


def test_a_file_that_is_no_database_is_broken(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(content(100_000))
    assert fsck(tmp_path) == BROKEN


def test_a_store_of_a_newer_format_is_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "FORMAT_VERSION", records.FORMAT_VERSION - 1)
    assert fsck(path, "--repair") == CANNOT_CHECK
    assert "start the newer version that wrote it" in capsys.readouterr().err


def test_settings_come_from_where_the_service_reads_them(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "cas.toml"
    file.write_text(f'data_dir = "{path}"\nport = 1234\n')
    assert main(["--config", str(file)], {}) == CLEAN
    assert main([], {"LATHE_CAS_DATA_DIR": str(path), "TMPDIR": str(tmp_path)}) == CLEAN


def test_of_several_folders_each_is_checked_and_the_worst_counts(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(path, other)
    environment = LmdbEnvironment(other, 1 << 30)
    with environment.env.begin(write=True) as txn, txn.cursor(environment.blobs) as cursor:
        assert cursor.first()
        assert cursor.delete()
    environment.close()
    folders = [f"--data-dirs={other},{path}", f"--temp-dir={tmp_path}"]
    assert main(folders, {}) == PROBLEMS
    assert f"\n{other}\n" in (shown := capsys.readouterr().out)
    assert f"\n{path}\n" in shown
    assert main([*folders, "--repair"], {}) == REPAIRED
    assert main(folders, {}) == CLEAN


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], {}) == CLEAN
    assert "Exit codes" in capsys.readouterr().out
