"""All texts that a JSON schema admits, when they are few.

A small kernel cannot be trusted to write JSON by itself. But a schema of enums, constants, booleans and null, in
objects and fixed arrays of such, admits finitely many values; the answer is then a decision among their encodings.
Objects have all their `properties`, in their order, as OpenAI's strict mode wants it.

A schema is a graph: `$ref`s may lead to one part on many ways, exponentially many in the schema's length, and a text is
as long as its way is wide. So every part is visited once and its texts kept, at most `MOST` of them each; parts and
characters are counted, and too many of them are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from router.http.requests import Refusal

MOST = 256  # texts, as many as /v1/decisions takes answers
MOST_PARTS = 4096  # of a schema
MOST_CHARACTERS = 1 << 20  # of all texts of all parts together
_PARAM = "response_format"


def texts_of(json_schema: dict[str, Any]) -> list[str]:
    """The JSON texts that a `json_schema` admits; Refusal when they are more than `MOST`, or endless."""
    schema = json_schema.get("schema")
    try:
        texts = _Texts(schema).of(schema, "$")
    except (TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Refusal(f"response_format: not a JSON schema ({error})", _PARAM) from None
    if len(texts) > MOST:
        raise Refusal(f"response_format: the schema admits more than {MOST} values; narrow it", _PARAM)
    if not texts:
        raise Refusal("response_format: the schema admits no value", _PARAM)
    return texts


class _Texts:
    """The texts of every part of one schema."""

    def __init__(self, root: Any):
        self.root, self.characters = root, 0
        self.known: dict[int, list[str] | None] = {}  # id of a part -> its texts; None while they are being found

    def of(self, schema: Any, at: str) -> list[str]:
        """The texts of a part, each once; of more than `MOST` the first ones and one more."""
        if not isinstance(schema, dict):
            raise Refusal(f"response_format: {at} is not a JSON schema", _PARAM)
        if id(schema) in self.known:
            found = self.known[id(schema)]
            if found is None:
                raise Refusal(f"response_format: {at} refers to itself, its values are endless", _PARAM)
            return found
        if len(self.known) == MOST_PARTS:
            raise Refusal(f"response_format: the schema has more than {MOST_PARTS} parts", _PARAM)
        self.known[id(schema)] = None
        found = self.known[id(schema)] = list(itertools.islice(_once(self._texts(schema, at)), MOST + 1))
        return found

    def _counted(self, *pieces: str) -> tuple[str, ...]:
        """`pieces`, counted before a text is made of them."""
        self.characters += sum(map(len, pieces)) + 1
        if self.characters > MOST_CHARACTERS:
            raise Refusal(f"response_format: its values are more than {MOST_CHARACTERS} characters long", _PARAM)
        return pieces

    def _texts(self, schema: dict[str, Any], at: str) -> Iterable[str]:
        if "$ref" in schema:
            return self.of(self._target(schema["$ref"], at), at)
        if "const" in schema:
            return self._counted(_json(schema["const"]))
        if "enum" in schema:
            return itertools.chain.from_iterable(self._counted(_json(value)) for value in schema["enum"])
        if "anyOf" in schema:
            return itertools.chain.from_iterable(
                self.of(one, f"{at}.anyOf[{i}]") for i, one in enumerate(schema["anyOf"])
            )
        if schema.get("type") == "boolean":
            return ["true", "false"]
        if schema.get("type") == "null":
            return ["null"]
        if schema.get("type") == "object" and schema.get("properties"):
            names = self._counted(*map(_json, schema["properties"]))
            each = [self.of(one, f"{at}.{name}") for name, one in schema["properties"].items()]
            made = (zip(self._counted(*names), self._counted(*values)) for values in itertools.product(*each))
            return ("{" + ",".join(f"{name}:{value}" for name, value in fields) + "}" for fields in made)
        if schema.get("type") == "array" and "prefixItems" in schema:
            each = [self.of(one, f"{at}[{i}]") for i, one in enumerate(schema["prefixItems"])]
            return ("[" + ",".join(self._counted(*values)) + "]" for values in itertools.product(*each))
        raise Refusal(
            f"response_format: {at} admits endless values; enum, const, boolean, null and objects of them are offered",
            _PARAM,
            "unsupported_parameter",
        )

    def _target(self, ref: Any, at: str) -> Any:
        found = self.root
        for name in str(ref).removeprefix("#/").split("/"):
            found = found.get(name) if isinstance(found, dict) else None
        if found is None or not str(ref).startswith("#/"):
            raise Refusal(f"response_format: {at} refers to {ref!r}, which is not in the schema", _PARAM)
        return found


def _once(texts: Iterable[str]) -> Iterator[str]:
    seen = set[str]()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
