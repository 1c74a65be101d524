"""What the C library does with memory that is freed: left alone, it costs more than anything else here.

glibc gives the free end of its heap back to the kernel whenever that exceeds a threshold, 128 KiB at first. Buffers of
a quarter of a megabyte that come and go with each read then mean a system call and a page fault for each page, each
time: three quarters of the time that receiving large messages takes. The threshold follows the largest block that was
mapped and freed, up to 32 MiB.

Spec: mallopt(3), M_MMAP_THRESHOLD ("dynamic mmap threshold") and M_TRIM_THRESHOLD.
"""

from __future__ import annotations

from typing import Final

_BLOCK_BYTES: Final = 31 << 20
"""Just below DEFAULT_MMAP_THRESHOLD_MAX. It is never touched, so it takes address space only, and only for a moment."""


def keep_freed_memory() -> None:
    """Have the C library keep up to 62 MiB of freed memory for the next use, if it is glibc; otherwise do no harm."""
    bytearray(_BLOCK_BYTES)
