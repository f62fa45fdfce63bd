"""The protocol: what a client may send to each endpoint, checked, and what it means for the sampler.

Every parameter that OpenAI or vLLM define is one of three things:

    a field of the types below      honoured
    in `NOT_HERE`                   accepted with the values that ask for nothing, refused by name otherwise
    in `LABELS`                     says something about the client and nothing about the answer: accepted, unused

A field that is none of them is ignored; it and the labels are named in the header `X-Constellation-Ignored`.
An explicit null is a parameter that was not sent. Where we differ from both: `mode` says who answers (route, ocean,
a kernel, mixture, barycenter, phi; the model name "constellation/heart" does the same) and `top_kernels` how many mix;
`top_k` is vLLM's, of tokens. A prompt longer than the context is refused unless `truncate_prompt_tokens` allows to
cut its beginning; an answer may be longer, for windows slide.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from constellation.decoding.sampling import (
    MOST_BIASES,
    MOST_STOP_TOKENS,
    MOST_TOP_K,
    BasinWeight,
    Bias,
    DistanceWeight,
    FrequencyPenalty,
    IgnoreEos,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Sampling,
    Temperature,
    Token,
    TopP,
    Tops,
    TransitionWeight,
)
from constellation.errors import ConfigError

MOST_CHOICES = 128  # answers to one prompt
MOST_PROMPTS = 1024  # of one request
COMPLETION_TOKENS, CHAT_TOKENS = 16, 256  # of an answer when the client does not say: OpenAI's 16, and a short reply
MOST_TOKENS = 65_536  # of an answer
LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}

# parameter -> the values that ask for nothing
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],), "bad_words": ([],), "cache_salt": ("",), "documents": ([],),
    "guided_decoding_backend": ("auto",), "guided_grammar": (), "guided_json": (), "guided_regex": (),
    "guided_whitespace_pattern": (), "include_stop_str_in_output": (False,), "kv_transfer_params": ({},),
    "length_penalty": (1,), "logits_processors": ([],), "priority": (0,), "prompt_logprobs": (), "prompt_embeds": (),
    "repetition_detection": (), "service_tier": ("auto", "default"), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False), "use_beam_search": (False,), "vllm_xargs": ({},),
}  # fmt: skip
NOT_IN_COMPLETIONS = {**_NOT_HERE, "response_format": ({"type": "text"},), "suffix": ("",)}
NOT_IN_CHAT = {
    **_NOT_HERE, "audio": (), "chat_template": (), "chat_template_kwargs": ({},), "echo": (False,),
    "function_call": ("none", "auto"), "functions": ([],), "include_reasoning": (True, False),
    "media_io_kwargs": ({},), "mm_processor_kwargs": ({},), "modalities": (["text"],), "moderation": (),
    "parallel_tool_calls": (True, False), "prediction": (), "reasoning_effort": ("none",), "store": (False,),
    "thinking_token_budget": (), "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": ("medium",),
    "web_search_options": (),
}  # fmt: skip

Whole = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
Answers = Annotated[list[str], Meta(min_length=1, max_length=256)]
_ANY_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS,
         "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}},
    ]
}  # fmt: skip


class Refusal(ConfigError):
    """A request that the protocol does not allow, with what OpenAI's error object says besides the message."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.param, self.code, self.http_status, self.headers = param, code, status, headers or {}


class StreamOptions(Struct):
    """What a stream tells besides text."""

    include_usage: bool = False  # a last chunk without choices holds the usage
    continuous_usage_stats: bool = False  # every chunk holds the usage so far
    include_obfuscation: bool = False  # of chunk sizes; there is none here


class Structured(Struct):
    """vLLM's structured outputs: a choice among texts."""

    choice: Answers


class Addressed(Struct, kw_only=True):
    """Who is asked, in every request."""

    model: str = ""  # "constellation", or a kernel's: "constellation/heart"
    mode: str = ""  # a way to answer (decide/modes.py) or a kernel; empty: what the model's name or the service says
    top_kernels: Annotated[int, Meta(ge=1, le=64)] = 3  # that answer together, in the modes that mix
    request_id: Annotated[str, Meta(max_length=128)] = ""  # instead of the header X-Request-Id
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31)] = 0  # last tokens kept; -1: a context, 0: not cut

    not_here: ClassVar[dict[str, tuple[Any, ...]]] = {}


