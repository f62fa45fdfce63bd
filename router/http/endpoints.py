"""What answers the paths: a request is read and checked (requests.py), counted and let in (limits.py), made, answered.

A client that leaves takes its work with it, also while its reply is not streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.answer.concurrency import together
from router.answer.encoding import beside, encoded
from router.answer.service import Answer, Piece, Service
from router.http import responses
from router.http.chat import JINJA
from router.http.constrained import allowed, chosen, nothing
from router.http.failures import error_json, refusal_of
from router.http.limits import Admission, Refused
from router.http.metrics import CLIENT_LEFT, Metrics
from router.http.middleware import Middleware, Visit, ending
from router.http.render import ChatRender, CompletionRender, Render, Steps
from router.http.requests import (
    Addressed,
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    DetokenizeRequest,
    Generation,
    Refusal,
    RouteRequest,
    TokenizeRequest,
    check_kind,
    read,
)
from router.http.responses import Names, Scored
from router.http.sse import EventStream, error_event, first_of, while_connected
from router.http.translate import asked, text, tokens, wanted_of, who

R = TypeVar("R", bound=Addressed)
G = TypeVar("G", bound=Generation)
P = TypeVar("P")
_TOGETHER = 16  # prompts that are scored at once, so that others have their turn


class Stay:
    """A request that was let in."""

    def __init__(self, reserve: Callable[[int], None]):
        self.leave, self.tokens = contextlib.ExitStack(), 0
        self.used: Callable[[], int] = lambda: self.tokens  # when it leaves
        self._reserve = reserve

    def reads(self, tokens: int) -> None:
        """It reads so many tokens more; Refusal when it may not."""
        self._reserve(tokens)
        self.tokens += tokens

    def goes_on(self) -> contextlib.ExitStack:
        """What ends it, when that is not the end of the block."""
        self.leave = self.leave.pop_all()
        return self.leave


class Endpoints:
    """What answers the paths; its gate is set by whoever puts one before it."""

    gate: Middleware

    def __init__(self, service: Service, admission: Admission, metrics: Metrics):
        self.service, self.admission, self.metrics = service, admission, metrics

    # -- text

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, CompletionRender)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, ChatRender)

    async def _generate(self, request: Request, kind: type[G], tells: Callable[..., Render]) -> Response:
        told, headers = await self._read(request, kind)
        visit, wanted = Visit.of(request), wanted_of(told, self.service)
        request_id = told.request_id or visit.request_id
        with self._let_in(visit, wanted.answers, told.most_tokens * wanted.answers, wanted.biases) as stay:
            visit.watch.mode = wanted.mode
            texts = await allowed(told)
            among = await encoded(self.service.tokenizer, texts or ())
            ask = await asked(wanted, told, self.service, request_id)
            choice = len(set(ask.prompts)) * sum(map(len, among))
            stay.reads(ask.prompt_tokens * ask.made + choice)
            steps: list[Steps]
            if texts is not None:
                steps = chosen(self.service, ask.asks, texts, among)
            elif told.most_tokens == 0:
                steps = [nothing(one) for one in ask.asks]
            else:
                steps = [self.service.stream(one) for one in ask.asks]
            render = tells(told, ask, self.service, request_id)
            render.heard = self._hearing(visit)
            stay.used = lambda: render.usage().total_tokens + choice
            if not told.stream:
                reply = await while_connected(self._whole(render, steps), request.receive)
                return _left(visit) if reply is None else _json(reply, headers)
            leave = stay.goes_on()
            events = await while_connected(first_of(self._events(visit, render, steps, leave)), request.receive)
            if events is None:
                leave.close()  # a second time, unless it was left before it began
                return _left(visit)
            return EventStream(events, headers, visit)

    def _hearing(self, visit: Visit) -> Callable[[int, Piece | Answer], None]:
        def heard(stream: int, step: Piece | Answer) -> None:
            if isinstance(step, Answer):
                self.metrics.answered(step)
            else:
                visit.watch.piece(step.kernel, len(step.token_ids), stream)

        return heard

    async def _whole(self, render: Render, steps: Sequence[Steps]) -> responses.Reply:
        await self._score(render)
        return await render.whole(steps)

    async def _events(
        self, visit: Visit, render: Render, steps: Sequence[Steps], leave: contextlib.ExitStack
    ) -> AsyncGenerator[bytes, None]:
        begun = False
        with leave:
            try:
                await self._score(render)
                async with contextlib.aclosing(render.stream(steps)) as events:
                    async for data in events:
                        begun = True
                        yield data
            except Exception as error:
                if not begun:
                    raise
                refusal = refusal_of(error)
                visit.failed = refusal.http_status
                yield error_event(error_json(refusal))

    async def _score(self, render: Render) -> None:
        """Log-probabilities of the prompts, if they are echoed with theirs; a first token has none."""
        wanted = render.request
        if not isinstance(wanted, CompletionRequest) or not wanted.echo or wanted.logprobs is None:
            return
        prompts, mode, top, top_k = render.asked.prompts, render.asked.mode, wanted.logprobs, wanted.top_kernels
        different, by_prompt = list(dict.fromkeys(p for p in prompts if p)), dict[tuple[int, ...], Any]()
        for at in range(0, len(different), _TOGETHER):
            some = different[at : at + _TOGETHER]
            found = await together([self.service.score(p, mode, top, top_k) for p in some])
            by_prompt |= zip(some, found)
        for told in render.rendered:
            told.prompt_scored = [
                Scored(token, None if i == 0 or one is None else one.log_prob, () if one is None else one.top)
                for i, (token, one) in enumerate(zip(told.prompt, by_prompt.get(told.prompt, ())))
            ]

    # -- decisions, tokens, routes

    async def decisions(self, request: Request) -> Response:
        wanted, headers = await self._read(request, DecisionRequest)
        mode, visit = who(wanted, self.service), Visit.of(request)
        texts = [one if isinstance(one, str) else msgspec.json.encode(one).decode() for one in wanted.answers]
        with self._let_in(visit) as stay:
            visit.watch.mode = mode
            (prompt,) = await tokens([text(wanted)], wanted, self.service)
            among = await encoded(self.service.tokenizer, texts)
            stay.reads(len(prompt) + sum(map(len, among)))
            work = self.service.decide(prompt, among, mode, wanted.top_kernels)
            decided = await while_connected(work, request.receive)
        if decided is None:
            return _left(visit)
        p, told = decided
        decision = responses.Decision(
            id=f"decision-{wanted.request_id or visit.request_id}", created=int(time.time()),
            model=wanted.model or self.service.name, choice=wanted.answers[p.index(max(p))],
            probabilities=[responses.Probability(answer, one) for answer, one in zip(wanted.answers, p)],
            usage=responses.Usage.of(len(prompt), 0), constellation=responses.telemetry(told),
        )  # fmt: skip
        return _json(decision, headers)

    async def tokenize(self, request: Request) -> Response:
        wanted, headers = await self._read(request, TokenizeRequest)
        who(wanted, self.service)
        said, names = text(wanted), Names(self.service.tokenizer)
        with self._let_in(Visit.of(request)) as stay:
            # the name of a special token, and nothing else, is that token: how clients learn its id
            named = [token for token, name in self.service.tokenizer.specials.items() if name == said]
            (ids,) = [named] if named else await encoded(self.service.tokenizer, [said])
            stay.reads(len(ids))
            strings = await beside(len(ids), _each, names, ids) if wanted.return_token_strs else None
            return _json(responses.Tokens(len(ids), self.service.config.kernel.context, ids, strings), headers)

    async def detokenize(self, request: Request) -> Response:
        wanted, headers = await self._read(request, DetokenizeRequest)
        who(wanted, self.service)
        with self._let_in(Visit.of(request)) as stay:
            stay.reads(len(wanted.tokens))
            data = await beside(len(wanted.tokens), self.service.tokenizer.decode, wanted.tokens)
            return _json(responses.Prompt(data.decode("utf-8", "replace")), headers)

    async def tokenizer_info(self) -> Response:
        tokenizer = self.service.tokenizer
        eos = tokenizer.specials[tokenizer.eos]
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
        said = text(wanted)
        with self._let_in(Visit.of(request)) as stay:
            (ids,) = await encoded(self.service.tokenizer, [said])
            stay.reads(len(ids))
            return _json(await asyncio.to_thread(self.service.explain, said), headers)

    async def models(self) -> Response:
        return _json(responses.Models([self._model(name) for name in self.service.models()]))

    async def model(self, model: str) -> Response:
        if not model:
            raise Refusal("GET /v1/models, without a slash, lists the models", "model", "model_not_found", 404)
        who(Addressed(model=model), self.service)
        return _json(self._model(model))

    def _model(self, name: str) -> responses.Model:
        return responses.Model(id=name, created=self.service.created, max_model_len=self.service.config.kernel.context)

    # -- operation

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok", **await self._load(request)})

    async def ready(self, request: Request) -> Response:
        if self.gate.closed:
            raise ending()
        return _json({"status": "ready", **await self._load(request)})

    async def scrape(self, request: Request) -> Response:
        if not Visit.of(request).key.metrics:
            raise Refusal(
                "this key does not open the metrics, which tell how much all keys use; one made by "
                "constellation keys add --metrics does", code="insufficient_permissions", status=403,
            )  # fmt: skip
        body, kind = self.metrics.render((await self.service.health())["kernels"])
        return Response(body, headers={"content-type": kind})

    async def _load(self, request: Request) -> dict[str, Any]:
        """How busy the service is, for those who may know."""
        if not Visit.of(request).key.metrics:
            return {}
        load = await self.service.health()
        return {"requests": load["requests"], "kernels": load["kernels"]}

    # -- what all have in common

    async def _read(self, request: Request, kind: type[R]) -> tuple[R, dict[str, str]]:
        """The request's body, checked, and the header that names what of it was not used."""
        headers, key = request.headers, Visit.of(request).key
        check_kind(headers.get("content-type", ""), headers.get("content-encoding", ""))
        self._passed(self.admission.hears(key, time.monotonic_ns()))
        length = headers.get("content-length", "")
        body = self._passed(await self.admission.body(request.stream(), int(length) if length.isdecimal() else None))
        try:
            wanted, unused = read(body, kind)
        except Refusal:
            self.admission.charge(key, time.monotonic_ns())
            raise
        return wanted, {"X-Constellation-Ignored": _listed(unused)} if unused else {}

    @contextlib.contextmanager
    def _let_in(self, visit: Visit, answers: int = 1, tokens: int = 0, biases: int = 0) -> Iterator[Stay]:
        """A request is let in, or refused, and leaves with the block."""
        key = visit.key
        ticket = self._passed(self.admission.admit(key, time.monotonic_ns(), answers, tokens, biases))
        stay = Stay(lambda more: self._passed(ticket.more(more, time.monotonic_ns())))
        stay.leave.callback(lambda: ticket.leave(stay.used(), time.monotonic_ns()))
        with stay.leave:
            yield stay

    def _passed(self, found: P | Refused) -> P:
        """What is no refusal."""
        if not isinstance(found, Refused):
            return found
        self.metrics.refused(found.code)
        raise Refusal(found.message, None, found.code, found.status, found.headers)


def _json(reply: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(reply), 200, headers, "application/json")


def _each(names: Names, ids: Iterable[int]) -> list[str]:
    return [names(i) for i in ids]


def _left(visit: Visit) -> Response:
    """For the log; nobody is there to read it."""
    visit.left = True
    return Response(status_code=CLIENT_LEFT)


def _listed(names: Sequence[str]) -> str:
    """Names in a header: what cannot stand in one is escaped, and a list without end is cut."""
    return ", ".join(ascii(name)[1:-1].replace(",", "\\x2c")[:64] for name in names[:32])
