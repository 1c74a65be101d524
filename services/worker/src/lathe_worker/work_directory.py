"""WorkDirectories: one place on disk for each running action, gone afterwards.

The removal of large trees takes longer than the action's client should wait; it happens behind the action, one at a
time.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from lathe_worker.tree_removal import remove_tree

if TYPE_CHECKING:
    from pathlib import Path

    from lathe_worker.sandbox import ActionUser

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WorkDirectory:
    """Where one action runs.

    Attributes:
        path: Holds the rest; only the worker and the actions' group may enter.
    """

    path: Path

    @property
    def exec_root(self) -> Path:
        """The input root."""
        return self.path / "root"

    @property
    def temporary(self) -> Path:
        """The action's ``/tmp``."""
        return self.path / "tmp"

    @property
    def stdout(self) -> Path:
        """Standard output."""
        return self.path / "stdout"

    @property
    def stderr(self) -> Path:
        """Standard error."""
        return self.path / "stderr"


class WorkDirectories:
    """Makes and removes work directories.

    Args:
        directory: Holds all of them.
        user: Owner of what an action may write; None for the worker itself.
    """

    def __init__(self, directory: Path, user: ActionUser | None) -> None:
        self._directory = directory
        self._user = user
        self._numbers = itertools.count()
        self._removals: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Semaphore(1)

    def purge(self) -> None:
        """Make the directory, empty of what an earlier run left; blocking, for start-up."""
        self._directory.mkdir(parents=True, exist_ok=True)
        # Others may pass through, to what is theirs, and not look around.
        self._directory.chmod(0o711 if self._user is not None else 0o700)
        for leftover in self._directory.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                remove_tree(leftover)
            else:
                leftover.unlink()

    def make(self) -> WorkDirectory:
        """Make the place for one action."""
        work = WorkDirectory(self._directory / str(next(self._numbers)))
        work.path.mkdir(0o710)
        work.exec_root.mkdir(0o755)
        work.temporary.mkdir()
        work.temporary.chmod(0o1777)  # as programs expect of /tmp
        if self._user is not None:
            os.chown(work.path, -1, self._user.gid)
            for directory in (work.exec_root, work.temporary):
                os.chown(directory, self._user.uid, self._user.gid)
        return work

    def discard(self, work: WorkDirectory) -> None:
        """Have a place removed in the background; failures are logged, and what is left goes at the next start."""
        task = asyncio.get_running_loop().create_task(self._remove(work))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def close(self) -> None:
        """Wait for removals to end."""
        await asyncio.gather(*self._removals)

    async def _remove(self, work: WorkDirectory) -> None:
        async with self._one_at_a_time:
            try:
                await asyncio.to_thread(remove_tree, work.path)
            except OSError as error:
                _log.warning("work_directory_not_removed", path=str(work.path), error=str(error))
