"""What is checked in under lathe_protos is what the generator makes of protos/proto, and the check would tell."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools" / "generate_protos.py"


@pytest.fixture(name="tool", scope="module")
def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_protos", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_checked_in_code_is_current() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_check_names_changed_missing_and_left_over_files(tool: ModuleType, tmp_path: Path) -> None:
    for name in tool.GENERATED_PACKAGES:
        shutil.copytree(tool.PACKAGE_DIR / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert tool.stale_files(tmp_path) == []
    with (tmp_path / "build/bazel/semver/__init__.py").open("a") as changed:
        changed.write("# edited by hand\n")
    (tmp_path / "google/rpc/__init__.py").unlink()
    (tmp_path / "lathe/left_over.py").touch()
    assert tool.stale_files(tmp_path) == [
        "build/bazel/semver/__init__.py",
        "google/rpc/__init__.py",
        "lathe/left_over.py",
    ]


def test_generation_leaves_hand_written_modules_alone(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("by hand")
    (tmp_path / "reapi.py").write_text("by hand")
    tool.generate(tmp_path)
    assert (tmp_path / "__init__.py").read_text() == "by hand"
    assert (tmp_path / "reapi.py").read_text() == "by hand"
    assert {path.name for path in tmp_path.iterdir()} == {"__init__.py", "reapi.py", *tool.GENERATED_PACKAGES}


def test_another_version_of_the_generator_is_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = (ROOT / "constraints.txt").read_text().replace("betterproto==2.0.0b7", "betterproto==2.0.0b6")
    (tmp_path / "constraints.txt").write_text(pins)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().err == "betterproto is 2.0.0b7 here, but 2.0.0b6 in constraints.txt\n"
