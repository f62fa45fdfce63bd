"""From the pieces of an answer to the replies of the protocol: chunk by chunk, or whole.

A `Render` is one request's: `start`, `more`, `end` make the choices of a stream, `whole` the reply of one that is not
streamed. The whole is what its chunks are together, law of both forms: texts and log-probabilities join up to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET

from constellation.errors import RunError
from router.answer.service import Answer, Piece, Service
from router.http.requests import ChatRequest, CompletionRequest, Generation
from router.http.responses import (
    FINISHES,
    ChatChunk,
    ChatCompletion,
    Choice,
    Completion,
    Delta,
    DeltaChoice,
    MessageChoice,
    Names,
    Offsets,
    Reply,
    Scored,
    Spoken,
    TextChoice,
    Usage,
    telemetry,
)
from router.http.sse import DONE, event, merged
from router.http.translate import Translated

Steps = AsyncGenerator[Piece | Answer, None]
_ENCODE = msgspec.json.Encoder().encode


@dataclass
class Rendered:
    """What one answer has said so far."""

    index: int  # of the choice
    prompt: tuple[int, ...]
    prompt_scored: list[Scored]  # empty unless the prompt is echoed with log-probabilities
    offsets: Offsets = field(default_factory=Offsets)
    scored: list[Scored] = field(default_factory=list)
    completion_tokens: int = 0
    answer: Answer | None = None

    def add(self, piece: Piece, scores: bool) -> list[Scored]:
        """The piece's log-probabilities, if they were asked for."""
        self.completion_tokens += len(piece.token_ids)
        if not scores:
            return []
        if piece.logprobs is None:
            raise RunError(f"kernel {piece.kernel!r} sent no log-probabilities of its tokens")
        new = [Scored(t, p, top) for t, (p, top) in zip(piece.token_ids, piece.logprobs, strict=True)]
        self.scored += new
        return new

    @property
    def mean_log_prob(self) -> float:
        """By which `best_of` ranks."""
        return sum(one.log_prob or 0.0 for one in self.scored) / max(1, len(self.scored))


class Render(ABC):
    """The replies to one request."""

    def __init__(self, request: Generation, asked: Translated, service: Service, request_id: str, kind: str):
        self.request, self.asked = request, asked
        self.heard: Callable[[int, Piece | Answer], None] = lambda i, step: None  # told of every step
        self.names = Names(service.tokenizer, request.return_tokens_as_token_ids)
        self.decode = service.tokenizer.decode
        self.header: dict[str, Any] = {
            "id": f"{kind}-{request_id}", "created": int(time.time()), "model": request.model or service.name,
        }  # fmt: skip
        self.rendered = [Rendered(i, asked.prompt_of(i), []) for i in range(len(asked.asks))]

    # -- streamed

    async def stream(self, steps: Sequence[Steps]) -> AsyncGenerator[bytes, None]:
        """The events of a stream. The first comes with the first piece: what fails before it is no stream yet."""
        options, begun = self.request.options(), False
        async with contextlib.aclosing(merged(steps)) as going:
            async for i, step in going:
                told, new = self.rendered[i], self._hear(i, step)
                if not begun:
                    begun = True
                    for one in self.rendered:
                        if choice := self.start(one):
                            yield self._chunk(choice)
                if isinstance(step, Answer):
                    yield self._chunk(self.end(told, step), telemetry(step))
                elif step.text or new or self.request.return_token_ids:
                    yield self._chunk(self.more(told, step, new), {"kernel": step.kernel})
        if options.include_usage:
            yield event(_ENCODE(self.reply([], usage=self.usage())))
        yield DONE

    def _chunk(self, choice: Choice, story: Any = UNSET) -> bytes:
        options = self.request.options()
        usage: Any = self.usage() if options.continuous_usage_stats else None if options.include_usage else UNSET
        return event(_ENCODE(self.reply([choice], usage=usage, constellation=story)))

    def _hear(self, i: int, step: Piece | Answer) -> list[Scored]:
        self.heard(i, step)
        if isinstance(step, Piece):
            return self.rendered[i].add(step, self.asked.asks[i].sampling.logprobs is not None)
        self.rendered[i].answer = step
        return []

    # -- whole

    async def whole(self, steps: Sequence[Steps]) -> Reply:
        """The reply, once all answers are there."""
        async with contextlib.aclosing(merged(steps)) as going:
            async for i, step in going:
                self._hear(i, step)
        kept = [dataclasses.replace(told, index=i) for i, told in enumerate(self._kept())]
        choices = [self.all(told) for told in kept]
        stories = [telemetry(told.answer) for told in kept if told.answer]
        for choice, story in zip(choices[1:], stories[1:]):
            choice.constellation = story
        return self.reply(choices, usage=self.usage(), constellation=stories[0], whole=True)

    def _kept(self) -> list[Rendered]:
        """The choices that are told: of each prompt's answers the `n` likeliest, in their order when all are kept."""
        made, n = self.asked.made, self.request.n
        if made == n:
            return self.rendered
        groups = [self.rendered[i : i + made] for i in range(0, len(self.rendered), made)]
        return [told for group in groups for told in sorted(group, key=lambda t: -t.mean_log_prob)[:n]]

    def usage(self) -> Usage:
        return Usage.of(self.asked.prompt_tokens, sum(told.completion_tokens for told in self.rendered))

    def ids(self, told: Rendered, piece: Piece | None = None) -> dict[str, Any]:
        """The fields of `return_token_ids`."""
        if not self.request.return_token_ids:
            return {}
        if piece:
            return {"token_ids": list(piece.token_ids)}
        if told.answer:
            return {"token_ids": list(told.answer.token_ids), "prompt_token_ids": list(told.prompt)}
        return {"token_ids": [], "prompt_token_ids": list(told.prompt)}

    @abstractmethod
    def reply(self, choices: list[Any], usage: Any, constellation: Any = UNSET, whole: bool = False) -> Reply:
        """The object around the choices."""

    @abstractmethod
    def start(self, told: Rendered) -> Choice | None: ...

    @abstractmethod
    def more(self, told: Rendered, piece: Piece, scored: list[Scored]) -> Choice: ...

    @abstractmethod
    def end(self, told: Rendered, answer: Answer) -> Choice: ...

    @abstractmethod
    def all(self, told: Rendered) -> Choice:
        """The whole choice."""


