"""All texts that a JSON schema admits, when they are few.

A small kernel cannot be trusted to write JSON by itself. But a schema of enums, constants, booleans and null, in
objects and fixed arrays of such, admits finitely many values; the answer is then a decision among their encodings.
Objects have all their `properties`, in their order, as OpenAI's strict mode wants it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec

from router.http.openai import Refusal

MOST = 256  # texts, as many as /v1/decisions takes answers
_PARAM = "response_format"


def texts_of(json_schema: dict[str, Any]) -> list[str]:
    """The JSON texts that a `json_schema` admits; Refusal when they are more than `MOST`, or endless."""
    schema = json_schema.get("schema")
    try:
        values = _few(schema, schema, "$", frozenset())
    except (TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Refusal(f"response_format: not a JSON schema ({error})", _PARAM) from None
    if len(values) > MOST:
        raise Refusal(f"response_format: the schema admits more than {MOST} values; narrow it", _PARAM)
    return list(dict.fromkeys(msgspec.json.encode(value).decode() for value in values))


def _few(schema: Any, root: Any, at: str, refs: frozenset[str]) -> list[Any]:
    """The values at `at`; of more than `MOST` the first ones and one more."""
    return list(itertools.islice(_values(schema, root, at, refs), MOST + 1))


def _values(schema: Any, root: Any, at: str, refs: frozenset[str]) -> Iterator[Any]:
    if not isinstance(schema, dict):
        raise Refusal(f"response_format: {at} is not a JSON schema", _PARAM)
    if "$ref" in schema:
        ref = schema["$ref"]
        if ref in refs:
            raise Refusal(f"response_format: {at} refers to itself, its values are endless", _PARAM)
        yield from _values(_target(ref, root, at), root, at, refs | {ref})
    elif "const" in schema:
        yield schema["const"]
    elif "enum" in schema:
        yield from schema["enum"]
    elif "anyOf" in schema:
        for i, one in enumerate(schema["anyOf"]):
            yield from _values(one, root, f"{at}.anyOf[{i}]", refs)
    elif schema.get("type") == "boolean":
        yield from (True, False)
    elif schema.get("type") == "null":
        yield None
    elif schema.get("type") == "object" and schema.get("properties"):
        names = list(schema["properties"])
        each = [_few(schema["properties"][name], root, f"{at}.{name}", refs) for name in names]
        yield from (dict(zip(names, values)) for values in itertools.product(*each))
    elif schema.get("type") == "array" and "prefixItems" in schema:
        each = [_few(one, root, f"{at}[{i}]", refs) for i, one in enumerate(schema["prefixItems"])]
        yield from (list(values) for values in itertools.product(*each))
    else:
        raise Refusal(
            f"response_format: {at} admits endless values; enum, const, boolean, null and objects of them are offered",
            _PARAM,
            "unsupported_parameter",
        )


def _target(ref: Any, root: Any, at: str) -> Any:
    found = root
    for name in str(ref).removeprefix("#/").split("/"):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None or not str(ref).startswith("#/"):
        raise Refusal(f"response_format: {at} refers to {ref!r}, which is not in the schema", _PARAM)
    return found
