"""Platform properties: what an action wants, what a worker offers, and when the two fit.

An action's properties become a canonical ``PlatformKey``; all actions with one key wait in one queue, so that matching
never looks at an action and a worker pair by pair. A worker's properties become a ``PlatformOffer``.

Spec: REAPI, message Platform. What a property's value means is the server's to define; here the configuration does.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from typing_extensions import override

from lathe_shared.errors import InvalidArgumentError

MAX_AMOUNT = 2**53
"""Largest amount of a ``minimum`` property: what still survives a JSON reader of the status page."""

MAX_PROPERTIES = 64
"""Most properties that an action may have: far above what clients send, and a bound for the key's size."""

_NUMBER = re.compile(r"[0-9]{1,16}", re.ASCII)


class PropertyKind(enum.StrEnum):
    """How the scheduler treats one property name."""

    MINIMUM = "minimum"
    """A number; the worker must have so much of it free, and the action takes it while it runs."""
    EXACT = "exact"
    """The value must be one of the worker's values."""
    PRIORITY = "priority"
    """Any worker will do; one that has the value is taken first."""
    IGNORE = "ignore"
    """Accepted and not looked at; the worker still sees it in the Action."""


@dataclass(frozen=True, slots=True)
class PlatformKey:
    """An action's wishes in canonical form: equal wishes, equal keys.

    Attributes:
        minimums: Amounts that the action takes while it runs, by name.
        exacts: Values that the worker must have, by name.
        preferences: Values that the worker had better have, by name.
    """

    minimums: tuple[tuple[str, int], ...] = ()
    exacts: tuple[tuple[str, str], ...] = ()
    preferences: tuple[tuple[str, str], ...] = ()

    @override
    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.wishes()) or "no properties"

    def wishes(self) -> Iterable[tuple[str, str]]:
        """Yield all names with their values as text."""
        yield from ((name, str(amount)) for name, amount in self.minimums)
        yield from self.exacts
        yield from self.preferences


@dataclass(frozen=True, slots=True)
class PlatformOffer:
    """What a worker has.

    Attributes:
        amounts: Capacity of each ``minimum`` property.
        values: Values of every other property; those of unknown names are kept for the status page.
    """

    amounts: Mapping[str, int]
    values: Mapping[str, frozenset[str]]

    def serves(self, key: PlatformKey) -> bool:
        """Tell whether the worker, idle, could run an action with this key."""
        return all(self.amounts.get(name, 0) >= amount for name, amount in key.minimums) and all(
            value in self.values.get(name, ()) for name, value in key.exacts
        )

    def preference_count(self, key: PlatformKey) -> int:
        """Count the key's preferences that the worker meets."""
        return sum(value in self.values.get(name, ()) for name, value in key.preferences)

    def describe(self, name: str) -> list[str]:
        """List the worker's values of one property as text; empty if it has none."""
        if name in self.amounts:
            return [str(self.amounts[name])]
        return sorted(self.values.get(name, ()))


class PlatformProperties:
    """The property names that a scheduler knows, and what each means.

    Args:
        kinds: Kind of each known name, from the configuration.
    """

    def __init__(self, kinds: Mapping[str, PropertyKind]) -> None:
        self.kinds = dict(kinds)

    def key(self, properties: Iterable[tuple[str, str]], field: str = "platform.properties") -> PlatformKey:
        """Turn an action's properties into a key.

        A name that repeats wants all its values; of amounts, the largest. An amount of zero is no wish at all.

        Args:
            properties: Names and values, in any order.
            field: Path of the properties in the request, for the error.

        Raises:
            InvalidArgumentError: A name is unknown, or the value of a ``minimum`` property is no number.
        """
        minimums: dict[str, int] = {}
        exacts: set[tuple[str, str]] = set()
        preferences: set[tuple[str, str]] = set()
        for count, (name, value) in enumerate(properties):
            if count == MAX_PROPERTIES:
                raise InvalidArgumentError(field, f"more than {MAX_PROPERTIES} properties")
            kind = self._kind(name, field)
            if kind is PropertyKind.MINIMUM:
                minimums[name] = max(minimums.get(name, 0), _amount(name, value, field))
            elif kind is PropertyKind.EXACT:
                exacts.add((name, value))
            elif kind is PropertyKind.PRIORITY:
                preferences.add((name, value))
        amounts = sorted((name, amount) for name, amount in minimums.items() if amount)
        return PlatformKey(tuple(amounts), tuple(sorted(exacts)), tuple(sorted(preferences)))

    def offer(self, properties: Iterable[tuple[str, str]], field: str = "properties") -> PlatformOffer:
        """Turn a worker's properties into an offer; amounts of a repeated name add up.

        Raises:
            InvalidArgumentError: The value of a ``minimum`` property is no number.
        """
        amounts: dict[str, int] = {}
        values: dict[str, set[str]] = {}
        for name, value in properties:
            if self.kinds.get(name) is PropertyKind.MINIMUM:
                amounts[name] = amounts.get(name, 0) + _amount(name, value, field)
            else:
                values.setdefault(name, set()).add(value)
        return PlatformOffer(amounts, {name: frozenset(some) for name, some in values.items()})

    def _kind(self, name: str, field: str) -> PropertyKind:
        kind = self.kinds.get(name)
        if kind is None:
            known = ", ".join(sorted(self.kinds)) or "none"
            raise InvalidArgumentError(
                field, f"unknown platform property {name[:200]!r}; this scheduler knows: {known}"
            )
        return kind


def _amount(name: str, value: str, field: str) -> int:
    if not _NUMBER.fullmatch(value) or int(value) > MAX_AMOUNT:
        raise InvalidArgumentError(
            field, f"{name}={value[:200]!r} must be a whole number from 0 to {MAX_AMOUNT}, as a 'minimum' property is"
        )
    return int(value)
