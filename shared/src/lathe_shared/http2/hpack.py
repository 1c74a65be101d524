"""HPACK: jh2's decoder and encoder behind guards, and header blocks that need no state.

jh2 is fast and trusting: it panics on truncated blocks, prints a backtrace for each, and lets pass what RFC 7541
forbids. So the structure of a block is checked before jh2 sees it. Blocks that leave the dynamic table as it is, which
is what blocks are once a connection has warmed up, are remembered: until the table changes, the same bytes mean the
same fields. One thing that RFC 7541 forbids still passes, because it takes a Huffman decoder to see: padding of a
Huffman string with other bits than ones. It changes no field.

Spec: RFC 7541.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from jh2._hazmat import (  # type: ignore[import-untyped]  # it has none
    Decoder,
    Encoder,
    HPACKError,
    OversizedHeaderListError,
)

from lathe_shared.http2.errors import ConnectionFaultError, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MAX_REMEMBERED: Final = 128
"""Blocks remembered for a connection: about as many as its dynamic table can have entries."""

_MAX_REMEMBERED_BYTES: Final = 256
"""Longest block that is remembered: one that refers to the table instead of spelling its fields out."""

SHRINK_TABLE_TO_ZERO: Final = b"\x20"
"""Says at the beginning of a block that the dynamic table is not used. Spec: RFC 7541 section 4.2."""

_UNINDEXED: Final = frozenset({b"grpc-timeout", b"content-length"})
"""Fields whose values seldom come twice: in the dynamic table they would push out those that do."""

DEFAULT_TABLE_BYTES: Final = 4096
"""Size of the dynamic table on both sides, unless SETTINGS say less. Spec: RFC 9113 section 6.5.2."""

Field = tuple[bytes, bytes]


class HeaderBlock:
    """The fields of one header block, and what was found out about them.

    Attributes:
        fields: Names and values in order.
        size_bytes: Their size as RFC 9113 section 6.5.2 counts it.
        checked: What ``header_rules`` made of it; it comes back with equal blocks, as do the next two.
        memo: Whatever the connection's owner wants to remember.
        whole_request: What may answer a request of this block and one DATA frame that came together: called with
            the stream's number, what was read, and where in it the DATA begins and ends. It returns whether it has;
            otherwise the stream is opened as any other. It counts the stream as closed, or has it adopted.
    """

    __slots__ = ("checked", "fields", "memo", "size_bytes", "whole_request")

    def __init__(self, fields: list[Field]) -> None:
        self.fields = fields
        self.size_bytes = sum([len(name) + len(value) + 32 for name, value in fields])
        self.checked: Any = None
        self.memo: Any = None
        self.whole_request: Callable[[int, bytes, int, int], bool] | None = None


class HeaderDecoder:
    """Decodes the blocks of one connection, in their order.

    Args:
        max_list_bytes: Bound on the decoded size of a block.

    Attributes:
        remembered: Blocks that mean the same now as they did before, with their fields. For reading only.
    """

    __slots__ = ("_decoder", "_max_list_bytes", "remembered")

    def __init__(self, max_list_bytes: int) -> None:
        self._decoder: Decoder | None = None
        self._max_list_bytes = max_list_bytes
        self.remembered: dict[bytes, HeaderBlock] = {}

    def decode(self, block: bytes) -> HeaderBlock:
        """Return the fields of a block; the same object for the same bytes where that is right.

        Raises:
            ConnectionFaultError: The block is malformed or too large. The table is then out of step for good.
        """
        found = self.remembered.get(block)
        if found is not None:
            return found
        changes_table = check_structure(block)
        decoded = HeaderBlock(self._decode(block))
        remembered = self.remembered
        if changes_table or len(remembered) >= _MAX_REMEMBERED:
            remembered.clear()
        if not changes_table and len(block) <= _MAX_REMEMBERED_BYTES:
            remembered[block] = decoded
        return decoded

    def _decode(self, block: bytes) -> list[Field]:
        if self._decoder is None:
            # Made when the first block arrives: a connection that only waits does without.
            self._decoder = Decoder(self._max_list_bytes)
        try:
            return [(name, value) for name, value, _ in self._decoder.decode(block, True)]
        except OversizedHeaderListError:
            reason = f"header list above {self._max_list_bytes} bytes"
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, reason) from None
        except HPACKError as error:
            raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, str(error)) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, "malformed header block") from None


class HeaderEncoder:
    """Encodes the blocks of one connection with a dynamic table, for a client's many equal headers."""

    __slots__ = ("_encoder", "_remembered")

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._remembered: dict[tuple[Field, ...], bytes] = {}

    def encode(self, fields: tuple[Field, ...]) -> bytes:
        """Return the block; it must be sent, and before any that is encoded later."""
        found = self._remembered.get(fields)
        if found is not None:
            return found
        block: bytes = self._encoder.encode([(name, value, name in _UNINDEXED) for name, value in fields], True)
        if check_structure(block) or len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        elif len(block) <= _MAX_REMEMBERED_BYTES:
            self._remembered[fields] = block
        return block

    def limit_table(self, size_bytes: int) -> None:
        """Keep the table within what the peer allows; the next block tells it."""
        self._remembered.clear()
        self._encoder.header_table_size = min(size_bytes, DEFAULT_TABLE_BYTES)


