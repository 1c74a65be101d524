"""Answers that are there at once as a rule, and have to be awaited now and then.

A look-up that is answered where it arrives costs a tenth of one that becomes a task. So what can nearly always be told
at once is told by a plain function, which returns something to await when it cannot.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Soon: TypeAlias = T | Awaitable[T]
"""An answer, or something that becomes one."""


async def settled(answer: Soon[T]) -> T:
    """Return an answer, whether it is there or has to be awaited."""
    return await answer if isinstance(answer, Awaitable) else answer
