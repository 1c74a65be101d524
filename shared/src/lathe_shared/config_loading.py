"""Settings of a service from a TOML file, the environment and flags.

A flag counts before a variable, a variable before the file, the file before the default. What nobody knows is refused,
wherever it stands, because a mistyped key would otherwise be a setting silently left at its default.

A service declares its settings as a subclass of ``ServiceSettings``; names, types, bounds and descriptions there are
all that ``--help``, the errors and docs/configuration.md are made of.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from typing_extensions import override

from lathe_shared.config_problems import describe_problem, suggest
from lathe_shared.config_reference import COMMANDS, help_text
from lathe_shared.digest import DigestFunction
from lathe_shared.endpoint import Endpoint, parse_endpoint
from lathe_shared.errors import InvalidArgumentError
from lathe_shared.instance_name import check_well_formed

__all__ = [
    "ConfigurationError",
    "DigestFunctionList",
    "Endpoint",
    "InstanceNameList",
    "NestedSettings",
    "Port",
    "ServiceSettings",
    "endpoint_validator",
    "load_settings",
    "parse_endpoint",
    "read_settings",
]

SettingsT = TypeVar("SettingsT", bound="ServiceSettings")

Port = Annotated[int, Field(ge=0, le=65535)]
"""A port to listen on; 0 lets the kernel choose."""


def _check_instance_name(name: str) -> str:
    try:
        check_well_formed(name)
    except InvalidArgumentError as error:
        raise ValueError(error.reason) from None
    return name


InstanceNameList = list[Annotated[str, AfterValidator(_check_instance_name)]]
"""Instance names that a service answers for."""


def _check_digest_function(name: str) -> str:
    known = [function.segment for function in DigestFunction]
    if name not in known:
        raise ValueError(f"{name!r} is not one of {', '.join(known)}")
    return name


DigestFunctionList = list[Annotated[str, AfterValidator(_check_digest_function)]]
"""Digest functions by the names that they have in resource names, such as ``sha256``."""

PLAIN_VARIABLES = {"cas_endpoint": "CAS_ENDPOINT", "scheduler_endpoint": "SCHEDULER_ENDPOINT"}
"""Settings that are understood under a variable without prefix, too, as compose files of older deployments have it."""

_RUN_VARIABLES = frozenset(
    {
        "LATHE_CAS_PORT",
        "LATHE_CAS_TLS_PORT",
        "LATHE_CAS_HTTP_PORT",
        "LATHE_SCHEDULER_PORT",
        "LATHE_SCHEDULER_HTTP_PORT",
        "LATHE_WORKER_API_PORT",
        "LATHE_WORKER_HTTP_PORT",
    }
)
"""Variables of ``make run``. A service may find them in its environment without being meant."""


class NestedSettings(BaseModel):
    """Base of a table inside the settings."""

    model_config = {"extra": "forbid", "frozen": True}


class ServiceSettings(BaseSettings):
    """What every service can be told.

    Constructing one reads neither environment nor file; ``load_settings`` does.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=True)

    service: ClassVar[str]
    """``cas``, ``scheduler`` or ``worker``."""

    host: str = Field(default="0.0.0.0", description="address to listen on, for gRPC and HTTP alike")
    http_port: Port = Field(default=0, description="port of /metrics, /healthz and /status; 0 lets the kernel choose")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="what is logged; debug has a line for every RPC"
    )
    grpc_engine: Literal["lathe", "grpclib"] = Field(
        default="lathe", description="what speaks HTTP/2: our own engine, or the slower one that comes with grpclib"
    )
    # Docker kills 10 s after it asked a container to stop.
    drain_seconds: float = Field(
        default=8.0, ge=0, description="how long a stop (SIGTERM, SIGINT) waits for what is under way"
    )

    @override
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Reading is ``load_settings``'s: it keeps track of where a value came from, and knows what must be refused.
        return (init_settings,)

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: object) -> object:
        if isinstance(value, Path):
            return value.expanduser()
        if isinstance(value, (list, tuple)) and any(isinstance(item, Path) for item in value):
            return type(value)(item.expanduser() if isinstance(item, Path) else item for item in value)
        return value

    @classmethod
    def program(cls) -> str:
        """Name of the service's command, which is also its distribution's."""
        return f"lathe-{cls.service}"

    @classmethod
    def variable(cls, name: str) -> str:
        """Name of the environment variable for a setting."""
        return f"LATHE_{cls.service.upper()}_{name.upper()}"


def endpoint_validator(default_port: int) -> AfterValidator:
    """Make a validator for a setting that is an address, for use in ``Annotated[str, ...]``.

    Args:
        default_port: The port that a bare host means.
    """

    def check(text: str) -> str:
        return str(parse_endpoint(text, default_port))

    return AfterValidator(check)


class ConfigurationError(Exception):
    """The configuration is refused.

    Attributes:
        problems: What is wrong, a line each; every line names the key, what was given and what is accepted.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass
class _Given:
    """Values by setting, and where each came from."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, name: str, value: object, source: str) -> None:
        self.values[name] = value
        self.sources[name] = source