_STATIC_FIELDS: Final[dict[Field, int]] = {
    (b":status", b"200"): 8,
    (b":status", b"204"): 9,
    (b":status", b"206"): 10,
    (b":status", b"304"): 11,
    (b":status", b"400"): 12,
    (b":status", b"404"): 13,
    (b":status", b"500"): 14,
}
_STATIC_NAMES: Final[dict[bytes, int]] = {b":status": 8, b"content-length": 28, b"content-type": 31, b"server": 54}
"""The entries of the static table that a gRPC server has a use for. Spec: RFC 7541 appendix A."""


def literal_block(fields: Iterable[Field]) -> bytes:
    """Encode fields without the dynamic table: the block means the same at any time on any connection."""
    out = bytearray()
    for name, value in fields:
        index = _STATIC_FIELDS.get((name, value))
        if index is not None:
            out.append(0x80 | index)
            continue
        _append_integer(out, 0x00, 4, _STATIC_NAMES.get(name, 0))
        if name not in _STATIC_NAMES:
            _append_integer(out, 0x00, 7, len(name))
            out += name
        _append_integer(out, 0x00, 7, len(value))
        out += value
    return bytes(out)


def _append_integer(out: bytearray, pattern: int, prefix_bits: int, value: int) -> None:
    """Append an integer. Spec: RFC 7541 section 5.1."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        out.append(pattern | value)
        return
    out.append(pattern | limit)
    value -= limit
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def check_structure(block: bytes) -> bool:
    """Check that a block is a sequence of whole representations, with table size updates at its beginning only.

    Returns:
        Whether it changes the dynamic table.

    Raises:
        ConnectionFaultError: It is not.
    """
    position = 0
    end = len(block)
    begun = False
    changes_table = False
    try:
        while position < end:
            first = block[position]
            if first & 0x80:
                begun = True
                position = _after_integer(block, position, 0x7F)
            elif first & 0xE0 == 0x20:
                if begun:
                    raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, "table size update inside a header block")
                changes_table = True
                position = _after_integer(block, position, 0x1F)
            else:
                begun = True
                changes_table = changes_table or first & 0x40 != 0
                mask = 0x3F if first & 0x40 else 0x0F
                position = _after_integer(block, position, mask)
                if not first & mask:
                    position = _after_string(block, position)
                position = _after_string(block, position)
    except IndexError:
        position = end + 1
    if position > end:
        raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, "truncated header block")
    return changes_table


def _after_integer(block: bytes, position: int, mask: int) -> int:
    if block[position] & mask != mask:
        return position + 1
    first = position
    position += 1
    while block[position] & 0x80:
        position += 1
    if position - first > 4:
        # Nothing that fits a block of 2^24 bytes needs more, and jh2 has its own idea of overflow.
        raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, "integer too long in a header block")
    return position + 1


def _after_string(block: bytes, position: int) -> int:
    length = block[position] & 0x7F
    if length != 0x7F:
        return position + 1 + length
    shift = 0
    while True:
        position += 1
        byte = block[position]
        length += (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return position + 1 + length
        if shift > 28:
            raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, "integer too long in a header block")
