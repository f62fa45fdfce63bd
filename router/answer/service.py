"""The constellation as a service, without HTTP: questions in, pieces of text, probabilities and decisions out.

    async for piece in service.stream(Ask("The import statement")): ...

Many requests are under way at once; what they have in common are the kernels (kernels.py), which batch
their turns. A request that is left, by `aclose()` or a cancelled task, leaves no work behind: every call that it waits
for is cancelled, down to the kernel's batch. Its work goes by an id of ours; `Ask.request` is shown and no more, for
two clients may call theirs the same.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from constellation.config import Config
from constellation.coordizer.tokenizer import Tokenizer
from constellation.decoding.basins import Basins
from constellation.decoding.sample import TokenScore
from constellation.errors import ConfigError
from router.answer.certificate import CertificateWriter
from router.answer.concurrency import together
from router.answer.encoding import encoded
from router.answer.kernels import Kernels
from router.answer.query import (
    Answer,
    Ask,
    Bits,
    Call,
    Piece,
    QueryLife,
    ReadCall,
    Turn,
    check,
    numbered,
    opened,
    read_prompt,
)
from router.answer.scoring import Reader, ScoredText, panels
from router.answer.turn import Ear
from router.answer.view import View
from router.decide.fisher_rao import FisherRaoRouter
from router.decide.modes import ROUTE
from router.decide.policy import Policy

__all__ = ["Answer", "AnswerOdds", "Ask", "Piece", "Service", "numbered"]


class AnswerOdds(NamedTuple):
    """How likely each allowed answer is; who judged, and why, as an answer in which nothing is written."""

    probabilities: list[float]
    told: Answer


class Service:
    """Answers whoever asks. `policy` may be None when kernels are asked by name alone."""

    def __init__(
        self,
        config: Config,
        policy: Policy | None,
        tokenizer: Tokenizer,
        kernels: Kernels,
        *,
        name: str = "constellation",
        created: int = 0,
        basins: Basins | None = None,
    ):
        self.config, self.policy, self.tokenizer, self.kernels = config, policy, tokenizer, kernels
        self.basins = basins  # of the run's tokens, for requests that ask for their terms
        self.name, self.created = name, created  # created: seconds since 1970
        self._reader = Reader(kernels, config.kernel)
        self._under_way: set[str] = set()

    def models(self) -> list[str]:
        """What can be asked: the constellation, and each kernel by itself, "constellation/heart"."""
        return [self.name, *(f"{self.name}/{kernel}" for kernel in self.kernels.names)]

    def check(self, ask: Ask) -> None:
        """ConfigError if `ask` cannot be answered, before anything is decoded."""
        check(ask, self.policy, self.kernels.names)
        QueryLife("", ask, self.policy, self.tokenizer, self.config, self.basins)

    async def stream(self, ask: Ask, early: bool = True) -> AsyncGenerator[Piece | Answer, None]:
        """The pieces of the answer as they come, then the `Answer`. Leaving early frees what it took.

        Pieces come while a turn is under way, or, unless `early`, at its end, which costs less.
        """
        check(ask, self.policy, self.kernels.names)
        with self._working() as work:
            own = replace(ask, request=work)
            life = QueryLife(ask.request or work, own, self.policy, self.tokenizer, self.config, self.basins)
            steps, came = life.live(), asyncio.Event()
            fetching: asyncio.Task[list[Any]] | None = None

            def hear(position: int, tokens: tuple[int, ...], scores: tuple[TokenScore, ...]) -> None:
                life.hear(position, tokens, scores)
                came.set()

            try:
                step = next(steps)
                while True:
                    if isinstance(step, Piece):
                        yield step
                        step = next(steps)
                        continue
                    if not early:
                        step = steps.send(await self._fetch(step, None))
                        continue
                    fetching = asyncio.ensure_future(self._fetch(step, hear))
                    fetching.add_done_callback(lambda _: came.set())
                    while not fetching.done():
                        await came.wait()
                        came.clear()
                        if not fetching.done() and (piece := life.tell()):  # what a slow reader left makes one piece
                            yield piece
                    step = steps.send(fetching.result())
            except StopIteration as end:
                yield end.value
            finally:
                steps.close()
                if fetching and not fetching.done():
                    fetching.cancel()
                    await asyncio.gather(fetching, return_exceptions=True)

    async def answer(self, ask: Ask) -> Answer:
        """The answer alone, once it is whole."""
        *_, answer = [step async for step in self.stream(ask, early=False)]
        assert isinstance(answer, Answer)
        return answer

    async def score(
        self, tokens: Sequence[int], mode: str = ROUTE, top: int = 0, top_k: int = 3
    ) -> list[ScoredText | None]:
        """Every token given those before it; None for a first token that is the end of another text.

        As `constellation eval` does it: decisions every W bytes by the bytes before them, OCEAN up to the
        first one, windows that overlap by half where the text is longer than the context.
        """
        ask = Ask(tuple(tokens), mode=mode, top_k=top_k)
        check(ask, self.policy, self.kernels.names)
        read_prompt(ask.prompt, self.tokenizer)
        read = opened(tokens, self.tokenizer)
        who = panels(read[1:], self.policy, self.tokenizer, self.config, mode, top_k)
        with self._working():
            found = await self._reader.read(read, who, mode, top)
        return [*([None] * (len(tokens) - len(found))), *found]

    async def decide(
        self, prompt: str | tuple[int, ...], answers: Sequence[str] | Sequence[Sequence[int]], mode: str = ROUTE,
        top_k: int = 3,
    ) -> AnswerOdds:  # fmt: skip
        """Probability that the text goes on with each of `answers`, normalised over them; nothing is decoded.

        Answers are texts, or the tokens of texts. All are read at once by the kernel, or kernels, that the prompt
        belongs to. An answer is judged by its own tokens, so of two that begin alike the shorter one counts the longer
        one's text too.
        """
        texts = [one for one in answers if isinstance(one, str)]
        given: Sequence[Any] = await encoded(self.tokenizer, texts) if texts else answers
        asked: list[tuple[int, ...]] = [tuple(one) for one in given]
        if len(set(asked)) < len(asked) or not all(asked) or not asked:
            raise ConfigError("answers: at least one is needed, none empty, no two the same")
        ask = Ask(prompt, mode=mode, top_k=top_k)
        check(ask, self.policy, self.kernels.names)
        life = QueryLife("", ask, self.policy, self.tokenizer, self.config, self.basins)
        longest = max(map(len, asked))
        room = self.config.kernel.context - longest
        if room < 1:
            raise ConfigError(f"answers: one has {longest} tokens, {self.config.kernel.context - 1} are allowed")
        window, alike = life.question[-room:], dict[int, list[int]]()  # length -> answers of so many tokens
        for at, one in enumerate(asked):
            alike.setdefault(len(one), []).append(at)
        log_p = np.zeros(len(asked))
        with self._working():
            parts = await together([
                self._reader.scores([[*window, *asked[at]] for at in group], count, life.panel, mode, 0)
                for count, group in alike.items()
            ])  # fmt: skip
        for group, rows in zip(alike.values(), parts):
            log_p[group] = [sum(one.log_prob for one in row) for row in rows]
        p = np.exp(log_p - log_p.max())
        return AnswerOdds([float(x) for x in p / p.sum()], life.judged())

    def explain(self, text: str) -> dict[str, Any]:
        """Who would answer `text` and why: `RouteChoice.to_json`, the router's hash and a certificate."""
        if self.policy is None:
            raise ConfigError("there is no fitted router to explain")
        data = text.encode("utf-8", "surrogatepass")
        view = View(self.policy)
        view.update(data)
        view.decide(len(data), self.config.router.hysteresis)
        assert view.choice is not None
        found = view.choice.to_json(self.policy.names)
        if isinstance(self.policy, FisherRaoRouter):
            writer = CertificateWriter(self.policy, ROUTE)
            writer.add(view)
            found |= {"router_hash": self.policy.hash, "certificate": writer.certificate()}
        return found

    async def health(self) -> dict[str, Any]:
        """Load of the service and of its kernels."""
        return {"status": "ok", "requests": len(self._under_way), "kernels": await self.kernels.stats()}

    @contextmanager
    def _working(self) -> Iterator[str]:
        """A request is under way: its id among them."""
        work = uuid.uuid4().hex
        self._under_way.add(work)
        try:
            yield work
        finally:
            self._under_way.discard(work)

    async def _fetch(self, calls: Sequence[Call], hear: Ear | None) -> list[Any]:
        """The results of all calls."""
        positions = sum(call.tail for call in calls if isinstance(call, ReadCall))
        if not positions:
            return await together([self._call(call, hear) for call in calls])
        async with self._reader.room(positions):
            return await together([self._call(call, hear) for call in calls])

    async def _call(self, call: Call, hear: Ear | None) -> Any:
        if isinstance(call, Turn):
            return await self.kernels.turn(call.kernel, call.packet, call.budget_bytes, None if call.draft else hear)
        if isinstance(call, Bits):
            return await self.kernels.bits(call.kernel, call.packet, call.count)
        return (await self.kernels.log_probs(call.kernel, [call.window], call.tail))[0]
