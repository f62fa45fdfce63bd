"""From a request of the protocol to what the service is asked: who answers, which tokens, how many answers.

First it is counted, which costs next to nothing (`wanted_of`); once it is let in, it is made (`asked`). A kernel reads
`context` tokens at most. A longer prompt is refused, unless `truncate_prompt_tokens` says how many of its last tokens
are to be kept: nobody's text is cut without their knowing.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from router.answer.encoding import encoded
from router.answer.service import Ask, Service, numbered
from router.decide.modes import MODES, ROUTE
from router.http.chat import STOPS, render
from router.http.requests import (
    Addressed,
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    Generation,
    Refusal,
    RouteRequest,
    TokenizeRequest,
)


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, nothing of which is made yet."""

    mode: str
    prompts: Sequence[str | tuple[int, ...]]
    made: int  # answers to each prompt, of which the request may keep fewer (`best_of`)
    biases: int  # of tokens, in all answers

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.made


@dataclass(frozen=True)
class Translated:
    """What a request asks of the service: `n` answers to each prompt, in this order."""

    mode: str
    prompts: tuple[tuple[int, ...], ...]  # tokens, cut as the client wished
    asks: tuple[Ask, ...]  # len(prompts) x `made`
    made: int  # answers to each prompt, of which the request may keep fewer (`best_of`)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def prompt_of(self, index: int) -> tuple[int, ...]:
        return self.prompts[index // self.made]


def who(request: Addressed, service: Service) -> str:
    """The mode that `model` and `mode` ask for together."""
    kernels = service.kernels.names
    kernel = request.model.partition("/")[2]
    if request.model and request.model not in service.models():
        raise Refusal(
            f"model {request.model!r} does not exist here; there is {', '.join(service.models())}",
            "model", "model_not_found", 404,
        )  # fmt: skip
    if request.mode and request.mode not in (*MODES, *kernels):
        raise Refusal(f"mode={request.mode!r}: choose one of {', '.join((*MODES, *kernels))}", "mode")
    if kernel and request.mode not in ("", kernel):
        raise Refusal(f"model {request.model!r} and mode={request.mode!r} name different answerers", "mode")
    return kernel or request.mode or ROUTE


async def tokens(
    prompts: Sequence[str | tuple[int, ...]], request: Addressed, service: Service
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each prompt, no more than a kernel can read."""
    context, kept = service.config.kernel.context, request.truncate_prompt_tokens
    longest = max(map(len, service.tokenizer.token_bytes))

    def fits(count: int, more: str = "") -> None:
        if count > context and not kept:
            raise Refusal(
                f"this prompt has {more}{count} tokens, kernels read {context}: shorten it, or send "
                f"truncate_prompt_tokens=-1 to let them read its end",
                "messages" if isinstance(request, ChatRequest) else "prompt", "context_length_exceeded",
            )  # fmt: skip

    for prompt in prompts:  # a character is a byte at least: what is much too long is not tokenised
        fits(len(prompt) // longest, "more than ") if isinstance(prompt, str) else fits(len(prompt))
    texts = iter(await encoded(service.tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    found, size = [], service.tokenizer.vocab_size
    for prompt in prompts:
        given = tuple(next(texts)) if isinstance(prompt, str) else prompt
        fits(len(given))
        given = given[-min(context if kept == -1 else kept, context) :] if kept else given
        if wrong := next((t for t in given if not 0 <= t < size), None):
            raise Refusal(f"prompt: {wrong} is no token; there are 0 to {size - 1}", "prompt")
        found.append(given)
    return tuple(found)


def text(request: DecisionRequest | TokenizeRequest | RouteRequest) -> str:
    """The text that a request holds as `prompt` or as `messages`."""
    if (request.prompt is None) == (request.messages is None):
        raise Refusal("exactly one of prompt and messages is needed", "prompt")
    if request.prompt is not None:
        return request.prompt
    assert request.messages is not None
    if isinstance(request, TokenizeRequest):
        return render(request.messages, request.add_generation_prompt, request.continue_final_message)
    return render(request.messages)


def wanted_of(request: Generation, service: Service) -> Wanted:
    """What `request` asks for; Refusal when its parameters contradict each other."""
    mode, most, made = who(request, service), request.most_tokens, request.n
    prompts: Sequence[str | tuple[int, ...]]
    if isinstance(request, CompletionRequest):
        prompts, made = request.prompts(), request.best_of or request.n
        if made < request.n or (made > request.n and request.stream):
            why = "a stream cannot be ranked" if request.stream else f"n={request.n}"
            raise Refusal(f"best_of={made}: {why}", "best_of")
    else:
        assert isinstance(request, ChatRequest)
        prompts = [render(request.messages, request.add_generation_prompt, request.continue_final_message)]
        if request.top_logprobs and not request.logprobs:
            raise Refusal("top_logprobs needs logprobs=true", "top_logprobs")
    if request.stream_options and not request.stream:
        raise Refusal("stream_options needs stream=true", "stream_options")
    if request.min_tokens > most:
        raise Refusal(f"min_tokens={request.min_tokens}: more than the {most} that an answer may have", "min_tokens")
    return Wanted(mode, prompts, made, len(request.logit_bias) * len(prompts) * made)


async def asked(wanted: Wanted, request: Generation, service: Service, request_id: str) -> Translated:
    """What the service is asked for `request`; Refusal when its prompts are none."""
    made = wanted.made
    sampling = request.sampling(STOPS if isinstance(request, ChatRequest) else ())
    if request.seed is None:
        sampling = dataclasses.replace(sampling, seed=secrets.randbits(63))
    if made > request.n:
        sampling = dataclasses.replace(sampling, logprobs=sampling.logprobs or 0)
    prompts = await tokens(wanted.prompts, request, service)
    asks = [
        Ask(
            prompt,
            sampling,
            wanted.mode,
            request.top_kernels,
            f"{request_id}-{i}",
            measure=request.measure_hand_offs,
            telemetry=request.generation_telemetry,
        )
        for i, prompt in enumerate(prompts)
    ]
    return Translated(wanted.mode, prompts, tuple(numbered(ask, i) for ask in asks for i in range(made)), made)
