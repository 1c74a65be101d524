"""The check in a process of its own, which LMDB may bring down.

LMDB trusts the pages of its file. Some damage has it end the process: by an assertion (SIGABRT), by an address beyond
its map (SIGSEGV), or by a page that the file or the disk does not have (SIGBUS). Here that is a finding.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from lathe_cas.fsck.checker import CannotCheckError, check_store
from lathe_cas.fsck.findings import Findings, Problem
from lathe_cas.fsck.progress import Progress
from lathe_cas.fsck.store_access import StoreInUseError

if TYPE_CHECKING:
    from lathe_cas.fsck.checker import CheckOptions

_CRASHES = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


def check_apart(options: CheckOptions) -> Findings:
    """Check a store, and repair it if that is wanted, as ``check_store`` does; if LMDB crashes, say so.

    Raises:
        StoreInUseError: It is to be repaired, and a process has it open.
        CannotCheckError: It cannot be opened, or the check was ended from outside.
        OSError: A file cannot be read or written.
    """
    # -P: nothing of the folder that this happens to run in is imported.
    command = [sys.executable, "-P", "-m", "lathe_cas.fsck.child"]
    # Standard error is the caller's: the child shows its progress there, and LMDB its last words.
    child = subprocess.run(command, input=pickle.dumps(options), stdout=subprocess.PIPE, check=False)
    if child.returncode == 0:
        result = pickle.loads(child.stdout)
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Findings)
        return result
    if -child.returncode not in _CRASHES:
        raise CannotCheckError(f"the check was ended: exit code {child.returncode}")
    findings = Findings()
    findings.add(Problem.CRASH, f"LMDB ended the process by {signal.Signals(-child.returncode).name}")
    return findings


def check_here(options: CheckOptions) -> Findings:
    """Check a store in this process; see ``check_store``."""
    return check_store(options, Progress(sys.stderr, is_terminal=sys.stderr.isatty()))


def main() -> None:
    """Be the child: options come by standard input, findings or an error leave by standard output."""
    options: CheckOptions = pickle.load(sys.stdin.buffer)
    result: Findings | Exception
    try:
        result = check_here(options)
    except (CannotCheckError, StoreInUseError, OSError) as error:
        result = error
    except KeyboardInterrupt:
        # The terminal told the parent, too, and that says so.
        os._exit(1)
    pickle.dump(result, sys.stdout.buffer)


if __name__ == "__main__":
    main()
