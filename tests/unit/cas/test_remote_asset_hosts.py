"""Which hosts the list lets pass, and which addresses are public."""

from __future__ import annotations

import pytest

from lathe_cas.config import CasSettings
from lathe_cas.remote_asset.host_patterns import HostPatterns, is_public

HOSTS = HostPatterns(["github.com", "*.githubusercontent.com", "10.1.2.3", "::1", "Upper.Example"])


@pytest.mark.parametrize(
    "host",
    [
        "github.com",
        "GitHub.COM",
        "github.com.",
        "raw.githubusercontent.com",
        "a.b.githubusercontent.com",
        "10.1.2.3",
        "::1",
    ],
)
def test_what_is_listed_is_allowed(host: str) -> None:
    assert HOSTS.allows(host)


@pytest.mark.parametrize(
    "host",
    [
        "api.github.com",
        "evilgithub.com",
        "github.com.evil",
        "githubusercontent.com",
        "evilgithubusercontent.com",
        "10.1.2.4",
        "::2",
        "127.0.0.1",
        ".githubusercontent.com.",
    ],
)
def test_what_is_not_listed_is_not(host: str) -> None:
    assert not HOSTS.allows(host)


def test_only_what_is_named_itself_may_be_private() -> None:
    assert HOSTS.names("upper.example")
    assert not HOSTS.names("raw.githubusercontent.com")


@pytest.mark.parametrize(
    "pattern", ["", "*", "*.", "*.10.0.0.1", "http://x", "x/y", "x:80", "a b", "-x", "*.*.x", "x*"]
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        HostPatterns([pattern])


def test_the_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="is not a host"):
        CasSettings(remote_asset=True, remote_asset_hosts=["http://x"])
    with pytest.raises(ValueError, match="no use without remote_asset"):
        CasSettings(remote_asset_hosts=["x"])


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:224.0.0.1",
        "::ffff:0:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a00:1",
        "fec0::1",
        "2002:7f00:1::",
        "ff02::1",
    ],
)
def test_addresses_of_a_network_of_ones_own(address: str) -> None:
    assert not is_public(address)
