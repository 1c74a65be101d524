"""Messages in files, for clients in other processes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from lathe_shared.http2.message_framing import PREFIX_BYTES, pack_prefix

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PREFIX_BYTES", "write_framed", "write_plain"]


def write_plain(folder: Path, message: bytes) -> Path:
    """Put a message into a file of its own in a folder."""
    path = folder / hashlib.sha256(message).hexdigest()
    path.write_bytes(message)
    return path


def write_framed(folder: Path, message: bytes) -> Path:
    """Put a message into a file as it stands in a DATA frame: behind flag and length."""
    return write_plain(folder, pack_prefix(0, len(message)) + message)
