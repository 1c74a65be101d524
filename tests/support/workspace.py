"""Make the C++ workspace that the end-to-end tests build with Bazel.

The files under ``workspace_files`` are taken as they are; the libraries, programs and C++ tests are generated, so that
there are enough of them (`CPP_LIBRARIES`, `SOURCES_PER_LIBRARY`) to keep several workers busy for a while.
"""

from __future__ import annotations

import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

FILES = Path(__file__).parent / "workspace_files"
CPP_LIBRARIES = 21
SOURCES_PER_LIBRARY = 3
CPP_BINARIES = 4
CPP_TESTS = 5


@dataclass(frozen=True)
class Workspace:
    """A generated workspace on disk.

    Attributes:
        root: The directory that holds the WORKSPACE file.
    """

    root: Path

    @property
    def compile_actions(self) -> int:
        """Count the C++ compile actions of ``//...``: one a source of each library, binary and test."""
        return CPP_LIBRARIES * SOURCES_PER_LIBRARY + CPP_BINARIES + CPP_TESTS

    def write_probe(self, *, port: int, worker_data: Path, mark: str) -> None:
        """Put in the script of ``//odd`` what it shall try to reach.

        Args:
            port: A port on loopback where something listens.
            worker_data: The data directory of the worker that will run the action.
            mark: Argument of ``sleep`` for the processes that try to outlive their action, to find them by.
        """
        script = (self.root / "odd/probe.sh.in").read_text()
        for name, value in {"PORT": str(port), "WORKER_DATA": str(worker_data), "MARK": mark}.items():
            script = script.replace(f"@{name}@", value)
        (self.root / "odd/probe.sh").write_text(script)


def make_workspace(root: Path, *, salt: str = "") -> Workspace:
    """Write the workspace into an empty or absent directory.

    Args:
        root: Where the workspace goes.
        salt: Text that goes into what every C++ action reads, so that two workspaces with different salts have no C++
            action in common, not even where the same object code comes out.

    Returns:
        The workspace.
    """
    shutil.copytree(FILES, root, dirs_exist_ok=True)
    for index in range(CPP_LIBRARIES):
        _write_library(root / "libs", index, salt)
    _write_programs(root / "apps", "cc_binary", "app", CPP_BINARIES)
    _write_programs(root / "cpp_checks", "cc_test", "check", CPP_TESTS)
    header = root / "generated/BUILD"
    header.write_text(header.read_text().replace("@SALT@", str(zlib.crc32(salt.encode()) % 10_000)))
    (root / "libs/BUILD").write_text("\n".join(_library_rule(index) for index in range(CPP_LIBRARIES)))
    workspace = Workspace(root)
    workspace.write_probe(port=1, worker_data=Path("/nowhere"), mark="0")
    return workspace


def _write_library(folder: Path, index: int, salt: str) -> None:
    folder.mkdir(exist_ok=True)
    name = f"lib_{index:02}"
    functions = [f"{name}_part_{part}" for part in range(SOURCES_PER_LIBRARY)]
    declarations = "\n".join(f"int {function}(int value);" for function in functions)
    (folder / f"{name}.h").write_text(f"#pragma once\n// {salt}\n{declarations}\n")
    for part, function in enumerate(functions):
        below = _dependency(index)
        call = "value" if below is None else f"{below}_part_{part}(value)"
        include = "" if below is None else f'#include "libs/{below}.h"\n'
        (folder / f"{name}_{part}.cc").write_text(
            f'#include "libs/{name}.h"\n#include "generated/answer.h"\n{include}'
            f"int {function}(int value) {{ return {call} + ANSWER + {part}; }}\n"
        )


def _dependency(index: int) -> str | None:
    """Name the library below: a forest of chains three deep, which leaves both parallel and serial work."""
    return None if index % 3 == 0 else f"lib_{index - 1:02}"


def _library_rule(index: int) -> str:
    name = f"lib_{index:02}"
    sources = ", ".join(f'"{name}_{part}.cc"' for part in range(SOURCES_PER_LIBRARY))
    below = _dependency(index)
    dependencies = "" if below is None else f'":{below}"'
    return (
        f'cc_library(\n    name = "{name}",\n    srcs = [{sources}, "//generated:header"],\n    hdrs = ["{name}.h"],\n'
        f'    deps = [{dependencies}],\n    visibility = ["//visibility:public"],\n)\n'
    )


def _write_programs(folder: Path, rule: str, stem: str, count: int) -> None:
    folder.mkdir()
    rules = []
    for index in range(count):
        library = f"lib_{(index * 3 + 2) % CPP_LIBRARIES:02}"
        name = f"{stem}_{index}"
        (folder / f"{name}.cc").write_text(
            f'#include <cstdio>\n#include "libs/{library}.h"\n'
            f'int main() {{ std::printf("{name} %d\\n", {library}_part_0({index})); return 0; }}\n'
        )
        size = '    size = "small",\n' if rule == "cc_test" else ""
        rules.append(
            f'{rule}(\n    name = "{name}",\n{size}    srcs = ["{name}.cc"],\n    deps = ["//libs:{library}"],\n'
            f'    visibility = ["//visibility:public"],\n)\n'
        )
    (folder / "BUILD").write_text("\n".join(rules))