class CompletionRender(Render):
    """/v1/completions"""

    def __init__(self, request: CompletionRequest, asked: Translated, service: Service, request_id: str):
        super().__init__(request, asked, service, request_id, "cmpl")
        self.echo, self.scores = request.echo, request.logprobs is not None

    def reply(self, choices: list[Any], usage: Any, constellation: Any = UNSET, whole: bool = False) -> Reply:
        return Completion(**self.header, choices=choices, usage=usage, constellation=constellation)

    def start(self, told: Rendered) -> Choice | None:
        if not self.request.return_token_ids and not self.echo:
            return None
        return TextChoice(
            index=told.index, text=self._prompt(told), logprobs=self._logprobs(told, told.prompt_scored),
            finish_reason=None, **self.ids(told),
        )  # fmt: skip

    def more(self, told: Rendered, piece: Piece, scored: list[Scored]) -> Choice:
        return TextChoice(
            index=told.index, text=piece.text, logprobs=self._logprobs(told, scored), finish_reason=None,
            **self.ids(told, piece),
        )  # fmt: skip

    def end(self, told: Rendered, answer: Answer) -> Choice:
        return TextChoice(index=told.index, text="", logprobs=None, finish_reason=FINISHES[answer.finish_reason])

    def all(self, told: Rendered) -> Choice:
        assert told.answer
        return TextChoice(
            index=told.index, text=self._prompt(told) + told.answer.text,
            logprobs=self._logprobs(told, [*told.prompt_scored, *told.scored]),
            finish_reason=FINISHES[told.answer.finish_reason], **self.ids(told),
        )  # fmt: skip

    def _prompt(self, told: Rendered) -> str:
        return self.decode(told.prompt).decode("utf-8", "replace") if self.echo else ""

    def _logprobs(self, told: Rendered, scored: Sequence[Scored]) -> Any:
        return self.names.completion(scored, told.offsets) if self.scores else None


class ChatRender(Render):
    """/v1/chat/completions"""

    def __init__(self, request: ChatRequest, asked: Translated, service: Service, request_id: str):
        super().__init__(request, asked, service, request_id, "chatcmpl")
        self.scores = request.logprobs

    def reply(self, choices: list[Any], usage: Any, constellation: Any = UNSET, whole: bool = False) -> Reply:
        kind = ChatCompletion if whole else ChatChunk
        return kind(**self.header, choices=choices, usage=usage, constellation=constellation)

    def start(self, told: Rendered) -> Choice:
        return self._delta(told, Delta("assistant", ""), None, **self.ids(told))

    def more(self, told: Rendered, piece: Piece, scored: list[Scored]) -> Choice:
        logprobs = self.names.chat(scored) if self.scores else None
        return self._delta(told, Delta(content=piece.text), logprobs, **self.ids(told, piece))

    def end(self, told: Rendered, answer: Answer) -> Choice:
        return self._delta(told, Delta(), None, FINISHES[answer.finish_reason])

    def all(self, told: Rendered) -> Choice:
        assert told.answer
        return MessageChoice(
            index=told.index, message=Spoken("assistant", told.answer.text),
            logprobs=self.names.chat(told.scored) if self.scores else None,
            finish_reason=FINISHES[told.answer.finish_reason], **self.ids(told),
        )  # fmt: skip

    def _delta(self, told: Rendered, delta: Delta, logprobs: Any, finish: Any = None, **ids: Any) -> DeltaChoice:
        return DeltaChoice(index=told.index, delta=delta, logprobs=logprobs, finish_reason=finish, **ids)
