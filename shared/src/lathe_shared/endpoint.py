"""Addresses of peer services, as people write them."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from typing_extensions import override

_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)


class Endpoint(NamedTuple):
    """Where a service listens.

    Attributes:
        host: Name or IP address, without brackets.
        port: TCP port.
    """

    host: str
    port: int

    @override
    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str, default_port: int) -> Endpoint:
    """Parse ``host`` or ``host:port``; an IPv6 address with a port stands in brackets, ``grpc://`` may stand in front.

    Args:
        text: What was configured.
        default_port: The port if ``text`` names none.

    Raises:
        ValueError: ``text`` is neither; the message says what is accepted.
    """
    address = text.strip().removeprefix("grpc://").rstrip("/")
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        port = rest.removeprefix(":")
        well_formed = bool(bracket) and (not rest or rest.startswith(":"))
    elif address.count(":") > 1:
        host, rest, port, well_formed = address, "", "", _is_ipv6(address)
    else:
        host, rest, port = address.partition(":")
        well_formed = True
    if not well_formed or not host or "/" in host or any(character.isspace() for character in host):
        raise ValueError(f"{text!r} is not an address: expected 'host' or 'host:port'")
    if not rest:
        return Endpoint(host, default_port)
    if not _PORT.fullmatch(port) or not 0 < int(port) <= 65535:
        raise ValueError(f"{text!r} is not an address: the port must be a number from 1 to 65535")
    return Endpoint(host, int(port))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
