"""What a WorkerSession asks its runner to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lathe_protos import worker_v1


@dataclass(frozen=True, slots=True)
class RunAction:
    """Begin to run an action; report its end with ``action_finished``."""

    start: worker_v1.StartAction


@dataclass(frozen=True, slots=True)
class KillAction:
    """End a running action, and report its end with ``action_finished`` all the same."""

    lease_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The scheduler has taken the worker in."""


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """The scheduler does not want this worker; close the connection and try again later."""

    reason: str


Effect = RunAction | KillAction | Accepted | TurnedAway
