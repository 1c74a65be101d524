"""Instance names."""

from __future__ import annotations

import pytest

from lathe_shared.errors import InvalidArgumentError, UnknownInstanceError
from lathe_shared.instance_name import InstanceNames


@pytest.mark.parametrize("name", ["", "main", "a/b/c", "with space", "ünïcode", "x" * 1024])
def test_an_open_service_takes_any_well_formed_name(name: str) -> None:
    names = InstanceNames()

    assert names.check(name) == name
    assert names.check(name) == name


@pytest.mark.parametrize(
    "name", ["/", "a//b", "/a", "a/", "a/blobs/b", "uploads", "operations/x", "x" * 1025, "a\nb", "\0"]
)
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="instance_name"):
        InstanceNames().check(name)


def test_a_configured_service_names_what_it_knows() -> None:
    names = InstanceNames(["main", "team/one"])

    assert names.check("team/one") == "team/one"
    with pytest.raises(UnknownInstanceError, match=r"unknown instance 'mian'; this service knows 'main', 'team/one'"):
        names.check("mian")


def test_a_malformed_configured_name_is_refused_at_once() -> None:
    with pytest.raises(InvalidArgumentError):
        InstanceNames(["a//b"])


def test_what_it_remembers_is_bounded() -> None:
    names = InstanceNames()

    for i in range(5000):
        names.check(f"name-{i}")

    assert len(names._accepted) <= 1024
