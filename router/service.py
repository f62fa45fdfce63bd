"""The constellation as a service, without HTTP: questions in, pieces of text, probabilities and decisions out.

    async for piece in service.stream(Ask("The import statement")): ...

Many requests are under way at once; what they have in common are the kernels (kernels.py), which batch
their turns. A request that is left, by `aclose()` or a cancelled task, is taken out of its kernel's batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from constellation.config import Config
from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ConfigError
from router import reading
from router.certificate import Ledger
from router.kernels import AsyncKernels
from router.life import ROUTE, Answer, Ask, Bits, Call, Life, Piece, Turn, check, numbered, opened, read_prompt
from router.policy import Policy
from router.reading import Scored, joint, panels
from router.route import Router
from router.view import View

__all__ = ["ROUTE", "Answer", "Ask", "Decision", "Piece", "Service", "numbered"]

CANCEL_S = 5.0  # a kernel that does not hear of a cancellation within is left to notice by itself


class Decision(NamedTuple):
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
        kernels: AsyncKernels,
        *,
        name: str = "constellation",
        created: int = 0,
    ):
        self.config, self.policy, self.tokenizer, self.kernels = config, policy, tokenizer, kernels
        self.name, self.created = name, created  # created: seconds since 1970
        self._under_way: set[str] = set()

    def models(self) -> list[str]:
        """What can be asked: the constellation, and each kernel by itself, "constellation/heart"."""
        return [self.name, *(f"{self.name}/{kernel}" for kernel in self.kernels.names)]

    def check(self, ask: Ask) -> None:
        """ConfigError if `ask` cannot be answered, before anything is decoded."""
        check(ask, self.policy, self.kernels.names)
        Life("", ask, self.policy, self.tokenizer, self.config).packet.encode()

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece | Answer, None]:
        """The pieces of the answer as they come, then the `Answer`. Leaving early frees what it took."""
        request = ask.request or uuid.uuid4().hex
        ask = replace(ask, request=request)
        check(ask, self.policy, self.kernels.names)
        life = Life(request, ask, self.policy, self.tokenizer, self.config)
        steps, asked = life.live(), frozenset[str]()
        self._under_way.add(request)
        try:
            step = next(steps)
            while True:
                if isinstance(step, Piece):
                    yield step
                    step = next(steps)
                else:
                    asked = frozenset(call.kernel for call in step)
                    results = await self._fetch(step)
                    asked = frozenset()
                    step = steps.send(results)
        except StopIteration as end:
            yield end.value
        finally:
            self._under_way.discard(request)
            steps.close()
            if asked:
                await asyncio.shield(self._cancel(asked, request))

    async def score(
        self, tokens: Sequence[int], mode: str = ROUTE, top: int = 0, top_k: int = 3
    ) -> list[Scored | None]:
        """Every token given those before it; None for a first token that is the end of another text.

        As `constellation eval` does it: decisions every W bytes by the bytes before them, OCEAN up to the
        first one, windows that overlap by half where the text is longer than the context.
        """
        ask = Ask(tuple(tokens), mode=mode, top_k=top_k)
        check(ask, self.policy, self.kernels.names)
        read_prompt(ask.prompt, self.tokenizer)
        read = opened(tokens, self.tokenizer)
        who = panels(read[1:], self.policy, self.tokenizer, self.config, mode, top_k)
        found = await reading.read(self.kernels, read, who, mode, top, self.config.kernel)
        return [*([None] * (len(tokens) - len(found))), *found]

    async def decide(
        self, prompt: str | tuple[int, ...], answers: Sequence[str], mode: str = ROUTE, top_k: int = 3
    ) -> Decision:
        """Probability that the text goes on with each of `answers`, normalised over them; nothing is decoded.

        All answers are read in one batch by the kernel, or kernels, that the prompt belongs to. An answer is
        judged by its own tokens, so of two that begin alike the shorter one counts the longer one's text too.
        """
        if len(set(answers)) < len(answers) or not all(answers) or not answers:
            raise ConfigError(f"answers={list(answers)!r}: at least one is needed, none empty, no two the same")
        ask = Ask(prompt, mode=mode, top_k=top_k)
        check(ask, self.policy, self.kernels.names)
        life = Life("", ask, self.policy, self.tokenizer, self.config)
        asked = [self.tokenizer.encode(answer) for answer in answers]
        longest = max(map(len, asked))
        room = self.config.kernel.context - longest
        if room < 1:
            raise ConfigError(f"answers: one has {longest} tokens, {self.config.kernel.context - 1} are allowed")
        window = life.question[-room:]
        windows = [[*window, *one[:-1], *[0] * (longest - len(one))] for one in asked]
        log_p_BTV = await joint(self.kernels, windows, longest, life.panel, mode)
        log_p = np.array([rows[range(len(one)), one].sum() for rows, one in zip(log_p_BTV, asked)], np.float64)
        p = np.exp(log_p - log_p.max())
        return Decision([float(x) for x in p / p.sum()], life.judged())

    def explain(self, text: str) -> dict[str, Any]:
        """Who would answer `text` and why: `Choice.to_json`, the router's hash and a certificate of the decision."""
        if self.policy is None:
            raise ConfigError("there is no fitted router to explain")
        data = text.encode("utf-8", "surrogatepass")
        view = View(self.policy)
        view.update(data)
        view.decide(len(data), self.config.router.hysteresis)
        assert view.choice is not None
        found = view.choice.to_json(self.policy.names)
        if isinstance(self.policy, Router):
            ledger = Ledger(self.policy, ROUTE)
            ledger.add(view)
            found |= {"router_hash": self.policy.hash, "certificate": ledger.certificate()}
        return found

    async def health(self) -> dict[str, Any]:
        """Load of the service and of its kernels."""
        return {"status": "ok", "requests": len(self._under_way), "kernels": await self.kernels.stats()}

    async def _fetch(self, calls: Sequence[Call]) -> list[Any]:
        """The results of all calls; when one fails, or we are cancelled, the others are cancelled too."""
        if len(calls) == 1:
            return [await self._call(calls[0])]
        tasks = [asyncio.ensure_future(self._call(call)) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _call(self, call: Call) -> Any:
        if isinstance(call, Turn):
            return await self.kernels.turn(call.kernel, call.packet, call.budget_bytes)
        if isinstance(call, Bits):
            return await self.kernels.bits(call.kernel, call.packet, call.count)
        return (await self.kernels.log_probs(call.kernel, [call.window], call.tail))[0]

    async def _cancel(self, kernels: frozenset[str], request: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_S):
                await asyncio.gather(*(self.kernels.cancel(kernel, request) for kernel in kernels))
