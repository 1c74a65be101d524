"""``lathe-cas fsck``: check a store from the command line.

    lathe-cas fsck --data-dir DIR              look, and say what is bad
    lathe-cas fsck --data-dir DIR --repair     drop what is bad; the service must be stopped
    lathe-cas fsck --data-dir DIR --salvage NEW_DIR
                                               copy what is whole into a new store, whatever is damaged

The settings are read as the service reads them: from the same file, variables and flags.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lathe_cas.config import CasSettings
from lathe_cas.eviction_policy import TOUCH_STEP_SECONDS
from lathe_cas.fsck.checker import CannotCheckError, CheckOptions
from lathe_cas.fsck.child import check_apart
from lathe_cas.fsck.findings import ExitCode
from lathe_cas.fsck.progress import Progress
from lathe_cas.fsck.store_access import StoreInUseError
from lathe_cas.fsck.summary import summary
from lathe_cas.salvage.salvaging import CannotSalvageError, SalvageOptions, salvage
from lathe_shared.clock import SystemClock
from lathe_shared.config_loading import ConfigurationError, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lathe_cas.fsck.findings import Findings

DEFAULT_TEMP_DIR = "/var/tmp"
"""On disk, where /tmp may be memory."""
_SEVERITY = (
    ExitCode.CLEAN,
    ExitCode.REPAIRED,
    ExitCode.PROBLEMS,
    ExitCode.CANNOT_CHECK,
    ExitCode.BROKEN,
    ExitCode.CRASHED,
)
"""With several folders the worst counts."""

INTERRUPTED = 130
"""What shells expect after Ctrl-C."""

_USAGE = """\
usage: lathe-cas fsck [--repair] [--digests] [--temp-dir DIR] [--config FILE] [--SETTING VALUE ...]
       lathe-cas fsck --salvage NEW_DIR [--temp-dir DIR] [--config FILE] [--SETTING VALUE ...]

Check every chunk, record and reference of a store, and say what is bad. Or copy what is whole of a store, whatever else
is damaged, into a new one.

  --repair             drop what is bad; lathe-cas must be stopped, and nothing is changed without this
  --digests            hash every blob, too; the checksums of chunks find the same damage, faster
  --salvage NEW_DIR    copy what is whole into a new store there, an empty folder or none; lathe-cas must be stopped,
                       and nothing of the old store is changed; it goes by checksums and digests alone
  --temp-dir DIR       where temporary files go, some 130 bytes for each blob (TMPDIR, else /var/tmp)
  --help               print this text and do nothing else

The settings are those of lathe-cas, of which data_dir or data_dirs count: a flag before the variable, the variable
before the file.

Exit codes:
  0  the store is clean
  1  problems were found, and nothing was changed
  2  wrong usage, or the store cannot be opened, or it is in use and was to be repaired
  3  problems were found and repaired
  4  the file's own pages are damaged, which no repair mends; --salvage saves what is whole
  5  the same, and LMDB ended the check on coming upon it
With --salvage:
  0  everything was saved
  1  something is lost, or that cannot be told; the rest was saved
  2  wrong usage, no store, or it is in use, or the new folder is not empty or cannot be written
"""


def main(
    arguments: Sequence[str], environ: Mapping[str, str], check: Callable[[CheckOptions], Findings] = check_apart
) -> int:
    """Check or salvage what the arguments name, and return the exit code.

    Args:
        arguments: What stands behind ``fsck``.
        environ: Environment variables.
        check: How a folder is checked.
    """
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(_USAGE)
        return ExitCode.CLEAN
    try:
        command = _read_command(arguments, environ)
        if command.salvage_to is not None:
            return _salvage(command, command.salvage_to)
        return max((_check(options, check) for options in command.checks()), key=_SEVERITY.index)
    except ConfigurationError as error:
        _refuse(error.problems)
        return ExitCode.CANNOT_CHECK
    except KeyboardInterrupt:
        sys.stderr.write("\nlathe-cas fsck: interrupted\n")
        return INTERRUPTED


def _check(options: CheckOptions, check: Callable[[CheckOptions], Findings]) -> ExitCode:
    """Check one folder, print what was found, and return its exit code."""
    try:
        findings = check(options)
    except (CannotCheckError, StoreInUseError, OSError) as error:
        _refuse([str(error)])
        return ExitCode.CANNOT_CHECK
    code = findings.exit_code()
    sys.stdout.write(f"\n{options.path}\n\n{summary(findings, code)}")
    return code


def _salvage(command: _Command, target: Path) -> ExitCode:
    """Salvage one folder, print what came of it, and return the exit code."""
    (path,) = command.settings.all_data_dirs
    options = SalvageOptions(path, target, command.settings.max_size_bytes_each, command.temp_dir, command.step)
    try:
        outcome = salvage(options, Progress(sys.stderr, is_terminal=sys.stderr.isatty()))
    except (CannotSalvageError, StoreInUseError, OSError) as error:
        _refuse([str(error)])
        return ExitCode.CANNOT_CHECK
    sys.stdout.write(f"\n{path}\n\n{outcome.summary(target)}")
    return outcome.exit_code()


def _refuse(problems: Sequence[str]) -> None:
    for problem in problems:
        sys.stderr.write(f"lathe-cas fsck: {problem}\n")


@dataclass(frozen=True, slots=True)
class _Command:
    """What the arguments ask for.

    Attributes:
        settings: The service's.
        flags: Those without a value.
        temp_dir: Where temporary files go.
        salvage_to: The new store's folder; None to check.
        step: The current touch step.
    """

    settings: CasSettings
    flags: frozenset[str]
    temp_dir: Path
    salvage_to: Path | None
    step: int

    def checks(self) -> list[CheckOptions]:
        """Return what to check, folder by folder."""
        return [
            CheckOptions(
                path=path,
                limit_bytes=self.settings.max_size_bytes_each,
                temp_dir=self.temp_dir,
                repair="--repair" in self.flags,
                digests="--digests" in self.flags,
                step=self.step,
            )
            for path in self.settings.all_data_dirs
        ]


def _read_command(arguments: Sequence[str], environ: Mapping[str, str]) -> _Command:
    """Tell fsck's own flags from the settings.

    Raises:
        ConfigurationError: There is a mistake in either.
    """
    rest = list(arguments)
    flags = frozenset(rest) & {"--repair", "--digests"}
    rest = [argument for argument in rest if argument not in flags]
    temp_dir = _take_value(rest, "--temp-dir") or environ.get("TMPDIR", DEFAULT_TEMP_DIR)
    salvage_to = _take_value(rest, "--salvage")
    settings = read_settings(CasSettings, rest, environ)
    if salvage_to is not None:
        if flags:
            raise ConfigurationError([f"--salvage: not together with {' and '.join(sorted(flags))}"])
        if len(settings.all_data_dirs) > 1:
            raise ConfigurationError(["--salvage: one folder at a time; name it, as in --data-dirs=DIR"])
    return _Command(
        settings,
        flags,
        Path(temp_dir).expanduser(),
        None if salvage_to is None else Path(salvage_to).expanduser(),
        int(SystemClock().wall_seconds()) // TOUCH_STEP_SECONDS,
    )


def _take_value(arguments: list[str], wanted: str) -> str | None:
    """Take a flag and its value out of the arguments; None if it is not there."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag != wanted:
            continue
        if not equals and index + 1 == len(arguments):
            raise ConfigurationError([f"{wanted}: needs a value, as in {wanted}=…"])
        taken = value if equals else arguments[index + 1]
        del arguments[index : index + (1 if equals else 2)]
        return taken
    return None