def load_settings(settings_class: type[SettingsT], argv: Sequence[str] | None = None) -> SettingsT:
    """Read the settings of a service for its ``main``, and handle the flags that only print something.

    Ends the process: with code 0 after ``--help``, ``--version`` and a successful ``--check-config``; with code 2 after
    having written what is wrong with the configuration, a line each.

    Args:
        settings_class: The service's settings.
        argv: The flags; those of the process if absent.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = settings_class.program()
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text(settings_class))
        raise SystemExit(0)
    if "--version" in arguments:
        sys.stdout.write(f"{program} {importlib.metadata.version(program)}\n")
        raise SystemExit(0)
    check_only = "--check-config" in arguments
    try:
        settings = read_settings(settings_class, [a for a in arguments if a != "--check-config"], os.environ)
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"{program}: {problem}\n")
        raise SystemExit(2) from None
    if check_only:
        sys.stdout.write("configuration ok\n")
        raise SystemExit(0)
    return settings


def read_settings(
    settings_class: type[SettingsT],
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] = types.MappingProxyType({}),
) -> SettingsT:
    """Read the settings of a service from what is given here.

    Args:
        settings_class: The service's settings.
        arguments: Flags.
        environ: Environment variables.

    Raises:
        ConfigurationError: Something is unknown, malformed or out of bounds; it lists everything that is.
    """
    flags = _read_flags(settings_class, arguments)
    variables = _read_variables(settings_class, environ)
    given = _Given()
    path = flags.values.pop("config", None) or variables.values.pop("config", None)
    variables.values.pop("config", None)
    file = _read_file(settings_class, Path(path).expanduser()) if path else _Given()
    for layer in (file, variables, flags):
        given.values.update(layer.values)
        given.sources.update(layer.sources)
        given.problems.extend(layer.problems)
    try:
        settings = settings_class(**given.values)
    except ValidationError as error:
        found = [describe_problem(settings_class, problem, given.sources) for problem in error.errors()]
        raise ConfigurationError([*given.problems, *found]) from None
    if given.problems:
        raise ConfigurationError(given.problems)
    return settings


def _read_file(settings_class: type[ServiceSettings], path: Path) -> _Given:
    given = _Given()
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        given.problems.append(f"--config: {path} cannot be read: {error.strerror}")
        return given
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        given.problems.append(f"--config: {path} is not TOML: {error}")
        return given
    for name, value in content.items():
        if name in settings_class.model_fields:
            given.put(name, value, f"in {path}")
        else:
            given.problems.append(f"{name}: unknown key in {path}{suggest(name, settings_class.model_fields)}")
    return given


def _read_variables(settings_class: type[ServiceSettings], environ: Mapping[str, str]) -> _Given:
    given = _Given()
    prefix = settings_class.variable("")
    known = {settings_class.variable(name): name for name in settings_class.model_fields}
    for name, variable in PLAIN_VARIABLES.items():
        if name in settings_class.model_fields and environ.get(variable):
            given.put(name, environ[variable], f"in variable {variable}")
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        source = f"in variable {variable}"
        setting = known.get(variable)
        if variable == prefix + "CONFIG":
            given.put("config", text, source)
        elif setting is not None:
            _put_text(settings_class, given, setting, text, source)
        elif variable not in _RUN_VARIABLES:
            given.problems.append(f"{variable}: unknown variable{suggest(variable, known)}")
    return given


def _read_flags(settings_class: type[ServiceSettings], arguments: Sequence[str]) -> _Given:
    given = _Given()
    flags = {f"--{name.replace('_', '-')}": name for name in settings_class.model_fields}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, text = argument.partition("=")
        name = "config" if flag == "--config" else flags.get(flag)
        if name is None:
            negated = flags.get("--" + flag.removeprefix("--no-")) if flag.startswith("--no-") else None
            if negated is not None and _is_flag_alone(settings_class, negated) and not equals:
                given.put(negated, False, f"by flag {flag}")
            elif flag.startswith("-"):
                known = [*flags, *(command.split()[0] for command in COMMANDS)]
                given.problems.append(f"{flag}: unknown flag{suggest(flag, known)}")
                if not equals and rest and not rest[0].startswith("-"):
                    rest.pop(0)  # what looks like its value
            else:
                given.problems.append(f"{argument}: unexpected argument; settings are given as --name=value")
            continue
        if not equals:
            if name != "config" and _is_flag_alone(settings_class, name):
                text = "true"
            elif not rest or rest[0].startswith("--"):
                given.problems.append(f"{flag}: needs a value, as in {flag}=…")
                continue
            else:
                text = rest.pop(0)
        if name == "config":
            given.put(name, text, "")
        else:
            _put_text(settings_class, given, name, text, f"by flag {flag}")
    return given


def _is_flag_alone(settings_class: type[ServiceSettings], name: str) -> bool:
    return settings_class.model_fields[name].annotation is bool


def _put_text(settings_class: type[ServiceSettings], given: _Given, name: str, text: str, source: str) -> None:
    """Take a value that came as text: tables as JSON, lists as JSON or with commas, the rest as it is."""
    shape = _shape(settings_class.model_fields[name].annotation)
    if shape == "list" and not text.lstrip().startswith("["):
        given.put(name, [item.strip() for item in text.split(",") if item.strip()], source)
    elif shape == "text":
        given.put(name, text, source)
    else:
        try:
            given.put(name, json.loads(text), source)
        except json.JSONDecodeError as error:
            kind = "list" if shape == "list" else "table"
            given.problems.append(f"{name}: {text!r} {source} is not accepted: expected a {kind} as JSON ({error})")


def _shape(annotation: object) -> Literal["text", "list", "table"]:
    """Tell how a value of this type is written in a flag or variable."""
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        shapes = {_shape(member) for member in get_args(annotation)}
        return "table" if "table" in shapes else "list" if "list" in shapes else "text"
    if origin is Annotated:
        return _shape(get_args(annotation)[0])
    found = origin or annotation
    if isinstance(found, type):
        if issubclass(found, (BaseModel, dict, Mapping)):
            return "table"
        if issubclass(found, (list, tuple, set, frozenset)):
            return "list"
    return "table" if found is Mapping else "list" if found is Sequence else "text"
