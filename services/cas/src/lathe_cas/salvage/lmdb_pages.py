"""How LMDB 0.9 lays out its pages, read without LMDB: of a damaged page it could make anything, a crash included.

Nothing here trusts a number that it reads: what does not fit into the page is left out, and the caller is told.

A page begins with its own number (8), padding (2), flags (2), and the ends of the node pointers (2) and of the free
space (2); an overflow page has a count of pages (4) in place of the last two. Pointers of 2 bytes follow, one for each
node. A node is two halves of a number (2 each), flags (2), the length of its key (2), the key, and in a leaf the value.
The number is a value's length; in a branch it is a page number, to which the flags belong as well. All integers are in
the machine's own order.

Spec: LMDB 0.9, structs MDB_page, MDB_node, MDB_db and MDB_meta in mdb.c.
"""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

from lathe_cas.stores.lmdb_records import PAGE_BYTES, PAGE_HEADER_BYTES

NO_PAGE = (1 << 64) - 1
"""Root of an empty tree."""

META_PAGES = 2
MAX_DEPTH = 32
"""Levels that LMDB's cursors have room for."""

_MAX_PAGES = 1 << 48
"""Pages that a file can have, as far as a branch can number them."""

_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8
_BIG, _SUBTREE = 1, 2
"""Flags of a node: its value lies in overflow pages; its value is the root of another tree."""

_HEADER = struct.Struct("=QHHHH")
_OVERFLOW_HEADER = struct.Struct("=QHHI")
_NODE = struct.Struct("=HHHH")
_PAGE_NUMBER = struct.Struct("=Q")
_TREE = struct.Struct("=IHHQQQQQ")
_META_HEAD = struct.Struct("=IIQQ")
_META_TAIL = struct.Struct("=QQ")
_IS_LITTLE_ENDIAN = sys.byteorder == "little"

TREE_BYTES = _TREE.size


class Tree(NamedTuple):
    """Where a B-tree begins, and what it says of itself; ``page_bytes`` counts in the tree of free pages alone."""

    page_bytes: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int

    @classmethod
    def unpack(cls, value: bytes) -> Tree:
        """Read ``TREE_BYTES`` bytes."""
        return cls._make(_TREE.unpack(value))


class Meta(NamedTuple):
    """A meta page: one state of the whole file.

    Attributes:
        free: The tree of pages that are free.
        main: The tree of databases.
        last_page: The last page that is in use.
        transaction: Number of the transaction that wrote it.
    """

    free: Tree
    main: Tree
    last_page: int
    transaction: int