class Generation(Addressed, kw_only=True):
    """What completions and chat have in common."""

    measure_hand_offs: bool = False  # tell the bits lost per hand-off: two more readings each

    generation_telemetry: bool = False  # tell repetition, distinct tokens, flow through basins

    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole = 0
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=MOST_TOP_K)] = 0  # 0 and -1: all
    min_p: MinP = 0.0
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    basin_weight: BasinWeight = 0.0  # log-linear terms of the tokens' coordinates (decoding/basins.py)
    distance_weight: DistanceWeight = 0.0
    transition_weight: TransitionWeight = 0.0
    logit_bias: Annotated[
        dict[Annotated[str, Meta(pattern="^[0-9]{1,10}$")], Bias],
        Meta(max_length=MOST_BIASES),
    ] = {}
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None  # None: drawn anew for each request
    stop: str | Annotated[list[str], Meta(max_length=16)] = []
    stop_token_ids: Annotated[list[Token], Meta(max_length=MOST_STOP_TOKENS)] = []
    ignore_eos: IgnoreEos = False
    add_special_tokens: bool = True  # the tokenizer adds none
    return_tokens_as_token_ids: bool = False  # log-probabilities name tokens "token_id:17"
    return_token_ids: bool = False  # choices hold `token_ids` and `prompt_token_ids`
    guided_choice: Answers | None = None  # the answer is one of these, drawn from their probabilities
    structured_outputs: Structured | None = None  # the same: {"choice": [...]}

    def sampling(self, stop: tuple[str, ...] = ()) -> Sampling:
        """The sampler's settings; `stop` texts are added to the client's own."""
        wanted = [self.stop] if isinstance(self.stop, str) else self.stop
        return Sampling(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=(self.seed or 0) % 2**64,
            stop=tuple(dict.fromkeys((*filter(None, wanted), *stop))),
            max_new_tokens=max(1, self.most_tokens),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(sorted((int(token), bias) for token, bias in self.logit_bias.items())),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            basin_weight=self.basin_weight,
            distance_weight=self.distance_weight,
            transition_weight=self.transition_weight,
            stop_token_ids=tuple(self.stop_token_ids),
            logprobs=self.tops,
        )

    @property
    def tops(self) -> int | None:
        """How many likeliest tokens are told at each position; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int:
        """Of an answer."""
        raise NotImplementedError

    @property
    def allowed(self) -> list[str] | None:
        """The texts of which the answer has to be one, if it has to."""
        return self.structured_outputs.choice if self.structured_outputs else self.guided_choice

    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class CompletionRequest(Generation, kw_only=True):
    """POST /v1/completions"""

    prompt: Annotated[str | list[str | int | list[int]], Meta(extra_json_schema=_ANY_PROMPT)]
    echo: bool = False  # the choice begins with the prompt
    logprobs: Tops | None = None
    best_of: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = (
        None  # answers made, of which the likeliest n are kept
    )

    not_here = NOT_IN_COMPLETIONS

    @property
    def tops(self) -> int | None:
        return self.logprobs

    @property
    def most_tokens(self) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | tuple[int, ...]]:
        """One prompt, or a batch of them: a text, texts, tokens, or lists of tokens."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        kinds = {type(item) for item in given}
        if len(kinds) != 1:
            what = "is empty" if not kinds else "mixes texts and tokens"
            raise Refusal(
                f"prompt {what}: send a text, a list of texts, a list of tokens or a list of such lists", "prompt"
            )
        if kinds == {int}:
            return [tuple(int(t) for t in given if not isinstance(t, (str, list)))]
        if len(given) > MOST_PROMPTS:
            raise Refusal(f"prompt: {len(given)} prompts in one request, {MOST_PROMPTS} are allowed", "prompt")
        if any(item == [] for item in given):
            raise Refusal("prompt: a list of tokens is empty; an empty text is sent as ''", "prompt")
        return [item if isinstance(item, str) else tuple(item) for item in given if not isinstance(item, int)]


