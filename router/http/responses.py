"""What the service answers with: the objects of the OpenAI protocol, and what of an answer goes where.

Beyond the protocol, and no trouble to strict clients: `constellation` in every response and chunk says who wrote it and
why (the first choice's story; further choices hold their own), and is `{"kernel": ...}` while the text is streamed.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from constellation.coordizer.tokenizer import Tokenizer
from router.answer.service import Answer

Finish = Literal["stop", "length"]
FINISHES: dict[str, Finish] = {"stop": "stop", "eos": "stop", "length": "length"}
LEAST_LOG_PROB = -9999.0  # what JSON says for the logarithm of zero
_TOLD_ELSEWHERE = {"request", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs"}


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt, completion, prompt + completion)


class Logprobs(Struct):
    """Of a completion; one entry a token, null for a first token of the prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters of the choice's text before the token


class Top(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class Content(Struct):
    """One token of a chat reply."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Top]


class ChatLogprobs(Struct):
    content: list[Content]
    refusal: None = None


class Spoken(Struct):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class Delta(Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None


class Choice(Struct, kw_only=True):
    """An answer, or some more of it."""

    index: int
    finish_reason: Finish | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    constellation: dict[str, Any] | UnsetType = UNSET


class TextChoice(Choice, kw_only=True):
    text: str
    logprobs: Logprobs | None


class MessageChoice(Choice, kw_only=True):
    message: Spoken
    logprobs: ChatLogprobs | None


class DeltaChoice(Choice, kw_only=True):
    delta: Delta
    logprobs: ChatLogprobs | None


class Reply(Struct, kw_only=True):
    """What completions, chat completions and their chunks have in common."""

    id: str
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str | UnsetType = UNSET
    usage: Usage | UnsetType | None = UNSET
    constellation: dict[str, Any] | UnsetType = UNSET


class Completion(Reply, kw_only=True):
    """Whole, or a chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ChatCompletion(Reply, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[MessageChoice]


class ChatChunk(Reply, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[DeltaChoice]


class Probability(Struct):
    answer: str | bool | int | float | None
    probability: float


class Decision(Struct, kw_only=True):
    """How likely each allowed answer is as what comes next; they sum to 1."""

    id: str
    object: Literal["decision"] = "decision"
    created: int
    model: str
    choice: str | bool | int | float | None  # the likeliest; of equals the first
    probabilities: list[Probability]  # in the order of the request
    usage: Usage
    constellation: dict[str, Any]


class Model(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "constellation"
    max_model_len: int


class Models(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(Struct, omit_defaults=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Prompt(Struct):
    prompt: str


class Error(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Failure(Struct):
    error: Error


@dataclasses.dataclass(frozen=True)
class Scored:
    """A token, its log-probability and the likeliest ones at its place; None for a first token of a prompt."""

    token: int
    log_prob: float | None
    top: Sequence[tuple[int, float]]


class Names:
    """How tokens are called: their text, bytes that are none as "bytes:\\xe2", specials by name; or "token_id:17"."""

    def __init__(self, tokenizer: Tokenizer, by_id: bool = False):
        self.token_bytes, self.specials, self.by_id = tokenizer.token_bytes, tokenizer.specials, by_id

    def __call__(self, token: int) -> str:
        if self.by_id:
            return f"token_id:{token}"
        data = self.token_bytes[token]
        if not data:
            return self.specials.get(token, f"token_id:{token}")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)

    def completion(self, scored: Iterable[Scored], offsets: Offsets) -> Logprobs:
        out = Logprobs([], [], [], [])
        for one in scored:
            out.tokens.append(self(one.token))
            out.text_offset.append(offsets.pass_by(self.token_bytes[one.token]))
            if one.log_prob is None:
                out.token_logprobs.append(None)
                out.top_logprobs.append(None)
                continue
            out.token_logprobs.append(_finite(one.log_prob))
            tops = {self(token): _finite(log_prob) for token, log_prob in one.top}
            out.top_logprobs.append(tops | {self(one.token): _finite(one.log_prob)})
        return out

    def chat(self, scored: Iterable[Scored]) -> ChatLogprobs:
        return ChatLogprobs([
            Content(
                self(one.token), _finite(one.log_prob or 0.0), list(self.token_bytes[one.token]),
                [Top(self(token), _finite(log_prob), list(self.token_bytes[token])) for token, log_prob in one.top],
            )
            for one in scored
        ])  # fmt: skip


class Offsets:
    """Where in its choice's text a token begins, in characters, counted while the tokens pass by."""

    def __init__(self) -> None:
        self.characters, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")

    def pass_by(self, data: bytes) -> int:
        before = self.characters
        self.characters += len(self._decoder.decode(data))
        return before


def telemetry(answer: Answer) -> dict[str, Any]:
    """Who answered and why: looks, hand-offs, weights, distances, the certificate."""
    return {name: value for name, value in answer.to_json().items() if name not in _TOLD_ELSEWHERE}


def _finite(log_prob: float) -> float:
    return max(float(log_prob), LEAST_LOG_PROB)
