"""What answers the paths: a request is read and checked (openai.py), let in (limits.py), answered, and counted.

A client that leaves takes its work with it, also while its prompt is still being read or its reply is not streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from constellation.coordizer.tokenizer import SPECIALS
from router.http import replies
from router.http.asking import Asked, asked, text, tokens, who
from router.http.chat import JINJA
from router.http.choosing import allowed, chosen, nothing
from router.http.door import Door, Visit, ending
from router.http.failures import error_json, refusal_of
from router.http.limits import Admission, Refused, Ticket
from router.http.metrics import CLIENT_LEFT, Metrics
from router.http.openai import (
    Addressed,
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    DetokenizeRequest,
    Generation,
    Refusal,
    RouteRequest,
    TokenizeRequest,
    read,
)
from router.http.replies import Names, Scored
from router.http.stream_events import EventStream, error_event, first_of, while_connected
from router.http.telling import ChatTelling, CompletionTelling, Steps, Telling
from router.service import Answer, Piece, Service

R = TypeVar("R", bound=Addressed)


class Desk:
    """What answers the paths; its door is set by whoever puts one before it."""

    door: Door

    def __init__(self, service: Service, admission: Admission, metrics: Metrics):
        self.service, self.admission, self.metrics = service, admission, metrics

    # -- text

    async def completions(self, request: Request) -> Response:
        wanted, headers = await self._read(request, CompletionRequest)
        request_id = wanted.request_id or Visit.of(request).request_id
        ask = await asked(wanted, self.service, request_id)
        telling = CompletionTelling(wanted, ask, self.service, request_id)
        return await self._generate(request, wanted, ask, telling, headers)

    async def chat(self, request: Request) -> Response:
        wanted, headers = await self._read(request, ChatRequest)
        request_id = wanted.request_id or Visit.of(request).request_id
        ask = await asked(wanted, self.service, request_id)
        return await self._generate(request, wanted, ask, ChatTelling(wanted, ask, self.service, request_id), headers)

    async def _generate(
        self, request: Request, wanted: Generation, ask: Asked, telling: Telling, headers: dict[str, str]
    ) -> Response:
        visit, texts = Visit.of(request), allowed(wanted)
        steps: list[Steps]
        if texts is not None:
            steps = chosen(self.service, ask.asks, texts)
        elif wanted.most_tokens == 0:
            steps = [nothing(one) for one in ask.asks]
        else:
            steps = [self.service.stream(one) for one in ask.asks]
        most = ask.prompt_tokens * ask.made + wanted.most_tokens * len(ask.asks)
        ticket = self._admit(visit, len(ask.asks), most)
        visit.watch.mode = ask.mode

        def heard(stream: int, step: Piece | Answer) -> None:
            if isinstance(step, Answer):
                self.metrics.answered(step)
            else:
                visit.watch.piece(step.kernel, len(step.token_ids), stream)

        telling.heard = heard
        leave = contextlib.ExitStack()
        leave.callback(lambda: ticket.leave(telling.usage().total_tokens, time.monotonic_ns()))
        if not wanted.stream:
            with leave:
                reply = await while_connected(self._whole(telling, steps), request.receive)
            return _left(visit) if reply is None else _json(reply, headers)
        events = await while_connected(first_of(self._events(visit, telling, steps, leave)), request.receive)
        if events is None:
            leave.close()  # a second time, unless it was left before it began
            return _left(visit)
        return EventStream(events, headers, visit)

    async def _whole(self, telling: Telling, steps: Sequence[Steps]) -> replies.Reply:
        await self._score(telling)
        return await telling.whole(steps)

    async def _events(
        self, visit: Visit, telling: Telling, steps: Sequence[Steps], leave: contextlib.ExitStack
    ) -> AsyncGenerator[bytes, None]:
        begun = False
        with leave:
            try:
                await self._score(telling)
                async with contextlib.aclosing(telling.stream(steps)) as events:
                    async for data in events:
                        begun = True
                        yield data
            except Exception as error:
                if not begun:
                    raise
                refusal = refusal_of(error)
                visit.failed = refusal.http_status
                yield error_event(error_json(refusal))

    async def _score(self, telling: Telling) -> None:
        """Log-probabilities of the prompts, if they are echoed with theirs; a first token has none."""
        wanted = telling.request
        if not isinstance(wanted, CompletionRequest) or not wanted.echo or wanted.logprobs is None:
            return
        prompts, mode, top, top_k = telling.asked.prompts, telling.asked.mode, wanted.logprobs, wanted.top_kernels
        found = await asyncio.gather(*(self.service.score(p, mode, top, top_k) for p in prompts if p))
        by_prompt = dict(zip([p for p in prompts if p], found))
        for told in telling.told:
            told.prompt_scored = [
                Scored(token, None if i == 0 or one is None else one.log_prob, () if one is None else one.top)
                for i, (token, one) in enumerate(zip(told.prompt, by_prompt.get(told.prompt, ())))
            ]

    # -- decisions, tokens, routes

    async def decisions(self, request: Request) -> Response:
        wanted, headers = await self._read(request, DecisionRequest)
        mode, visit = who(wanted, self.service), Visit.of(request)
        prompt = await tokens(text(wanted), wanted, self.service)
        texts = [one if isinstance(one, str) else msgspec.json.encode(one).decode() for one in wanted.answers]
        used = len(prompt) + sum(len(self.service.tokenizer.encode(one)) for one in texts)
        ticket = self._admit(visit, 1, used)
        visit.watch.mode = mode
        with contextlib.ExitStack() as leave:
            leave.callback(lambda: ticket.leave(used, time.monotonic_ns()))
            work = self.service.decide(prompt, texts, mode, wanted.top_kernels)
            decided = await while_connected(work, request.receive)
        if decided is None:
            return _left(visit)
        p, told = decided
        decision = replies.Decision(
            id=f"decision-{wanted.request_id or visit.request_id}", created=int(time.time()),
            model=wanted.model or self.service.name, choice=wanted.answers[p.index(max(p))],
            probabilities=[replies.Probability(answer, one) for answer, one in zip(wanted.answers, p)],
            usage=replies.Usage.of(len(prompt), 0), constellation=replies.telemetry(told),
        )  # fmt: skip
        return _json(decision, headers)

    async def tokenize(self, request: Request) -> Response:
        wanted, headers = await self._read(request, TokenizeRequest)
        who(wanted, self.service)
        said, names = text(wanted), Names(self.service.tokenizer)
        # the name of a special token, and nothing else, is that token: how clients learn its id
        if said in SPECIALS:
            ids = [SPECIALS.index(said)]
        else:
            ids = await asyncio.to_thread(self.service.tokenizer.encode, said)
        context, strings = self.service.config.kernel.context, wanted.return_token_strs
        return _json(replies.Tokens(len(ids), context, ids, [names(i) for i in ids] if strings else None), headers)

    async def detokenize(self, request: Request) -> Response:
        wanted, headers = await self._read(request, DetokenizeRequest)
        who(wanted, self.service)
        return _json(replies.Prompt(self.service.tokenizer.decode(wanted.tokens).decode("utf-8", "replace")), headers)

    async def tokenizer_info(self) -> Response:
        tokenizer, eos = self.service.tokenizer, SPECIALS[self.service.tokenizer.eos]
        return _json({
            "tokenizer_class": "ByteLevelBPE", "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash,
            "model_max_length": self.service.config.kernel.context, "chat_template": JINJA,
            "bos_token": eos, "eos_token": eos, "eos_token_id": tokenizer.eos, "pad_token": None, "unk_token": None,
        })  # fmt: skip

    async def route(self, request: Request) -> Response:
        wanted, headers = await self._read(request, RouteRequest)
        who(wanted, self.service)
        if self.service.policy is None:
            raise Refusal(f"there is no router here; name one of {', '.join(self.service.models()[1:])}", "model")
        return _json(await asyncio.to_thread(self.service.explain, text(wanted)), headers)

    async def models(self) -> Response:
        return _json(replies.Models([self._model(name) for name in self.service.models()]))

    async def model(self, model: str) -> Response:
        who(Addressed(model=model), self.service)
        return _json(self._model(model))

    def _model(self, name: str) -> replies.Model:
        return replies.Model(id=name, created=self.service.created, max_model_len=self.service.config.kernel.context)

    # -- operation

    async def health(self) -> Response:
        return _json(await self.service.health())

    async def ready(self) -> Response:
        if self.door.closed:
            raise ending()
        return _json({"status": "ready", **await self.service.health()})

    async def scrape(self) -> Response:
        body, kind = self.metrics.render((await self.service.health())["kernels"])
        return Response(body, headers={"content-type": kind})

    # -- what all have in common

    async def _read(self, request: Request, kind: type[R]) -> tuple[R, dict[str, str]]:
        """The request's body, checked, and the header that names what of it was not used."""
        length = request.headers.get("content-length", "")
        body = await self.admission.body(request.stream(), int(length) if length.isdecimal() else None)
        if isinstance(body, Refused):
            self._refuse(body)
        wanted, unused = read(body, kind)
        return wanted, {"X-Constellation-Ignored": _listed(unused)} if unused else {}

    def _admit(self, visit: Visit, answers: int, most_tokens: int) -> Ticket:
        ticket = self.admission.admit(visit.key, time.monotonic_ns(), answers, most_tokens)
        return self._refuse(ticket) if isinstance(ticket, Refused) else ticket

    def _refuse(self, refusal: Refused) -> NoReturn:
        self.metrics.refused(refusal.code)
        raise Refusal(refusal.message, None, refusal.code, refusal.status, refusal.headers)


def _json(reply: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(reply), 200, headers, "application/json")


def _left(visit: Visit) -> Response:
    """For the log; nobody is there to read it."""
    visit.left = True
    return Response(status_code=CLIENT_LEFT)


def _listed(names: Sequence[str]) -> str:
    """Names in a header: what cannot stand in one is escaped, and a list without end is cut."""
    return ", ".join(ascii(name)[1:-1].replace(",", "\\x2c")[:64] for name in names[:32])
