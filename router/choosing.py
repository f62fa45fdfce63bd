"""An answer that has to be one of a few texts: drawn from their probabilities, in one forward pass, never decoded.

    p_i = P(text i | prompt) normalised over the allowed texts (Service.decide)
    drawn from p_i^(1/T) / sum_j p_j^(1/T), by the uniform number u(seed, 0) of the sampler; T = 0 takes the likeliest

So what comes out is always one of them, whatever the kernel would rather have said. The texts are those of
`guided_choice` or `structured_outputs`, or all that a JSON schema admits (finite.py).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence

import msgspec
import numpy as np

from constellation.kernel.sample import uniform
from router.asking import MODES
from router.finite import texts_of
from router.openai import ChatRequest, Generation, Refusal
from router.service import Answer, Ask, Piece, Service

# what shapes a text token by token has no meaning for a text that is chosen whole
_PLAIN = (
    "echo", "best_of", "logprobs", "top_logprobs", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "return_token_ids",
)  # fmt: skip


def allowed(request: Generation) -> tuple[str, ...] | None:
    """The texts of which the answer has to be one; None when it is free."""
    texts: Sequence[str] | None = request.allowed
    if isinstance(request, ChatRequest) and request.response_format and request.response_format.type == "json_schema":
        if texts is not None:
            raise Refusal("response_format and a choice exclude each other", "response_format")
        texts = texts_of(request.response_format.json_schema or {})
    if texts is None:
        return None
    if len(set(texts)) < len(texts) or not all(texts):
        raise Refusal("a choice needs different texts, none of them empty", "structured_outputs")
    for field in msgspec.structs.fields(request):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if (name := field.name) in _PLAIN and getattr(request, name) != default:
            raise Refusal(f"{name} does not go with an answer that is chosen from a list", name)
    return tuple(texts)


def choose(probabilities: Sequence[float], temperature: float, seed: int) -> int:
    """Which one; T = 0 takes the first likeliest."""
    p = np.asarray(probabilities)
    if temperature == 0:
        return int(p.argmax())
    with np.errstate(divide="ignore"):
        log_p = np.log(p) / temperature
    mass = np.exp(log_p - log_p.max()).cumsum()
    u = uniform(np.array([seed], np.uint64), np.zeros(1, np.uint64))[0]
    return int(np.searchsorted(mass, u * mass[-1], side="right"))


async def chosen(service: Service, ask: Ask, texts: Sequence[str]) -> AsyncGenerator[Piece | Answer, None]:
    """The answer as `Service.stream` would give it: one piece, then the end."""
    begin = time.perf_counter()
    p = await service.decide(ask.prompt, texts, ask.mode, ask.top_k)
    text = texts[choose(p, ask.sampling.temperature, ask.sampling.seed)]
    tokens = tuple(service.tokenizer.encode(text))
    yield Piece(text, tokens, "" if ask.mode in MODES else ask.mode)
    yield _answer(ask, text, tokens, "stop", time.perf_counter() - begin)


async def nothing(ask: Ask) -> AsyncGenerator[Piece | Answer, None]:
    """The answer of no tokens, for who wants the prompt scored and no more."""
    yield _answer(ask, "", (), "length", 0.0)


def _answer(ask: Ask, text: str, tokens: tuple[int, ...], finish: str, seconds: float) -> Answer:
    return Answer(
        request=ask.request, text=text, token_ids=tokens, finish_reason=finish, prompt_tokens=len(ask.prompt),
        completion_tokens=len(tokens), mode=ask.mode, kernels=(), looks=(), hand_offs=(), seconds=seconds,
        seconds_per_token=seconds / max(1, len(tokens)),
    )  # fmt: skip
