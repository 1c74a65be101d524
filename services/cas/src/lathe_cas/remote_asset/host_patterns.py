"""Which hosts content may come from.

Spec: RFC 6125 section 6.4.3 has the idea of ``*.suffix``, though here it stands for any number of labels.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)


class HostPatterns:
    """A list of hosts: each a name, an address, or ``*.`` and what names below it end with.

    Args:
        patterns: The list.

    Raises:
        ValueError: An entry is none of these.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact: set[str] = set()
        self._suffixes: list[str] = []
        for pattern in patterns:
            host = pattern.removeprefix("*.")
            if pattern.startswith("*."):
                self._suffixes.append("." + normalize_host(host))
            else:
                self._exact.add(normalize_host(host))
            if not _is_host(normalize_host(host), may_be_address=host == pattern):
                raise ValueError(f"{pattern!r} is not a host, an address, or *. and a suffix")

    def allows(self, host: str) -> bool:
        """Tell whether content may come from a host."""
        host = normalize_host(host)
        if host in self._exact:
            return True
        return bool(_NAME.fullmatch(host)) and not is_address(host) and host.endswith(tuple(self._suffixes))

    def names(self, host: str) -> bool:
        """Tell whether a host is listed itself, and so may have a private address."""
        return normalize_host(host) in self._exact


def normalize_host(host: str) -> str:
    """Return a host as it is compared."""
    return host.lower().removesuffix(".")


def is_address(host: str) -> bool:
    """Tell whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Tell whether an IP address can be reached from anywhere."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # An IPv4 address in one of its disguises goes where that goes.
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
        # What lies outside has a meaning of its own network's, such as another prefix for IPv4 addresses.
        return parsed in _GLOBAL_UNICAST and parsed.is_global
    return parsed.is_global and not parsed.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""Spec: IANA, Internet Protocol Version 6 Address Space."""


def _is_host(host: str, *, may_be_address: bool) -> bool:
    return may_be_address if is_address(host) else bool(_NAME.fullmatch(host))