class Node(NamedTuple):
    """An entry of a leaf.

    Attributes:
        key: Its key.
        length: Bytes of its value.
        place: Where in the file the value begins.
        is_big: Whether that is in overflow pages.
        is_subtree: Whether the value is a ``Tree``.
    """

    key: bytes
    length: int
    place: int
    is_big: bool
    is_subtree: bool

    @property
    def overflow_pages(self) -> int:
        """How many overflow pages the value takes."""
        return -(-(PAGE_HEADER_BYTES + self.length) // PAGE_BYTES) if self.is_big else 0

    @property
    def first_page(self) -> int:
        """The page in which the value begins."""
        return self.place // PAGE_BYTES

    def value(self, page: bytes) -> bytes:
        """Return a value that lies in the node's own page."""
        start = self.place % PAGE_BYTES
        return page[start : start + self.length]


class Leaf(NamedTuple):
    """The entries of a leaf that make sense, and how many do not."""

    nodes: list[Node]
    malformed: int


class Branch(NamedTuple):
    """The pages that a branch leads to, and how many of its entries make no sense."""

    children: list[int]
    malformed: int


def parse_meta(page: bytes, number: int) -> Meta | None:
    """Read a meta page; None if it is none, or one of a file with other pages."""
    page_number, _, flags, _, _ = _HEADER.unpack_from(page)
    position = PAGE_HEADER_BYTES
    magic, version, _, _ = _META_HEAD.unpack_from(page, position)
    if (page_number, magic, version) != (number, _MAGIC, _DATA_VERSION) or not flags & _META:
        return None
    position += _META_HEAD.size
    free = Tree._make(_TREE.unpack_from(page, position))
    main = Tree._make(_TREE.unpack_from(page, position + _TREE.size))
    meta = Meta(free, main, *_META_TAIL.unpack_from(page, position + 2 * _TREE.size))
    # Transactions take turns with the two pages.
    is_one = free.page_bytes == PAGE_BYTES and meta.transaction % META_PAGES == number
    return meta if is_one else None


def parse_branch(page: bytes, number: int) -> Branch | None:
    """Return where a branch leads; None if it is no branch."""
    pointers = _pointers(page, number, _BRANCH)
    if pointers is None:
        return None
    children = []
    for start in filter(_is_inside, pointers):
        first, second, flags, _ = _NODE.unpack_from(page, start)
        children.append(_joined(first, second) | flags << 32)
    return Branch(children, len(pointers) - len(children))


def parse_leaf(page: bytes, number: int) -> Leaf | None:
    """Return the entries of a leaf; None if it is no leaf."""
    pointers = _pointers(page, number, _LEAF)
    if pointers is None:
        return None
    nodes: list[Node] = []
    base = number * PAGE_BYTES
    unpack = _NODE.unpack_from
    for start in filter(_is_inside, pointers):
        first, second, flags, key_bytes = unpack(page, start)
        length = _joined(first, second)
        key_start = start + 8
        data = key_start + key_bytes
        if flags & _BIG:
            if data + 8 <= PAGE_BYTES and flags == _BIG:
                (value_page,) = _PAGE_NUMBER.unpack_from(page, data)
                if value_page < _MAX_PAGES:
                    place = value_page * PAGE_BYTES + PAGE_HEADER_BYTES
                    nodes.append(Node(page[key_start:data], length, place, True, False))
        elif data + length <= PAGE_BYTES and flags in (0, _SUBTREE):
            nodes.append(Node(page[key_start:data], length, base + data, False, flags == _SUBTREE))
    return Leaf(nodes, len(pointers) - len(nodes))


def overflow_pages(page: bytes, number: int) -> int:
    """Return how many pages of a value begin here; 0 if this is not the first page of one."""
    page_number, _, flags, count = _OVERFLOW_HEADER.unpack_from(page)
    return count if page_number == number and flags == _OVERFLOW else 0


def free_pages(value: bytes) -> list[int] | None:
    """Return the page numbers in an entry of the tree of free pages; None if it makes no sense."""
    if len(value) < _PAGE_NUMBER.size or len(value) % _PAGE_NUMBER.size:
        return None
    count, *numbers = struct.unpack(f"={len(value) // _PAGE_NUMBER.size}Q", value)
    # LMDB reserves what it may need, so there may be room behind the last one.
    return numbers[:count] if count <= len(numbers) else None


def freeing_transaction(node: Node) -> int:
    """Return by which transaction the pages in an entry of the tree of free pages were freed."""
    return int.from_bytes(node.key, sys.byteorder)


def _pointers(page: bytes, number: int, flag: int) -> tuple[int, ...] | None:
    """Return where a page says that its nodes begin; None if it is another page or of another kind."""
    page_number, _, flags, lower, upper = _HEADER.unpack_from(page)
    if page_number != number or flags != flag or lower % 2 or not PAGE_HEADER_BYTES <= lower <= upper <= PAGE_BYTES:
        return None
    pointers: tuple[int, ...] = struct.unpack_from(f"={(lower - PAGE_HEADER_BYTES) // 2}H", page, PAGE_HEADER_BYTES)
    return pointers


def _is_inside(start: int) -> bool:
    """Tell whether a node can begin here."""
    return PAGE_HEADER_BYTES < start <= PAGE_BYTES - _NODE.size


def _joined(first: int, second: int) -> int:
    return first | second << 16 if _IS_LITTLE_ENDIAN else first << 16 | second
