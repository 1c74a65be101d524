"""Which pages of the file are what, as far as its trees can be followed.

A page may be a leftover: LMDB never writes over a page that is in use, so old states of every page lie about until they
are used again. If all trees are sound, they alone say what is in the store. If one is not, the pages that were below
the damage belong to none of the trees and are not free either, and those are looked at one by one. If the free pages
are not known, all pages are that the trees do not lead to.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from lathe_cas.salvage.lmdb_pages import (
    MAX_DEPTH,
    META_PAGES,
    NO_PAGE,
    TREE_BYTES,
    Leaf,
    Meta,
    Node,
    Tree,
    free_pages,
    freeing_transaction,
    overflow_pages,
    parse_branch,
    parse_leaf,
    parse_meta,
)
from lathe_cas.stores.lmdb_access_log import GROUP_KEY
from lathe_cas.stores.lmdb_records import CHUNK_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lathe_cas.fsck.progress import Progress
    from lathe_cas.salvage.page_file import PageFile

_UNKNOWN, _FREE, _USED, _FIRST_LEAF = 0, 1, 2, 16
"""States of a page. That of a leaf says of which tree it is, too."""
_ANY_LEAF = re.compile(rb"[\x10-\xff]")

_FREE_TREE, _MAIN_TREE = 0, 1
_DATABASES = (b"meta", b"blobs", b"chunks", b"access", b"action_results", b"uploads", b"garbage")

_LONGEST_RUN_PAGES = 32
"""Overflow pages of one value in the databases at most, rounded up: 1,024 keys of the access log take 21."""

_KEYS_OF_LONG_VALUES = (CHUNK_KEY.size, GROUP_KEY.size)
"""Lengths of the keys of values that may take overflow pages."""


class PageOfNodes(NamedTuple):
    """A leaf with what it holds.

    Attributes:
        page: Its bytes.
        leaf: Its entries.
        database: Of which database it is; None if no tree leads to it.
    """

    page: bytes
    leaf: Leaf
    database: bytes | None


class PageMap:
    """Says of each page what it is: a byte of memory for each.

    Args:
        file: The file.
        progress: Where to show how far it is.

    Attributes:
        trees_are_whole: Whether all trees but that of free pages are sound, once ``reached_leaves`` is through.
        is_newest: Whether the state of the file that is looked at is surely the last one.
        free_is_known: Whether the free pages are known, once ``lost_leaves`` has begun.
        malformed_pages: Pages of trees that make no sense.
        malformed_nodes: Entries of leaves that make no sense.
    """

    def __init__(self, file: PageFile, progress: Progress) -> None:
        self.trees_are_whole = False
        self.free_is_known = False
        self.malformed_pages = 0
        self.malformed_nodes = 0
        self._file = file
        self._progress = progress
        self._states = bytearray(file.pages)
        metas = [parse_meta(file.page(number), number) for number in range(min(META_PAGES, file.pages))]
        self._states[:META_PAGES] = bytes((_USED,)) * min(META_PAGES, file.pages)
        self._meta = _newest(metas)
        self.is_newest = _follow_each_other(metas) and self._free_trees_agree(metas)
        self._trees: dict[int, Tree] = {}
        self._sound: dict[int, bool] = {}
        self._free_nodes: list[Node] = []

    def _free_trees_agree(self, metas: list[Meta | None]) -> bool:
        """Tell whether the newer state has what was freed last; one whose number is damaged only seems newer."""
        states = sorted((meta.transaction, self._last_freeing(meta.free)) for meta in metas if meta is not None)
        freed = [last for _, last in states]
        return freed == sorted(freed) and all(last <= transaction for transaction, last in states)

    def _last_freeing(self, free: Tree) -> int:
        """Return the last transaction that a tree of free pages has pages of; 0 if it cannot be read."""
        number = free.root
        for _ in range(min(free.depth, MAX_DEPTH) - 1):
            branch = parse_branch(self._file.page(number), number) if number < self._file.pages else None
            if branch is None or not branch.children:
                return 0
            number = branch.children[-1]
        leaf = parse_leaf(self._file.page(number), number) if number < self._file.pages else None
        return freeing_transaction(leaf.nodes[-1]) if leaf and leaf.nodes else 0

    def reached_leaves(self) -> Iterator[PageOfNodes]:
        """Follow all trees, and give their leaves in the order of the file."""
        if self._meta is None:
            return
        with self._progress.ticking("trees"):
            self._follow(_FREE_TREE, self._meta.free)
            self._follow(_MAIN_TREE, self._meta.main)
            self._follow_databases()
        counts: dict[int, Counter[str]] = {index: Counter() for index in self._trees}
        leaves = sum(tree.leaf_pages for tree in self._trees.values())
        with self._progress.phase("leaf pages", min(leaves, self._file.pages)):
            for found in _ANY_LEAF.finditer(self._states):
                number = found.start()
                index = self._states[number] - _FIRST_LEAF
                # A value whose leaf came first may claim a page that a damaged branch led to.
                leaf = None if index < 0 else self._leaf(number, index, counts[index])
                if leaf is not None:
                    yield leaf
                self._progress.step()
        for index, tree in self._trees.items():
            self._sound[index] &= counts[index] == _counts_of(tree)
        self.trees_are_whole = all(self._sound[index] for index in self._sound if index != _FREE_TREE) and (
            len(self._trees) == _MAIN_TREE + 1 + len(_DATABASES)
        )

    def lost_leaves(self) -> Iterator[PageOfNodes]:
        """Give the leaves that no tree leads to and that are not known to be free."""
        self._mark_free()
        states = self._states
        with self._progress.phase("pages that no tree leads to", states.count(_UNKNOWN)):
            stop = 0
            while (start := states.find(_UNKNOWN, stop)) >= 0:
                stop = start
                while stop < len(states) and states[stop] == _UNKNOWN:
                    stop += 1
                yield from self._lost_leaves(start, stop)

    def _lost_leaves(self, start: int, stop: int) -> Iterator[PageOfNodes]:
        skip_to = start
        for number, page in self._file.run(start, stop):
            self._progress.step()
            # Pages of a value hold what a client sent, which may well look like a page.
            if number < skip_to or self._states[number] != _UNKNOWN:
                continue
            count = overflow_pages(page, number)
            if count <= _LONGEST_RUN_PAGES:
                skip_to = number + count
            leaf = parse_leaf(page, number)
            if leaf is not None:
                self.malformed_nodes += leaf.malformed
                self._mark_values(leaf)
                yield PageOfNodes(page, leaf, None)

    def _follow(self, index: int, tree: Tree) -> None:
        """Follow a tree down to the numbers of its leaves, and mark all its pages."""
        self._trees[index] = tree
        self._sound[index] = self._mark_tree(index, tree)

    def _mark_tree(self, index: int, tree: Tree) -> bool:
        if tree.root == NO_PAGE:
            return not tree.entries
        if not 0 < tree.depth <= MAX_DEPTH:
            return False
        is_sound = True
        branches = 0
        waiting = [(tree.root, tree.depth)]
        while waiting:
            number, level = waiting.pop()
            if not META_PAGES <= number < self._file.pages or self._states[number] != _UNKNOWN:
                is_sound = False
                continue
            if level == 1:
                self._states[number] = _FIRST_LEAF + index
                continue
            self._states[number] = _USED
            branch = parse_branch(self._file.page(number), number)
            if branch is None:
                self.malformed_pages += 1
                is_sound = False
                continue
            is_sound &= not branch.malformed
            branches += 1
            waiting += [(child, level - 1) for child in reversed(branch.children)]
        return is_sound and branches == tree.branch_pages

    def _follow_databases(self) -> None:
        """Find the databases in the main tree, which is a page or two."""
        leaf_state = _FIRST_LEAF + _MAIN_TREE
        for number in [found.start() for found in re.finditer(re.escape(bytes((leaf_state,))), self._states)]:
            page = self._file.page(number)
            leaf = parse_leaf(page, number)
            for node in leaf.nodes if leaf else ():
                if node.key in _DATABASES and node.is_subtree and node.length == TREE_BYTES:
                    self._follow(_MAIN_TREE + 1 + _DATABASES.index(node.key), Tree.unpack(node.value(page)))

    def _leaf(self, number: int, index: int, counts: Counter[str]) -> PageOfNodes | None:
        page = self._file.page(number)
        leaf = parse_leaf(page, number)
        if leaf is None:
            self.malformed_pages += 1
            return None
        self.malformed_nodes += leaf.malformed
        self._mark_values(leaf, index)
        counts["leaf pages"] += 1
        counts["entries"] += len(leaf.nodes)
        counts["overflow pages"] += sum(node.overflow_pages for node in leaf.nodes)
        if index == _FREE_TREE:
            self._free_nodes += leaf.nodes
        return PageOfNodes(page, leaf, None if index <= _MAIN_TREE else _DATABASES[index - _MAIN_TREE - 1])

    def _mark_values(self, leaf: Leaf, index: int | None = None) -> None:
        """Mark the overflow pages of a leaf's values, which hold no entries whatever they look like."""
        for node in leaf.nodes:
            makes_sense = node.overflow_pages <= _LONGEST_RUN_PAGES and len(node.key) in _KEYS_OF_LONG_VALUES
            if node.is_big and (makes_sense or index == _FREE_TREE):
                self._mark_run(node)

    def _mark_run(self, node: Node) -> None:
        first, states = node.first_page, self._states
        stop = min(first + node.overflow_pages, len(states))
        # What is known already stays: a damaged length or page number must not hide pages that trees lead to.
        if states.count(_UNKNOWN, first, stop) == stop - first:
            states[first:stop] = bytes((_USED,)) * (stop - first)
            return
        for number in range(first, stop):
            states[number] = states[number] or _USED

    def _mark_free(self) -> None:
        """Mark what is free, unless that is not known for sure."""
        if self._meta is None or not self.is_newest or not self._sound[_FREE_TREE]:
            return
        last_page = self._meta.last_page
        states = self._states
        for node in self._free_nodes:
            numbers = free_pages(self._file.read(node.place, node.length))
            if numbers is None or not all(META_PAGES <= number <= last_page for number in numbers):
                break
            for number in numbers:
                # The file may end before the last page, if that is free.
                if number < len(states):
                    if states[number] != _UNKNOWN:
                        break
                    states[number] = _FREE
            else:
                continue
            break
        else:
            self.free_is_known = True
            for number in range(last_page + 1, len(states)):
                states[number] = states[number] or _FREE
            return
        self._states = states.replace(bytes((_FREE,)), bytes((_UNKNOWN,)))


def _newest(metas: list[Meta | None]) -> Meta | None:
    return max((meta for meta in metas if meta is not None), key=lambda meta: meta.transaction, default=None)


def _follow_each_other(metas: list[Meta | None]) -> bool:
    """Tell whether these are the states after the last two transactions, as they always are."""
    transactions = [meta.transaction for meta in metas if meta is not None]
    return len(transactions) == META_PAGES and abs(transactions[0] - transactions[1]) <= 1


def _counts_of(tree: Tree) -> Counter[str]:
    return Counter({"leaf pages": tree.leaf_pages, "entries": tree.entries, "overflow pages": tree.overflow_pages})
