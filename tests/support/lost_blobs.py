"""Take a blob away behind the back of a CAS, as a lost disk or an eviction at a bad moment would."""

from __future__ import annotations

from pathlib import Path

from lathe_cas.stores.lmdb_environment import LmdbEnvironment
from lathe_shared.digest import Digest, DigestFunction

# Address space for a look at a small store; it must not be less than what the store already uses.
MAP_SIZE_BYTES = 8 << 30


def lose_blob(data_dir: Path, sha256: str, size_bytes: int) -> None:
    """Remove a blob from the index of a CAS that is not running.

    Raises:
        AssertionError: It was not there.
    """
    environment = LmdbEnvironment(data_dir, MAP_SIZE_BYTES, create=False)
    try:
        with environment.env.begin(write=True) as transaction:
            key = Digest(sha256, size_bytes, DigestFunction.SHA256).key
            assert transaction.delete(key, db=environment.blobs), f"{sha256}/{size_bytes} was not there"
    finally:
        environment.close()
