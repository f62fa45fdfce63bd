"""An answer that has to be one of a few texts: drawn from their probabilities, in one forward pass, never decoded.

    p_i = P(text i | prompt) normalised over the allowed texts (Service.decide)
    drawn from p_i^(1/T) / sum_j p_j^(1/T), by the u(seed, index, 0) of sample.py; T = 0 takes the likeliest

So what comes out is always one of them, whatever the kernel would rather have said. The texts are those of
`guided_choice` or `structured_outputs`, or all that a JSON schema admits (finite.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from constellation.decoding.sample import Sampling, uniform
from router.answer.service import Answer, AnswerOdds, Ask, Piece, Service
from router.http.finite import texts_of
from router.http.requests import ChatRequest, Generation, Refusal

# what shapes a text token by token has no meaning for a text that is chosen whole
_PLAIN = (
    "echo", "best_of", "logprobs", "top_logprobs", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "return_token_ids",
)  # fmt: skip


async def allowed(request: Generation) -> tuple[str, ...] | None:
    """The texts of which the answer has to be one; None when it is free."""
    texts: Sequence[str] | None = request.allowed
    if isinstance(request, ChatRequest) and request.response_format and request.response_format.type == "json_schema":
        if texts is not None:
            raise Refusal("response_format and a choice exclude each other", "response_format")
        texts = await asyncio.to_thread(texts_of, request.response_format.json_schema or {})
    if texts is None:
        return None
    if len(set(texts)) < len(texts) or not all(texts):
        raise Refusal("a choice needs different texts, none of them empty", "structured_outputs")
    for field in msgspec.structs.fields(request):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if (name := field.name) in _PLAIN and getattr(request, name) != default:
            raise Refusal(f"{name} does not go with an answer that is chosen from a list", name)
    return tuple(texts)


def choose(probabilities: Sequence[float], sampling: Sampling) -> int:
    """Which one; T = 0 takes the first likeliest."""
    p = np.asarray(probabilities)
    if sampling.greedy:
        return int(p.argmax())
    with np.errstate(divide="ignore"):
        log_p = np.log(p) / sampling.temperature
    mass = np.exp(log_p - log_p.max()).cumsum()
    seed, first, index = (np.array([value], np.uint64) for value in (sampling.seed, 0, sampling.index))
    u = uniform(seed, first, index)[0]
    return int(np.searchsorted(mass, u * mass[-1], side="right"))


def chosen(
    service: Service, asks: Sequence[Ask], texts: Sequence[str], tokens_of: Sequence[Sequence[int]]
) -> list[AsyncGenerator[Piece | Answer, None]]:
    """The answers as `Service.stream` would give them, one piece and the end; a prompt is read once for all of its."""
    reading: dict[Any, asyncio.Task[AnswerOdds]] = {}

    async def one(ask: Ask) -> AsyncGenerator[Piece | Answer, None]:
        begin = time.perf_counter()
        if ask.prompt not in reading:
            reading[ask.prompt] = asyncio.ensure_future(service.decide(ask.prompt, tokens_of, ask.mode, ask.top_k))
        probabilities, told = await reading[ask.prompt]
        at = choose(probabilities, ask.sampling)
        text, tokens, seconds = texts[at], tuple(tokens_of[at]), time.perf_counter() - begin
        yield Piece(text, tokens, told.kernels[0])
        yield replace(
            told, request=ask.request, text=text, token_ids=tokens, completion_tokens=len(tokens), seconds=seconds,
            seconds_per_token=seconds / len(tokens),
        )  # fmt: skip

    return [one(ask) for ask in asks]


async def nothing(ask: Ask) -> AsyncGenerator[Piece | Answer, None]:
    """The answer of no tokens, for who wants the prompt scored and no more."""
    yield Answer(
        request=ask.request, text="", token_ids=(), finish_reason="length", prompt_tokens=len(ask.prompt),
        completion_tokens=0, mode=ask.mode, kernels=(), looks=(), hand_offs=(), seconds=0.0, seconds_per_token=0.0,
    )  # fmt: skip
