"""The service over HTTP: its paths, and what fails. FastAPI here and nowhere else.

    POST /v1/completions, /v1/chat/completions      text: requests.py -> translate.py -> render.py
    POST /v1/decisions                              a probability for each allowed answer
    GET  /v1/models, /v1/models/{id}                who can be asked
    POST /tokenize, /detokenize, GET /tokenizer_info
    POST /route                                     who would answer, and why
    GET  /health, /ready                            for probes, without a key
    GET  /metrics                                   for scrapers, with a key of its own where there are keys
    GET  /                                          the page

A request passes the middleware (middleware.py), an endpoint answers it (endpoints.py); what fails is an OpenAI error
object with the status of errors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from constellation import __version__
from router.answer.service import Service
from router.decide.modes import MODES
from router.http import page, responses
from router.http.endpoints import Endpoints
from router.http.failures import HANDLED, handle
from router.http.keys import Keys
from router.http.limits import Admission, Front
from router.http.metrics import Metrics
from router.http.middleware import Middleware
from router.http.openapi import components, operation
from router.http.requests import (
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    DetokenizeRequest,
    RouteRequest,
    TokenizeRequest,
)


@dataclass(frozen=True)
class AppSettings:
    """How a service is offered."""

    keys: Keys = field(default_factory=lambda: Keys(None))  # without a file everyone may ask
    front: Front = field(default_factory=Front)  # limits, names, log
    cors: tuple[str, ...] = ()  # origins whose pages may ask; none


def make_app(service: Service, settings: AppSettings | None = None) -> FastAPI:
    """The application. `app.state.gate` is what a server closes to drain, and whose `front` it keeps (server.py)."""
    settings = settings or AppSettings()
    app = FastAPI(title="constellation", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    endpoints = Endpoints(service, Admission(settings.front), Metrics())
    pages = page.files(service.policy, (*MODES, *service.kernels.names))
    for path, file in pages.items():
        app.add_api_route(path, _page(file), methods=["GET"], include_in_schema=False)
    for method, path, handler, extra in _paths(endpoints):
        app.add_api_route(
            path, handler, methods=[method], response_model=None, openapi_extra=extra, name=path,
            operation_id=handler.__name__,
        )  # fmt: skip
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    for kind in HANDLED:
        app.add_exception_handler(kind, handle)
    known = frozenset({path for _, path, _, _ in _paths(endpoints)} | set(pages))
    endpoints.gate = app.state.gate = Middleware(
        app.build_middleware_stack(), settings.keys, endpoints.metrics, settings.front, known, frozenset(pages)
    )
    app.middleware_stack = _allowing(endpoints.gate, settings.cors) if settings.cors else endpoints.gate
    return app


def _allowing(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Pages of these origins may ask: outside the gate, so that they may read its refusals too."""
    told = ["X-Request-Id", "X-Constellation-Ignored", "Retry-After"]
    return CORSMiddleware(app, origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=told)


def _paths(endpoints: Endpoints) -> list[tuple[str, str, Callable[..., Any], dict[str, Any]]]:
    r = responses
    return [
        ("POST", "/v1/completions", endpoints.completions,
         operation("Continue texts", CompletionRequest, r.Completion, r.Completion)),
        ("POST", "/v1/chat/completions", endpoints.chat,
         operation("Reply to a conversation", ChatRequest, r.ChatCompletion, r.ChatChunk)),
        ("POST", "/v1/decisions", endpoints.decisions,
         operation("Decide between answers, without decoding", DecisionRequest, r.Decision)),
        ("GET", "/v1/models", endpoints.models, operation("Who can be asked", None, r.Models)),
        ("GET", "/v1/models/{model:path}", endpoints.model, operation("One of them", None, r.Model)),
        ("POST", "/tokenize", endpoints.tokenize, operation("The tokens of a text", TokenizeRequest, r.Tokens)),
        ("POST", "/detokenize", endpoints.detokenize, operation("The text of tokens", DetokenizeRequest, r.Prompt)),
        ("GET", "/tokenizer_info", endpoints.tokenizer_info, operation("What the tokenizer is", None, None)),
        ("POST", "/route", endpoints.route, operation("Who would answer a text, and why", RouteRequest, None)),
        ("GET", "/health", endpoints.health, operation("Alive, and how busy", None, None)),
        ("GET", "/ready", endpoints.ready, operation("Whether new requests are let in", None, None)),
        ("GET", "/metrics", endpoints.scrape, operation("For Prometheus", None, None)),
    ]  # fmt: skip


def _page(file: page.File) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def answer() -> Response:
        return Response(file.body, headers={**page.HEADERS, "content-type": file.media_type})

    return answer


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=__version__, routes=app.routes)
        document["components"] = {
            "schemas": components(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        }  # fmt: skip
        for methods in document["paths"].values():
            for says in methods.values():
                says["responses"].pop("422", None)  # FastAPI's own; here it is 400, in the protocol's form
        app.openapi_schema = document
    return app.openapi_schema
