"""The action cache: action results that never dangle.

An ActionResult is handed out only if every blob that it names is there: output files, stdout, stderr, Trees and the
files in them, Directories and what lies below them. Which those are is worked out once, when the result is stored, if
the Trees are there by then; else when it is asked for.

Spec: REAPI, ActionCache.GetActionResult, on the lifetime of what a result refers to.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lathe_cas.action_result_store import ActionResultStore, FoundActionResult, StoredActionResult
from lathe_cas.soon import settled
from lathe_cas.tree_walk import INLINE_PARSE_BYTES, MAX_DIRECTORY_BYTES, read_together
from lathe_shared.action_result_wire import read_references
from lathe_shared.digest import Digest, DigestFunction
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.tree_wire import read_directory_blob, tree_file_digests
from lathe_shared.wire import MalformedMessageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Sequence

    from lathe_cas.blob_store import BlobStore
    from lathe_cas.soon import Soon

References = dict[tuple[bytes, int], None]
"""Key and size of blobs, each once, in order. A hash that comes with two sizes counts as two: only one can be there."""

MAX_TREE_BYTES = 256 << 20
"""Largest Tree that is read to see what it names: some two million files."""


class ActionCache:
    """Get and update action results.

    Args:
        results: Where they are kept.
        blobs: Where the blobs that they name are kept.
    """

    def __init__(self, results: ActionResultStore, blobs: BlobStore) -> None:
        self._results = results
        self._blobs = blobs

    def get(self, instance_name: str, action_digest: Digest) -> Soon[bytes | None]:
        """Return an action result if it is there and complete, and touch it and all that it names.

        An answer at once is the rule. It needs to be awaited if the result's Trees came after it, if a lease has to be
        renewed, and if it names many blobs.
        """
        found = self._results.get(instance_name, action_digest)
        if found is None:
            return None
        if not isinstance(found, FoundActionResult):
            return self._get_later(instance_name, action_digest, found)
        if found.expanded:
            return found.action_result
        return self._expand(instance_name, action_digest, found.action_result)

    async def _get_later(
        self, instance_name: str, action_digest: Digest, answer: Awaitable[FoundActionResult | None]
    ) -> bytes | None:
        found = await answer
        if found is None or found.expanded:
            return None if found is None else found.action_result
        return await self._expand(instance_name, action_digest, found.action_result)

    async def _expand(self, instance_name: str, action_digest: Digest, action_result: bytes) -> bytes | None:
        """Work out what a result names now that its Trees are there, and look it up again."""
        try:
            stored = await self._with_references(action_result, action_digest.function)
        except InvalidArgumentError:
            return None
        if not stored.expanded:
            return None
        found = await settled(self._results.get(instance_name, action_digest))
        if found is not None and found.action_result == action_result:
            # Still the same: a newer one that came while the Trees were read must not be replaced.
            await self._results.put(instance_name, action_digest, stored)
            found = await settled(self._results.get(instance_name, action_digest))
        return found.action_result if found is not None and found.expanded else None

    async def update(self, instance_name: str, action_digest: Digest, action_result: bytes) -> None:
        """Store an action result, durably.

        Raises:
            InvalidArgumentError: It is malformed, or names a Tree or Directory that is none.
            ResourceExhaustedError: No room is left.
        """
        stored = await self._with_references(action_result, action_digest.function)
        await self._results.put(instance_name, action_digest, stored)

    async def _with_references(self, action_result: bytes, function: DigestFunction) -> StoredActionResult:
        if len(action_result) <= INLINE_PARSE_BYTES:
            references, trees, roots = _named_by(action_result, function)
        else:
            references, trees, roots = await asyncio.to_thread(_named_by, action_result, function)
        expanded = True
        for tree in trees:
            references[tree.key, tree.size_bytes] = None
            expanded &= await self._add_tree(references, tree)
        if roots:
            expanded &= await self._add_directories(references, roots)
        return StoredActionResult(action_result, list(references), expanded)

    async def _add_tree(self, references: References, tree: Digest) -> bool:
        """Add the files that a Tree names; False if the Tree is not there."""
        if tree.size_bytes > MAX_TREE_BYTES:
            raise InvalidArgumentError("action_result", f"a Tree of {tree.size_bytes} bytes is too large")
        (data,) = await self._blobs.read_many([tree])
        if data is None:
            return False
        if len(data) <= INLINE_PARSE_BYTES:
            _add_tree_files(references, tree, data)
        else:
            await asyncio.to_thread(_add_tree_files, references, tree, data)
        return True

    async def _add_directories(self, references: References, roots: Sequence[Digest]) -> bool:
        """Add all that Directories name, at any depth; False if one of them is not there."""
        queue = list(dict.fromkeys(roots))
        seen = set(queue)
        position = 0
        complete = True
        while position < len(queue):
            level = read_together(queue, position)
            position += len(level)
            for digest in level:
                if digest.size_bytes > MAX_DIRECTORY_BYTES:
                    raise InvalidArgumentError(
                        "action_result", f"directory {digest} has too many bytes for a Directory"
                    )
            for digest, data in zip(level, await self._blobs.read_many(level), strict=True):
                references[digest.key, digest.size_bytes] = None
                if data is None:
                    complete = False
                    continue
                if len(data) <= INLINE_PARSE_BYTES:
                    children = _add_files(references, digest, data)
                else:
                    children = await asyncio.to_thread(_add_files, references, digest, data)
                for child in children:
                    if child not in seen:
                        seen.add(child)
                        queue.append(child)
        return complete


def _named_by(action_result: bytes, function: DigestFunction) -> tuple[References, list[Digest], list[Digest]]:
    """Return what an ActionResult names: files and the like, Trees, and root Directories."""
    named = read_references(action_result)
    references: References = {}
    _add(references, named.blobs, function, "action_result.output_files.digest")
    trees = _digests(named.trees, function, "action_result.output_directories.tree_digest")
    roots = _digests(named.root_directories, function, "action_result.output_directories.root_directory_digest")
    return references, trees, roots


def _add_tree_files(references: References, tree: Digest, data: bytes) -> None:
    """Add the files of a Tree."""
    field = f"tree {tree}"
    try:
        files = tree_file_digests(data)
    except MalformedMessageError as error:
        raise InvalidArgumentError(field, f"is no Tree: {error.reason}") from None
    _add(references, files, tree.function, field)


def _add_files(references: References, directory: Digest, data: bytes) -> list[Digest]:
    """Add the files of a Directory; return the directories in it."""
    field = f"directory {directory}"
    contents = read_directory_blob(data, field)
    _add(references, ((file.hash, file.size_bytes) for file in contents.files), directory.function, field)
    children = ((child.hash, child.size_bytes) for child in contents.directories)
    return _digests(children, directory.function, field)


def _digests(named: Iterable[tuple[str, int]], function: DigestFunction, field: str) -> list[Digest]:
    """Check digests; one that is present but empty says nothing, and is passed over."""
    return [Digest.parse(hash_, size, function, field) for hash_, size in named if hash_ or size]


def _add(references: References, named: Iterable[tuple[str, int]], function: DigestFunction, field: str) -> None:
    for digest in _digests(named, function, field):
        references[digest.key, digest.size_bytes] = None
