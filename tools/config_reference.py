"""Write docs/configuration.md from the settings classes of the three services.

``--check`` compares instead, and ends with 1 if the file is not what would be written: what CI runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from lathe_shared.config_loading import PLAIN_VARIABLES, ServiceSettings
from lathe_shared.config_reference import COMMANDS, reference_section

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"

SETTINGS = {
    "lathe_cas.config": "CasSettings",
    "lathe_scheduler.config": "SchedulerSettings",
    "lathe_worker.config": "WorkerSettings",
}

HEAD = """\
# Configuration

Written by `tools/config_reference.py` from the settings classes; change those, then run it again.

Each setting is a key of a TOML file (`--config FILE`, or the variable `LATHE_<SERVICE>_CONFIG`), a flag, and an
environment variable. `max_size_bytes` of lathe-cas, for example, is the flag `--max-size-bytes` and the variable
`LATHE_CAS_MAX_SIZE_BYTES`. A flag counts before the variable, the variable before the file, the file before the
default.

In flags and variables a list is written with commas or as JSON, a table as JSON. A flag that is true or false can stand
alone (`--name`) or negated (`--no-name`). `~` at the beginning of a path is the home directory.

What is unknown is refused, wherever it stands, and the service does not start.
"""


def compose() -> str:
    """Return what docs/configuration.md should hold."""
    commands = "\n".join(f"- `{flag}`: {text}" for flag, text in COMMANDS.items())
    plain = ", ".join(f"`{variable}` for `{name}`" for name, variable in PLAIN_VARIABLES.items())
    parts = [f"{HEAD}\n{commands}\n\nTwo settings have a variable without prefix, too: {plain}.\n"]
    for module, name in SETTINGS.items():
        settings_class = getattr(importlib.import_module(module), name)
        assert issubclass(settings_class, ServiceSettings)
        parts.append(reference_section(settings_class))
    return "\n".join(parts)


def main() -> int:
    """Write or compare, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    text = compose()
    if not arguments.check:
        TARGET.write_text(text)
        return 0
    if not TARGET.exists() or TARGET.read_text() != text:
        print(f"{TARGET.name} is not current: run tools/config_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