class Text(Struct, tag="text"):
    """A part of a message; kernels read text and nothing else."""

    text: str


class Message(Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Text] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None  # that, and the two below, must be empty: there are no tools and no sound
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for unread in ("tool_calls", "function_call", "audio"):
            if getattr(self, unread):
                raise ValueError(f"{unread} is not offered by this service")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MOST_PROMPTS)]


class ResponseFormat(Struct):
    """`text`, or a JSON schema that admits few texts (finite.py), of which the answer is one."""

    type: Literal["text", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatRequest(Generation, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: Whole | None = None  # goes before max_tokens
    logprobs: bool = False
    top_logprobs: Tops | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    response_format: ResponseFormat | None = None

    not_here = NOT_IN_CHAT

    @property
    def tops(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int:
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return CHAT_TOKENS if given is None else given


class DecisionRequest(Addressed, kw_only=True):
    """POST /v1/decisions: how likely is each of `answers` as what comes next?"""

    prompt: str | None = None  # or `messages`
    messages: Messages | None = None
    answers: Annotated[list[str | bool | int | float | None], Meta(min_length=1, max_length=256)]


class TokenizeRequest(Addressed, kw_only=True):
    """POST /tokenize"""

    prompt: str | None = None  # or `messages`
    messages: Messages | None = None
    add_special_tokens: bool = True  # the tokenizer adds none
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(Addressed, kw_only=True):
    """POST /detokenize"""

    tokens: list[Token]


class RouteRequest(Addressed, kw_only=True):
    """POST /route: who would answer, and why?"""

    prompt: str | None = None  # or `messages`
    messages: Messages | None = None


def check_kind(content_type: str, encoding: str) -> None:
    """Refusal unless a body is said to be JSON, and plain.

    A browser lets the page of any other site send texts and forms here without asking; JSON it does not.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        said = f"not {kind[:64]!r}" if kind else "and says so"
        raise Refusal(
            f"the body must be JSON, {said}; send Content-Type: application/json", None, "unsupported_media_type", 415
        )
    if encoding.strip().lower() not in ("", "identity"):
        raise Refusal(
            f"Content-Encoding {encoding[:64]!r} is not read here; send the body as it is", None,
            "unsupported_media_type", 415, {"Accept-Encoding": "identity"},
        )  # fmt: skip


R = TypeVar("R", bound=Addressed)
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.S)


@functools.cache
def _known(kind: type[Addressed]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))


def read(body: bytes, kind: type[R]) -> tuple[R, list[str]]:
    """The request in `body`, and the names of the fields that were not used; Refusal names what is wrong."""
    try:
        data = msgspec.json.decode(body)
    except RecursionError:
        raise Refusal("the body is nested too deeply") from None
    except ValueError as error:  # malformed, or not UTF-8
        raise Refusal(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refusal(f"the body must be a JSON object, not {type(data).__name__}")
    data = {name: value for name, value in data.items() if value is not None}
    unused = []
    for name in data.keys() - _known(kind):
        neutral = kind.not_here.get(name)
        if neutral is None:
            unused.append(name)
        elif not any(
            data[name] == value and isinstance(data[name], bool) == isinstance(value, bool) for value in neutral
        ):
            only = f"; it may be {' or '.join(msgspec.json.encode(v).decode() for v in neutral)}" if neutral else ""
            raise Refusal(f"{name} is not offered by this service{only}", name, "unsupported_parameter")
    try:
        return msgspec.convert(data, kind), sorted(unused)
    except msgspec.ValidationError as error:
        found = _WHERE.match(str(error))
        assert found
        path = found["path"] or None
        missing = re.match(r"Object missing required field `(\w+)`", found["what"])
        param = f"{path}.{missing[1]}" if path and missing else missing[1] if missing else path
        name = f"{param}: " if param else ""
        raise Refusal(f"{name}{found['what'][:1].lower()}{found['what'][1:]}", param) from None
