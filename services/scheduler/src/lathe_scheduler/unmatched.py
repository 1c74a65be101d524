"""Say why no worker can run an action, so that a build engineer knows what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lathe_shared.errors import FailedPreconditionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lathe_scheduler.platform_key import PlatformKey, PlatformOffer

_VALUES_SHOWN = 10
"""Values of one property that a message lists; a cluster has few kinds of workers."""


def unmatched_error(key: PlatformKey, offers: Sequence[PlatformOffer]) -> FailedPreconditionError:
    """Explain which property of a key no worker satisfies.

    FAILED_PRECONDITION without details: clients don't try that again, since it would end the same way.

    Args:
        key: What the action wants.
        offers: What all known and configured workers have.

    Spec: REAPI, Execution.Execute, errors: "FAILED_PRECONDITION ... no worker being available".
    """
    if not offers:
        return FailedPreconditionError(
            f"no worker can run this action ({key}): none is connected to the scheduler, none was lately, and none is "
            "configured"
        )
    wishes: list[tuple[str, int | str]] = [*key.minimums, *key.exacts]
    for name, wanted in wishes:
        if not any(_satisfies(offer, name, wanted) for offer in offers):
            return FailedPreconditionError(
                f"no worker can run this action: it wants platform property {name}={wanted}, "
                f"and {_offered(name, offers)}"
            )
    return FailedPreconditionError(
        f"no worker can run this action: each of its platform properties ({key}) is satisfied by some worker, but no "
        "worker satisfies all of them"
    )


def _satisfies(offer: PlatformOffer, name: str, wanted: int | str) -> bool:
    if isinstance(wanted, int):
        return offer.amounts.get(name, 0) >= wanted
    return wanted in offer.values.get(name, ())


def _offered(name: str, offers: Iterable[PlatformOffer]) -> str:
    values = {value for offer in offers for value in offer.describe(name)}
    if not values:
        return "no worker has that property"
    ordered = sorted(values, key=lambda value: (len(value), value))
    more = f" and {len(ordered) - _VALUES_SHOWN} more" if len(ordered) > _VALUES_SHOWN else ""
    return f"workers offer {name}={', '.join(ordered[-_VALUES_SHOWN:])}{more}"
