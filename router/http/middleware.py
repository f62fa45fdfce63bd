"""What every request passes on its way in and out: its id, the service's end, whose key it brings, and the count.

    X-Request-Id   the client's own, if it is printable, or a new one; in the answer too, whatever the answer is. It is
                   shown, and nothing is found by it
    Host           a name by which this service is asked: a page whose own name was made to lead here is not let in
    HEAD           as GET, of whose answer a server sends the head alone
    draining       once `close()` was called, new requests get 503 with Retry-After; those under way finish
    key            Authorization: Bearer KEY, but for paths that a probe or a browser asks
    metrics        arrived, in flight, ended with which status; 499 when the client left
    log            a line for each, if that is wished

An ASGI application around another one. It is the only thing that touches every message, so it does little.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from constellation.errors import ConstellationError
from router.http.failures import later, refusal_of, response
from router.http.keys import NOBODY, Key, Keys
from router.http.limits import Front
from router.http.metrics import CLIENT_LEFT, Metrics, Watch
from router.http.requests import Refusal

RETRY_AFTER_S = 5  # a service that ends is replaced within seconds, or not at all
_PROBED = {"/health", "/ready"}  # without a key
_ALWAYS = {*_PROBED, "/metrics"}  # answered while draining too
_LOG = logging.getLogger("constellation.access")
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PORT = re.compile(r":[0-9]*$")


@dataclass
class Visit:
    """One request while it is inside."""

    request_id: str
    key: Key
    watch: Watch
    left: bool = False  # the client went before its answer was whole
    failed: int | None = None  # status of what went wrong after the answer had begun

    @classmethod
    def of(cls, request: Request) -> Visit:
        found: Visit = request.scope["visit"]
        return found


class Middleware:
    """`app` with a gate; `open_paths` need no key."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        metrics: Metrics,
        front: Front,
        paths: frozenset[str],
        open_paths: frozenset[str],
    ):
        self.app, self.keys, self.metrics, self.front = app, keys, metrics, front
        self.paths, self.open_paths = paths, open_paths | _PROBED
        self.closed, self.inside = False, 0  # `inside` counts all requests but those of probes and scrapers

    def close(self) -> None:
        """Let nobody in any more; the service has ended when `inside` is 0."""
        self.closed = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path, began_s = Headers(scope=scope), scope["path"], time.perf_counter()
        own = headers.get("x-request-id", "")
        request_id = own if _ID.fullmatch(own) else uuid.uuid4().hex
        # a path that does not exist is anybody's invention: it must not become a name in the metrics
        watch = self.metrics.watch(path if path in self.paths else "other")
        status, counted = 500, path not in _ALWAYS
        self.inside += counted

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        visit: Visit | None = None
        try:
            visit = Visit(request_id, self._find(path, headers), watch)
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self.app({**scope, "method": method, "visit": visit}, receive, told)
        except ConstellationError as error:  # at the gate: what is raised inside is answered inside
            await response(refusal_of(error))(scope, receive, told)
        finally:
            status = CLIENT_LEFT if visit and visit.left else (visit and visit.failed) or status
            watch.ended(status)
            self.inside -= counted
            if self.front.access_log:
                peer, who = (scope.get("client") or ("-",))[0], visit.key.name if visit else "-"
                what, took_ms = f"{scope['method']} {ascii(path)[1:-1][:256]}", 1e3 * (time.perf_counter() - began_s)
                _LOG.info('%s %s "%s" %d %.0f ms %s', peer, who, what, status, took_ms, request_id)

    def _find(self, path: str, headers: Headers) -> Key:
        self._check_host(headers.getlist("host"))
        if self.closed and path not in _ALWAYS:
            raise ending()
        if path in self.open_paths:
            return NOBODY if self.keys.path else self.keys.anyone
        key = self.keys.find(headers.get("authorization"))
        if key is None:
            self.metrics.refused("invalid_api_key")
            raise Refusal(
                "a key is needed: Authorization: Bearer KEY, one that this service knows",
                code="invalid_api_key", status=401, headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return key

    def _check_host(self, sent: Sequence[str]) -> None:
        names = [_PORT.sub("", name).lower() for name in sent]
        if self.front.hosts is None or (len(names) == 1 and names[0] in self.front.hosts):
            return
        self.metrics.refused("unknown_host")
        raise Refusal(
            f"Host {', '.join(sent)[:64]!r}: this service is asked as {', '.join(self.front.hosts)}; "
            "constellation serve --allow-host NAME adds a name", code="unknown_host", status=421,
        )  # fmt: skip


def ending() -> Refusal:
    """What a service that is ending says."""
    return later("this service is ending; ask again", 503, "shutting_down", RETRY_AFTER_S, Connection="close")
