"""Descriptions of a service's settings, for ``--help`` and for docs/configuration.md."""

from __future__ import annotations

import enum
import json
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from lathe_shared.config_loading import ServiceSettings

COMMANDS = {
    "--config FILE": "read settings from this TOML file",
    "--check-config": "check the settings and do nothing else",
    "--version": "print the version and do nothing else",
    "--help": "print this text and do nothing else",
}

_WIDTH = 100
_SCALAR_NAMES: dict[type, str] = {int: "number", float: "number", str: "text", bool: "true or false", Path: "path"}


class SettingDescription(NamedTuple):
    """One setting, in words.

    Attributes:
        name: Key in the TOML file.
        flag: The flag.
        variable: The environment variable.
        accepts: What values it takes.
        default: Its default as TOML would have it, or ``required``.
        text: What it is for.
    """

    name: str
    flag: str
    variable: str
    accepts: str
    default: str
    text: str


def describe_settings(settings_class: type[ServiceSettings]) -> list[SettingDescription]:
    """Describe all settings of a service, those of its own before those that all services have."""
    own = [name for name in settings_class.model_fields if name in vars(settings_class).get("__annotations__", {})]
    rest = [name for name in settings_class.model_fields if name not in own]
    return [_describe(settings_class, name, settings_class.model_fields[name]) for name in [*own, *rest]]


def help_text(settings_class: type[ServiceSettings]) -> str:
    """Compose what ``--help`` prints."""
    summary = (settings_class.__doc__ or "").strip().partition("\n")[0]
    lines = [f"usage: {settings_class.program()} [--config FILE] [--SETTING VALUE ...]", "", summary, ""]
    for flag, text in COMMANDS.items():
        lines.append(f"  {flag:<20} {text}")
    lines += ["", "Settings: a flag counts before the variable, the variable before the file.", ""]
    for setting in describe_settings(settings_class):
        lines.append(f"  {setting.flag} ({setting.accepts})")
        lines += textwrap.wrap(setting.text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append(f"      default: {setting.default}; variable: {setting.variable}")
    return "\n".join(lines) + "\n"


def reference_section(settings_class: type[ServiceSettings]) -> str:
    """Compose a service's section of docs/configuration.md."""
    summary = (settings_class.__doc__ or "").strip().partition("\n")[0]
    lines = [
        f"## {settings_class.program()}",
        "",
        summary,
        "",
        "| key | accepts | default | meaning |",
        "|---|---|---|---|",
    ]
    for setting in describe_settings(settings_class):
        cells = (f"`{setting.name}`", setting.accepts, f"`{setting.default}`", setting.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _describe(settings_class: type[ServiceSettings], name: str, field: FieldInfo) -> SettingDescription:
    return SettingDescription(
        name=name,
        flag="--" + name.replace("_", "-"),
        variable=settings_class.variable(name),
        accepts=_accepts(field.annotation) + _bounds(field),
        default=_default(field),
        text=" ".join((field.description or "").split()),
    )


def _accepts(annotation: object) -> str:
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _accepts(arguments[0])
    if origin is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_accepts(member) for member in arguments if member is not types.NoneType))
    found: Any = origin or annotation
    return _accepts_class(found, arguments) if isinstance(found, type) else "value"


def _accepts_class(found: type, arguments: tuple[Any, ...]) -> str:
    if issubclass(found, enum.Enum):
        return " or ".join(to_text(member) for member in found)
    if issubclass(found, Mapping):
        return f"table of {_accepts(arguments[1])}" if len(arguments) == 2 else "table"
    if issubclass(found, BaseModel):
        return "table with " + ", ".join(found.model_fields)
    if issubclass(found, (list, tuple, set, frozenset, Sequence)) and found is not str:
        return f"list of {_accepts(arguments[0])}" if arguments else "list"
    if found in _SCALAR_NAMES:
        return _SCALAR_NAMES[found]
    return next((words for scalar, words in _SCALAR_NAMES.items() if issubclass(found, scalar)), "value")


def _bounds(field: FieldInfo) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = [
        f"{text} {getattr(item, name)}"
        for item in field.metadata
        for name, text in words.items()
        if getattr(item, name, None) is not None
    ]
    return f", {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=False)
    if field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]  # none of ours takes the other values
    if value is PydanticUndefined:
        return "required"
    return to_text(value)


def to_text(value: object) -> str:
    """Write a value as it would stand in a TOML file; None, which TOML lacks, as ``unset``."""
    if value is None:
        return "unset"
    if isinstance(value, enum.Enum):
        return to_text(value.value)
    if isinstance(value, BaseModel):
        return to_text(value.model_dump())
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {to_text(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"[{', '.join(to_text(item) for item in value)}]"
    if isinstance(value, (int, float)):
        return str(value)
    return json.dumps(str(value))
