"""``lathe-cas fsck``: check a store from the command line.

    lathe-cas fsck --data-dir DIR              look, and say what is bad
    lathe-cas fsck --data-dir DIR --repair     drop what is bad; the service must be stopped

The settings are read as the service reads them: from the same file, variables and flags.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lathe_cas.config import CasSettings
from lathe_cas.eviction_policy import TOUCH_STEP_SECONDS
from lathe_cas.fsck.checker import CannotCheckError, CheckOptions, check_store
from lathe_cas.fsck.findings import ExitCode
from lathe_cas.fsck.progress import Progress
from lathe_cas.fsck.store_access import StoreInUseError
from lathe_cas.fsck.summary import summary
from lathe_shared.clock import SystemClock
from lathe_shared.config_loading import ConfigurationError, read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_TEMP_DIR = "/var/tmp"
"""On disk, where /tmp may be memory."""
_SEVERITY = (ExitCode.CLEAN, ExitCode.REPAIRED, ExitCode.PROBLEMS, ExitCode.CANNOT_CHECK, ExitCode.BROKEN)
"""With several folders the worst counts."""

INTERRUPTED = 130
"""What shells expect after Ctrl-C."""

_USAGE = """\
usage: lathe-cas fsck [--repair] [--digests] [--temp-dir DIR] [--config FILE] [--SETTING VALUE ...]

Check every chunk, record and reference of a store, and say what is bad.

  --repair             drop what is bad; lathe-cas must be stopped, and nothing is changed without this
  --digests            hash every blob, too; the checksums of chunks find the same damage, faster
  --temp-dir DIR       where temporary files go, some 130 bytes for each blob (TMPDIR, else /var/tmp)
  --help               print this text and do nothing else

The settings are those of lathe-cas, of which data_dir or data_dirs count: a flag before the variable, the variable
before the file.

Exit codes:
  0  the store is clean
  1  problems were found, and nothing was changed
  2  wrong usage, or the store cannot be opened, or it is in use and was to be repaired
  3  problems were found and repaired
  4  the file's own pages are damaged, which no repair mends
"""


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Check what the arguments name, and return the exit code.

    Args:
        arguments: What stands behind ``fsck``.
        environ: Environment variables.
    """
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(_USAGE)
        return ExitCode.CLEAN
    try:
        return max((_check(options) for options in _read_options(arguments, environ)), key=_SEVERITY.index)
    except ConfigurationError as error:
        _refuse(error.problems)
        return ExitCode.CANNOT_CHECK
    except KeyboardInterrupt:
        sys.stderr.write("\nlathe-cas fsck: interrupted\n")
        return INTERRUPTED


def _check(options: CheckOptions) -> ExitCode:
    """Check one folder, print what was found, and return its exit code."""
    try:
        findings = check_store(options, Progress(sys.stderr, is_terminal=sys.stderr.isatty()))
    except (CannotCheckError, StoreInUseError, OSError) as error:
        _refuse([str(error)])
        return ExitCode.CANNOT_CHECK
    code = findings.exit_code()
    sys.stdout.write(f"\n{options.path}\n\n{summary(findings, code)}")
    return code


def _refuse(problems: Sequence[str]) -> None:
    for problem in problems:
        sys.stderr.write(f"lathe-cas fsck: {problem}\n")


def _read_options(arguments: Sequence[str], environ: Mapping[str, str]) -> list[CheckOptions]:
    """Return what to check, folder by folder."""
    rest = list(arguments)
    own = {flag for flag in ("--repair", "--digests") if flag in rest}
    rest = [argument for argument in rest if argument not in own]
    temp_dir = environ.get("TMPDIR", DEFAULT_TEMP_DIR)
    for index, argument in enumerate(rest):
        flag, equals, value = argument.partition("=")
        if flag != "--temp-dir":
            continue
        if not equals and index + 1 == len(rest):
            raise ConfigurationError(["--temp-dir: needs a value, as in --temp-dir=…"])
        temp_dir = value if equals else rest[index + 1]
        del rest[index : index + (1 if equals else 2)]
        break
    settings = read_settings(CasSettings, rest, environ)
    return [
        CheckOptions(
            path=path,
            limit_bytes=settings.max_size_bytes_each,
            temp_dir=Path(temp_dir).expanduser(),
            repair="--repair" in own,
            digests="--digests" in own,
            step=int(SystemClock().wall_seconds()) // TOUCH_STEP_SECONDS,
        )
        for path in settings.all_data_dirs
    ]
