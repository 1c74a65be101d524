"""How errors look in HTTP: a status and a line of text that says what is wrong.

Spec: RFC 9110, section 15, status codes; RFC 4918, section 11.5, for 507.
"""

from __future__ import annotations

import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from lathe_shared.errors import (
    AbortedError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_STATUSES = (
    (InvalidArgumentError, HTTPStatus.BAD_REQUEST),
    (NotFoundError, HTTPStatus.NOT_FOUND),
    (ResourceExhaustedError, HTTPStatus.INSUFFICIENT_STORAGE),
    ((AbortedError, UnavailableError), HTTPStatus.SERVICE_UNAVAILABLE),
)

_CLOSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.SERVICE_UNAVAILABLE})
"""What is answered to a client whose connection is of no more use."""

_log = structlog.get_logger(__name__)


class RefusedError(Exception):
    """A request that HTTP alone is reason enough to refuse.

    Args:
        status: What it is refused with.
        text: What is wrong, and what would be accepted.
        headers: What the status asks for beside the text.
    """

    def __init__(self, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


class BrokenOffError(Exception):
    """A response that cannot be completed, after its beginning was sent: the connection is of no more use."""


def error_answer(error: Exception, request: web.BaseRequest) -> web.Response:
    """Answer a request that failed."""
    if isinstance(error, RefusedError):
        return _answer(error.status, str(error), error.headers)
    for errors, status in _STATUSES:
        if isinstance(error, errors):
            return _answer(status, str(error))
    if isinstance(error, TimeoutError):
        return _answer(HTTPStatus.REQUEST_TIMEOUT, "the body stopped arriving; nothing of it was stored")
    if isinstance(error, web.RequestPayloadError):
        return _answer(HTTPStatus.BAD_REQUEST, "the body is malformed or ends too early; nothing of it was stored")
    error_id = secrets.token_hex(6)
    _log.error("internal_error", method=f"HTTP {request.method}", error_id=error_id, exc_info=error)
    text = f"internal error {error_id}; the service's log has the details under this id"
    return _answer(HTTPStatus.INTERNAL_SERVER_ERROR, text)


def _answer(status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
    answer = web.Response(status=status, text=f"{text}\n", headers=headers)
    if status in _CLOSING:
        answer.force_close()
    return answer


def refused_method(allowed: str) -> RefusedError:
    """Refuse a method, naming those that there are."""
    return RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"only {allowed} are served here", {"Allow": allowed})


def refused_size(limit_bytes: int, setting: str) -> RefusedError:
    """Refuse a body for its size."""
    return RefusedError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than the limit of {limit_bytes} bytes ({setting})"
    )
