"""Removing what actions leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lathe_worker.tree_removal import remove_tree


def test_closed_directories_go(tmp_path: Path) -> None:
    deep = tmp_path / "tree/a/b"
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    for path in (deep, deep.parent, tmp_path / "tree"):
        path.chmod(0)
    remove_tree(tmp_path / "tree")

    assert list(tmp_path.iterdir()) == []


def test_symlinks_are_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(kept)
    (tree / "dangling").symlink_to("nowhere")
    remove_tree(tree)

    assert not tree.exists()
    assert (kept / "file").read_text() == "x"


def test_a_symlink_in_place_of_the_tree_is_removed_itself_or_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / "tree").symlink_to(kept)
    with pytest.raises(OSError, match="tree"):
        remove_tree(tmp_path / "tree")

    assert (kept / "file").exists()


def test_nesting_deeper_than_paths_and_descriptors_allow_goes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    here = os.open(tree, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("directory", dir_fd=here)
        os.mkdir("beside", dir_fd=here)
        below = os.open("directory", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove_tree(tree)

    assert list(tmp_path.iterdir()) == []


def test_what_is_absent_is_no_error(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")
    remove_tree(tmp_path / "nothing/below")
