"""What went wrong, as OpenAI's error object: {"error": {"message", "type", "param", "code"}}, midway in a stream too.

Statuses are those of errors.py and of the protocol (401 key, 404 model, 413 body, 429 rate, 503 ending). What is not
the client's fault tells the log too, and what we did not foresee tells the client nothing but that the log knows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from constellation.errors import ConstellationError
from router.http.metrics import CLIENT_LEFT
from router.http.requests import Refusal
from router.http.responses import Error, Failure

_LOG = logging.getLogger("constellation.http")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PATHS = {404: "there is no such path", 405: "this path is asked in another way"}
_NAMED = re.compile(r"(\w+)[=:]")  # our messages begin with the name of what is wrong


def refusal_of(error: Exception) -> Refusal:
    """Whatever was raised, as a refusal."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ConstellationError):
        if error.http_status >= 500:
            _LOG.error("a request failed: %s", error)
        named = _NAMED.match(str(error))
        return Refusal(str(error), named[1] if named else None, status=error.http_status)
    if isinstance(error, HTTPException):
        return Refusal(_PATHS.get(error.status_code, error.detail), None, None, error.status_code, error.headers)
    _LOG.error("a request failed", exc_info=error)
    return Refusal("the service failed; its log says why", code="internal_error", status=500)


def error_json(refusal: Refusal) -> bytes:
    kind = _TYPES.get(refusal.http_status, "invalid_request_error" if refusal.http_status < 500 else "server_error")
    return msgspec.json.encode(Failure(Error(str(refusal), kind, refusal.param, refusal.code)))


def response(refusal: Refusal) -> Response:
    return Response(error_json(refusal), refusal.http_status, dict(refusal.headers), "application/json")


async def handle(request: Request, error: Exception) -> Response:
    """The handler of everything that is raised."""
    if isinstance(error, ClientDisconnect):  # while its body was read
        request.scope["visit"].left = True
        return Response(status_code=CLIENT_LEFT)
    return response(refusal_of(error))


HANDLED: tuple[type[Exception], ...] = (ConstellationError, HTTPException, ClientDisconnect, Exception)


def later(message: str, status: int, code: str, seconds: int, **headers: str) -> Refusal:
    """A refusal for now."""
    told: Mapping[str, str] = {"Retry-After": str(seconds), **headers}
    return Refusal(message, code=code, status=status, headers=told)
