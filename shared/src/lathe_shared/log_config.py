"""Structured logging: one JSON object per line, or columns to read when stdout is a terminal.

Event names are snake case; the fields of an event are fixed. Every line written on behalf of an RPC names the client's
invocation, action and target, without the code that logs having to know them.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog

from lathe_shared.rpc_context import current_rpc

if TYPE_CHECKING:
    from collections.abc import MutableMapping

LEVELS = ("debug", "info", "warning", "error")

_QUIET = ("grpclib", "hpack", "h2", "aiohttp", "asyncio")
"""Libraries whose own records are wanted from WARNING on only; grpclib tells of each RPC that a client cancelled."""


def configure_logging(service: str, level: str = "info", process: int | None = None) -> None:
    """Set up structlog and the standard library's logging for a process.

    Args:
        service: Name in each line's ``service`` field.
        level: One of ``LEVELS``.
        process: Number in each line's ``process`` field, for one of several processes of a service.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    is_terminal = sys.stdout.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_request_metadata,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if process is not None:
        shared.append(_ProcessNumber(process))
    if not is_terminal:
        shared += [_ServiceName(service), structlog.processors.format_exc_info]
    renderer: structlog.typing.Processor = structlog.dev.ConsoleRenderer() if is_terminal else _render_json
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # In one write with its end: several processes may share what this goes to.
        logger_factory=structlog.WriteLoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(level=number, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


_FRONT = ("timestamp", "level", "service", "process", "event")


class _ServiceName:
    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = self._service
        return event


class _ProcessNumber:
    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("process", self._number)
        return event


def _render_json(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    """Write a line with what every line has at its front, where people look for it."""
    front = {name: event.pop(name) for name in _FRONT if name in event}
    return json.dumps({**front, **event}, default=str)


def _add_request_metadata(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    rpc = current_rpc.get()
    if rpc is not None and rpc.request_metadata_wire:
        for name, value in rpc.request_metadata.log_fields().items():
            event.setdefault(name, value)
    return event
