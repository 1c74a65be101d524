"""Generate the betterproto classes of ``lathe_protos`` from ``protos/proto``.

``generate_protos.py`` rewrites the generated packages in place. ``generate_protos.py --check`` generates them into a
temporary folder instead, compares, and exits with 1 and the names of the files that are stale, missing or left over:
what is checked in is then provably what the .proto files say.

The output depends on the versions of the generator and its formatters, so both must be those of ``constraints.txt``.
"""

import argparse
import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO_DIR = ROOT / "protos" / "proto"
PACKAGE_DIR = ROOT / "protos" / "src" / "lathe_protos"
# protoc's own copies of google/protobuf/*.proto; betterproto brings the classes for them.
WELL_KNOWN_DIR = Path(grpc_tools.__file__).resolve().parent / "_proto"

# Only these come from the generator. It also writes an empty ``__init__.py`` beside them, which must not replace the
# hand-written one of ``lathe_protos``.
GENERATED_PACKAGES = ("build", "google", "grpc", "lathe")

# Whatever has a say in the text of the output.
PINNED = ("betterproto", "grpcio-tools", "black", "isort", "Jinja2")


def generate(output_dir: Path) -> None:
    """Write the generated packages into ``output_dir``, replacing those that are there.

    Raises:
        SystemExit: protoc refused the .proto files; it has said on stderr why.
    """
    with tempfile.TemporaryDirectory(prefix="lathe-protos-") as temporary:
        fresh = Path(temporary)
        plugin = Path(sys.executable).parent / "protoc-gen-python_betterproto"
        arguments = [
            "protoc",
            f"--proto_path={PROTO_DIR}",
            f"--proto_path={WELL_KNOWN_DIR}",
            f"--plugin=protoc-gen-python_betterproto={plugin}",
            f"--python_betterproto_out={fresh}",
            *(str(path.relative_to(PROTO_DIR)) for path in sorted(PROTO_DIR.rglob("*.proto"))),
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc refused the .proto files")
        for name in GENERATED_PACKAGES:
            shutil.rmtree(output_dir / name, ignore_errors=True)
            shutil.copytree(fresh / name, output_dir / name)


def stale_files(checked_in: Path = PACKAGE_DIR) -> list[str]:
    """Return what differs between ``checked_in`` and a fresh generation, as paths in ``lathe_protos``."""
    with tempfile.TemporaryDirectory(prefix="lathe-protos-check-") as temporary:
        fresh = Path(temporary)
        generate(fresh)
        paths = {*_generated_files(checked_in), *_generated_files(fresh)}
        return sorted(str(path) for path in paths if _content(checked_in / path) != _content(fresh / path))


def version_mismatches() -> list[str]:
    """Return one line for each generator or formatter that is not at the version ``constraints.txt`` pins."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    installed = {name: importlib.metadata.version(name) for name in PINNED}
    return [
        f"{name} is {version} here, but {pins.get(name)} in constraints.txt"
        for name, version in installed.items()
        if version != pins.get(name)
    ]


def _generated_files(package_dir: Path) -> Iterator[Path]:
    for name in GENERATED_PACKAGES:
        for path in (package_dir / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(package_dir)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description="Generate lathe_protos from protos/proto.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if what is checked in is stale")
    options = parser.parse_args(argv)
    if mismatches := version_mismatches():
        print(*mismatches, sep="\n", file=sys.stderr)
        return 1
    if not options.check:
        generate(PACKAGE_DIR)
        return 0
    stale = stale_files()
    for name in stale:
        print(f"stale: protos/src/lathe_protos/{name}", file=sys.stderr)
    if stale:
        print("run tools/generate_protos.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
