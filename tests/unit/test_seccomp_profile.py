"""The worker's seccomp profile as a text; tests/compose asks the kernel what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PROFILE = Path(__file__).parents[2] / "compose/seccomp-worker.json"

# The kernel asks for a capability before most of these; the profile is there for the day when it forgets to.
NEVER = """
    acct add_key adjtimex bpf chroot clock_adjtime clock_settime create_module delete_module fanotify_init
    finit_module fsconfig fsmount fsopen fspick init_module io_uring_enter io_uring_register io_uring_setup
    ioperm iopl kexec_file_load kexec_load keyctl lookup_dcookie mount_setattr move_mount move_pages
    name_to_handle_at nfsservctl open_by_handle_at open_tree perf_event_open pidfd_getfd process_vm_writev
    quotactl reboot request_key setdomainname setns settimeofday stime swapoff swapon syslog umount
    userfaultfd uselib vhangup vm86 vm86old
"""
# Without these bubblewrap makes no sandbox.
ALWAYS = {"clone", "unshare", "mount", "umount2", "pivot_root", "sethostname"}


@pytest.fixture
def profile() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PROFILE.read_text())
    return found


def allowed(profile: dict[str, Any]) -> list[str]:
    return [name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]]


def test_what_is_not_named_is_refused(profile: dict[str, Any]) -> None:
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {rule["action"] for rule in profile["syscalls"]} == {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"}


def test_it_names_what_bubblewrap_needs_and_nothing_that_changes_the_machine(profile: dict[str, Any]) -> None:
    names = set(allowed(profile))
    assert names >= ALWAYS
    assert not names & set(NEVER.split())


def test_each_call_stands_in_one_rule_unless_its_arguments_differ(profile: dict[str, Any]) -> None:
    seen: set[tuple[str, str]] = set()
    for rule in profile["syscalls"]:
        for name in rule["names"]:
            key = (name, json.dumps(rule.get("args", [])))
            assert key not in seen
            seen.add(key)
    assert {name for name, _ in seen if (name, "[]") not in seen} == {"socket", "personality"}


def test_clone3_is_absent_rather_than_refused(profile: dict[str, Any]) -> None:
    rule = next(rule for rule in profile["syscalls"] if "clone3" in rule["names"])
    assert (rule["names"], rule["action"], rule["errnoRet"]) == (["clone3"], "SCMP_ACT_ERRNO", 38)
