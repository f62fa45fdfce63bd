"""The OpenAPI document: the paths of the application, the types of the protocol, one source for both.

FastAPI knows the paths; the schemas are those by which requests.py checks requests and responses.py builds answers, so
the document cannot say anything else than the service does. Every parameter may be null, which means: not sent.
"""

from __future__ import annotations

from typing import Any

import msgspec

from router.http import requests, responses

_REF = "#/components/schemas/{name}"
REQUESTS = (
    requests.CompletionRequest, requests.ChatRequest, requests.DecisionRequest, requests.TokenizeRequest,
    requests.DetokenizeRequest, requests.RouteRequest,
)  # fmt: skip
REPLIES = (
    responses.Completion, responses.ChatCompletion, responses.ChatChunk, responses.Decision, responses.Models,
    responses.Model, responses.Tokens, responses.Prompt, responses.Failure,
)  # fmt: skip


def components() -> dict[str, Any]:
    """Name -> JSON schema of every type that crosses the network."""
    _, schemas = msgspec.json.schema_components([*REQUESTS, *REPLIES], ref_template=_REF)
    for kind in REQUESTS:
        schema = schemas[kind.__name__]
        required = set(schema["required"])
        for name, says in schema["properties"].items():
            if "anyOf" in says and name == "prompt" and kind is requests.CompletionRequest:
                says["anyOf"] = requests._ANY_PROMPT["anyOf"]
            elif name not in required:
                schema["properties"][name] = _or_null(says)
        for name, neutral in kind.not_here.items():
            says = {"enum": [*neutral, None]} if neutral else {"type": "null"}
            schema["properties"][name] = {**says, "description": "Not offered: what asks for nothing is accepted."}
        for name in sorted(requests.LABELS):
            schema["properties"][name] = {"description": "About the client; accepted and unused."}
    return dict(sorted(schemas.items()))


def operation(summary: str, request: type | None, reply: type | None, streams: type | None = None) -> dict[str, Any]:
    """What FastAPI is told of a path (`openapi_extra`)."""
    found: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "The answer."}}}
    if request:
        found["requestBody"] = {"required": True, "content": _json(request)}
    if reply:
        found["responses"]["200"]["content"] = _json(reply)
    if streams:
        found["responses"]["200"]["content"]["text/event-stream"] = {
            "schema": {"description": f"{streams.__name__}, event by event"}
        }
    for status, why in _FAILURES.items() if request else ():
        found["responses"][status] = {"description": why, "content": _json(responses.Failure)}
    return found


_FAILURES = {
    "400": "Impossible; `error.param` names the parameter.",
    "401": "No key, or one that is not known.",
    "404": "No such model.",
    "413": "The body is too large.",
    "415": "The body is not JSON, does not say so, or is packed.",
    "429": "Too much at once, or in a minute; the header Retry-After says when to come again.",
    "500": "The work failed.",
    "503": "The service is ending, or a kernel is away.",
}


def _json(kind: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _or_null(says: dict[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in says.get("anyOf", []):
        return says
    default = {"default": says["default"]} if "default" in says else {}
    return {"anyOf": [{k: v for k, v in says.items() if k != "default"}, {"type": "null"}], **default}
