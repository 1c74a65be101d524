"""What is wrong with a configuration, in lines that say what would be right."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lathe_shared.config_loading import ServiceSettings


def describe_problem(
    settings_class: type[ServiceSettings], problem: Mapping[str, Any], sources: Mapping[str, str]
) -> str:
    """Say what is wrong with one value, in one line."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or settings_class.program()
    source = f" {sources[location[0]]}" if location and location[0] in sources else ""
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{source}{suggest(location[-1], _keys_beside(settings_class, problem['loc']))}"
    if problem["type"] == "missing":
        return f"{key}: is not set, and has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not location:  # settings that don't fit together; the message names them
        return message
    given = repr(problem["input"])
    if len(given) > 200:
        given = given[:200] + "…"
    accepted = " ".join((message[:1].lower() + message[1:]).split())
    return f"{key}: {given}{source} is not accepted: {accepted}"


def _keys_beside(settings_class: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the keys that would have been known where an unknown one stands."""
    model: object = settings_class
    for part in location[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            candidates = [model.model_fields[str(part)].annotation]
        else:
            candidates = []
        while candidates:
            model = candidates.pop()
            if isinstance(model, type) and issubclass(model, BaseModel):
                break
            candidates.extend(get_args(model))
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []


def suggest(name: str, known: Iterable[str]) -> str:
    """Name what was probably meant, else all that is known, ready to be appended to a line."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(names)}" if names else ""
