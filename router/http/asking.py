"""From a request of the protocol to what the service is asked: who answers, which tokens, how many answers.

A kernel reads `context` tokens at most. A longer prompt is refused, unless `truncate_prompt_tokens` says how many of
its last tokens are to be kept: nobody's text is cut without their knowing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from router.http.chat import STOPS, render
from router.http.openai import (
    Addressed,
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    Generation,
    Refusal,
    RouteRequest,
    TokenizeRequest,
)
from router.service import ROUTE, Ask, Service, numbered

MODES = (ROUTE, "mixture", "barycenter")
_LONG = 1 << 14  # characters that take about a millisecond to tokenise: longer texts leave the event loop alone


@dataclass(frozen=True)
class Asked:
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


async def tokens(prompt: str | tuple[int, ...], request: Addressed, service: Service) -> tuple[int, ...]:
    """The tokens of a prompt, no more than a kernel can read."""
    context = service.config.kernel.context
    if isinstance(prompt, str):
        encode = service.tokenizer.encode
        found = tuple(await asyncio.to_thread(encode, prompt) if len(prompt) > _LONG else encode(prompt))
    else:
        found = prompt
        size = service.tokenizer.vocab_size
        if wrong := next((t for t in found if not 0 <= t < size), None):
            raise Refusal(f"prompt: {wrong} is no token; there are 0 to {size - 1}", "prompt")
    kept = request.truncate_prompt_tokens
    if kept:
        return found[-min(context if kept == -1 else kept, context) :]
    if len(found) > context:
        raise Refusal(
            f"this prompt has {len(found)} tokens, kernels read {context}: shorten it, or send "
            f"truncate_prompt_tokens=-1 to let them read its end",
            "messages" if isinstance(request, ChatRequest) else "prompt", "context_length_exceeded",
        )  # fmt: skip
    return found


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


async def asked(request: Generation, service: Service, request_id: str) -> Asked:
    """What `request` asks; raises Refusal before anything is answered."""
    mode, most, made = who(request, service), request.most_tokens, request.n
    stops: tuple[str, ...] = ()
    prompts: Sequence[str | tuple[int, ...]]
    if isinstance(request, CompletionRequest):
        prompts, made = request.prompts(), request.best_of or request.n
        if made < request.n or (made > request.n and request.stream):
            why = "a stream cannot be ranked" if request.stream else f"n={request.n}"
            raise Refusal(f"best_of={made}: {why}", "best_of")
    else:
        assert isinstance(request, ChatRequest)
        prompts = [render(request.messages, request.add_generation_prompt, request.continue_final_message)]
        stops = STOPS
        if request.top_logprobs and not request.logprobs:
            raise Refusal("top_logprobs needs logprobs=true", "top_logprobs")
    if request.stream_options and not request.stream:
        raise Refusal("stream_options needs stream=true", "stream_options")
    if request.min_tokens > most:
        raise Refusal(f"min_tokens={request.min_tokens}: more than the {most} that an answer may have", "min_tokens")
    sampling = request.sampling(stops)
    if request.seed is None:
        sampling = dataclasses.replace(sampling, seed=secrets.randbits(63))
    if made > request.n:
        sampling = dataclasses.replace(sampling, logprobs=sampling.logprobs or 0)
    read = tuple([await tokens(prompt, request, service) for prompt in prompts])
    asks = [
        Ask(prompt, sampling, mode, request.top_kernels, f"{request_id}-{i}", measure=request.measure_hand_offs)
        for i, prompt in enumerate(read)
    ]
    return Asked(mode, read, tuple(numbered(ask, i) for ask in asks for i in range(made)), made)
