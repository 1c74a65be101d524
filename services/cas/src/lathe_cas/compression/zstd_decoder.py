"""Decodes zstd streams that nobody vouches for, a bounded piece at a time."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import zstandard

from lathe_cas.compression.zstd_framing import MAX_WINDOW_BYTES, MalformedZstdError, ZstdFraming

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

FREE_HEADS = 4096
MIN_MEAN_BYTES = 1024
"""What blocks decode to on average at least, beyond the first few: encoders make blocks of 128 KiB, or of what their
program had when it asked for a flush."""

_UNKNOWN = zstandard.CONTENTSIZE_UNKNOWN


class ZstdDecoder:
    """Decodes one stream of any number of frames, given in any pieces.

    Args:
        size_bytes: What the stream has to decode to.
        from_bytes: Where decoding matters: frames that end before it are passed over, if their headers tell.
        is_verified: Whether the stream was decoded before, and so need not be proof against its maker any more.

    Attributes:
        decoded_bytes: How far it has come: bytes decoded and passed over.
    """

    def __init__(self, size_bytes: int, from_bytes: int = 0, *, is_verified: bool = False) -> None:
        self.decoded_bytes = 0
        self._size_bytes = size_bytes
        self._from_bytes = from_bytes
        self._is_verified = is_verified
        self._framing = ZstdFraming()
        self._library = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame = self._library.decompressobj()
        self._frame_start_bytes = 0
        self._passes_over = False

    def decode(self, data: Buffer) -> Iterator[bytes]:
        """Take in the next bytes of the stream, all of them if the iterator is exhausted.

        Yields:
            What they decode to in pieces of about a mebibyte at most, however much it is together. Before each,
            ``decoded_bytes`` is where it ends.

        Raises:
            MalformedZstdError: The bytes are no zstd stream, or one of more than ``size_bytes``, or of countless
                blocks that hold next to nothing.
        """
        view = memoryview(data)
        start = 0
        while start < len(view):
            span = self._framing.follow(view, start)
            piece = self._take_in(view[start : span.stop], span.content_bytes)
            if span.ends_frame:
                self._end_frame()
            if not self._is_verified:
                self._check_effort()
            start = span.stop
            if piece:
                yield piece

    def _take_in(self, data: memoryview, content_bytes: int | None) -> bytes:
        if content_bytes is not None:
            end_bytes = self._frame_start_bytes + content_bytes
            self._check_size(end_bytes)
            self._passes_over = 0 < end_bytes <= self._from_bytes
            if self._passes_over:
                self.decoded_bytes = end_bytes
                return b""
        try:
            piece = self._frame.decompress(data)
        except zstandard.ZstdError as error:
            raise MalformedZstdError(str(error)) from None
        self.decoded_bytes += len(piece)
        self._check_size(self.decoded_bytes)
        return piece

    def _check_effort(self) -> None:
        """Refuse a stream that takes a step of Python for every few bytes: a mebibyte of such takes two seconds."""
        heads = self._framing.heads
        if heads > FREE_HEADS + self.decoded_bytes // MIN_MEAN_BYTES:
            raise MalformedZstdError(
                f"{heads} zstd frames and blocks for the first {self.decoded_bytes} bytes; after {FREE_HEADS} they "
                f"have to hold {MIN_MEAN_BYTES} bytes each on average"
            )

    def _end_frame(self) -> None:
        if not (self._frame.eof or self._passes_over):
            raise MalformedZstdError("a zstd frame ends before its time")
        self._passes_over = False
        self._frame = self._library.decompressobj()
        self._frame_start_bytes = self.decoded_bytes

    def _check_size(self, decoded_bytes: int) -> None:
        if decoded_bytes > self._size_bytes:
            raise MalformedZstdError(f"decompresses to more than the {self._size_bytes} bytes of the digest")

    def finish(self) -> None:
        """Learn that the stream ends here.

        Raises:
            MalformedZstdError: It was cut off, or is of fewer than ``size_bytes``.
        """
        if not self._framing.is_between_frames:
            raise MalformedZstdError("the zstd stream ends in the middle of a frame")
        if self.decoded_bytes != self._size_bytes:
            raise MalformedZstdError(
                f"decompresses to {self.decoded_bytes} bytes, where the digest has {self._size_bytes}"
            )


def decode_whole(data: bytes | memoryview, size_bytes: int, *, is_verified: bool = False) -> bytes:
    """Decode a stream that has to be whole, into memory.

    Args:
        data: The stream.
        size_bytes: What it has to decode to; the caller bounds it.
        is_verified: Whether it was decoded before.

    Raises:
        MalformedZstdError: It is no zstd stream, or not one of ``size_bytes``.
    """
    # Nearly all streams are one frame. For those the library needs no state that is made anew each time, which for a
    # small blob would cost fifty times what decoding it does.
    try:
        frame = zstandard.get_frame_parameters(data)
        if size_bytes and frame.window_size <= MAX_WINDOW_BYTES and frame.content_size in (size_bytes, _UNKNOWN):
            whole = _library().decompress(data, max_output_size=size_bytes, allow_extra_data=False)
            if len(whole) == size_bytes:
                return whole
    except (zstandard.ZstdError, MemoryError):
        # More frames than one, or the reason is found and worded below.
        pass
    decoder = ZstdDecoder(size_bytes, is_verified=is_verified)
    whole = b"".join(decoder.decode(data))
    decoder.finish()
    return whole


_local = threading.local()


def _library() -> zstandard.ZstdDecompressor:
    library: zstandard.ZstdDecompressor | None = getattr(_local, "library", None)
    if library is None:
        library = _local.library = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return library
