"""Text is told while a turn is under way; looks, tokens and texts are those of turns that are told at their end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Config
from constellation.config import Router as RouterConfig
from constellation.decoding.sample import Sampling
from constellation.errors import RunError
from constellation.roster import OCEAN
from router.answer.concurrency import Post
from router.answer.local import LocalKernels
from router.answer.packet import Packet
from router.answer.query import Ask, Piece, QueryLife, ReadCall, Turn
from router.answer.service import Answer, Service
from router.answer.turn import SOON_TOKENS, Answerer, Ear
from router.app import make_app
from router.decide.fit import fit
from router.decide.policy import FIRST
from tests.asking import answers, untimed
from tests.cases import KERNEL, NAMES, READ, TOKENIZER, models
from tests.listening import listening

CONFIG = Config(kernel=KERNEL, router=RouterConfig(bins=512, dims=8, every=64, max_prefix=256, hysteresis=0.0))
POLICY = fit(READ, CONFIG.router, seed=0, names=NAMES, validation=READ)
PATIENCE_S = 60.0
MODELS = models()


def local() -> LocalKernels:
    return LocalKernels(MODELS, TOKENIZER)


def plain(ask: Ask) -> Answer:
    """The answer of a service that hears of nothing before a turn has ended."""
    (answer,) = answers(Service(CONFIG, POLICY, TOKENIZER, local()), [ask])
    return answer


HOW = [
    {"seed": 1}, {"seed": 2, "top_p": 0.9, "logprobs": 2}, {"temperature": 0.0},
    {"seed": 3, "stop": ("e", "o ", "the ")},
    {"seed": 4, "stop": ("a", "in", "fox j"), "min_tokens": 30}, {"seed": 5, "ignore_eos": True, "temperature": 3.0},
    {"seed": 6, "stop_token_ids": tuple(range(40, 60))},
]  # fmt: skip
ASKS = [
    Ask(prompt, Sampling(**{"max_new_tokens": 70, **how}), mode, 2)  # type: ignore[arg-type]
    for mode, prompt in (("route", "the quick brown fox number"), (OCEAN, "x"), ("heart", ""), ("mixture", "def f(x):"))
    for how in HOW
]


# -- a life that is told of its turns ----------------------------------------------------------------------------------


def told_life(ask: Ask, cuts: list[int], again: bool) -> tuple[list[Piece], Answer]:
    """Drives a life, telling it of each turn's tokens but the last in pieces of the given sizes, or twice."""
    life, kernels, results, pieces = QueryLife(0, ask, POLICY, TOKENIZER, CONFIG), local(), None, list[Piece]()
    steps, at = life.live(), 0
    while True:
        try:
            step = steps.send(results)
        except StopIteration as end:
            return pieces, untimed(end.value)
        results = None
        if isinstance(step, Piece):
            pieces.append(step)
            continue
        results = []
        for call in step:
            if not isinstance(call, Turn):
                assert isinstance(call, ReadCall)
                results.append(kernels.answerer(call.kernel).submit_log_probs([call.window], call.tail).result()[0])
                continue
            after = kernels.answerer(call.kernel).begin(call.packet, call.budget_bytes).result()
            count = 0 if call.draft else after.position - call.packet.position - 1
            first = call.packet.position
            new, scores = after.tokens[len(after.tokens) - count - 1 :], after.logprobs or ()
            for _ in range(1 + again):
                done = 0
                while done < count:
                    size = min(cuts[at % len(cuts)], count - done)
                    life.hear(first + done, new[done : done + size], scores[done : done + size])
                    done, at = done + size, at + 1
                    if piece := life.tell():
                        pieces.append(piece)
            results.append(after)


@given(st.integers(0, len(ASKS) - 1), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60)
def test_in_whatever_pieces_a_turn_is_told_the_answer_is_the_same(which: int, cuts: list[int], again: bool) -> None:
    pieces, answer = told_life(ASKS[which], cuts, again)
    assert answer == plain(ASKS[which])
    assert "".join(p.text for p in pieces) == answer.text
    assert tuple(t for p in pieces for t in p.token_ids) == answer.token_ids
    wanted = ASKS[which].sampling.logprobs is not None
    assert all((p.logprobs is not None and len(p.logprobs) == len(p.token_ids)) == wanted for p in pieces)
    data = TOKENIZER.decode(answer.token_ids)
    for move in answer.hand_offs:  # where turns of 16 and 64 bytes end, whoever listens
        assert data and move.at_bytes in [look.at_bytes for look in answer.looks]


def test_a_text_ends_at_the_stop_that_ended_it_not_at_one_that_min_tokens_let_pass() -> None:
    stops, found = tuple("etaoinshr dlu"), 0
    for seed in range(12):
        how = Sampling(seed=seed, max_new_tokens=80, min_tokens=30, stop=stops, ignore_eos=True)
        answer = plain(Ask("the quick brown", how, "heart"))
        before = TOKENIZER.decode(answer.token_ids[:-1]).decode("utf-8", "replace").rstrip("\ufffd")
        assert answer.text.startswith(before)
        found += answer.finish_reason == "stop" and any(stop in before for stop in stops)
    assert found


def test_a_turn_that_is_taken_again_with_other_tokens_is_an_error_and_not_another_text() -> None:
    life = QueryLife(0, Ask("x", Sampling(seed=1), "heart"), POLICY, TOKENIZER, CONFIG)
    steps = life.live()
    (call,) = next(steps)  # type: ignore[misc]
    assert isinstance(call, Turn)
    after = local().answerer("heart").begin(call.packet, call.budget_bytes).result()
    life.hear(0, (after.tokens[-after.position] + 1,))
    with pytest.raises(RunError, match="other tokens"):
        steps.send([after])


# -- a turn that is listened to ----------------------------------------------------------------------------------------


def test_an_ear_hears_all_tokens_but_the_last_ones_a_few_at_a_time() -> None:
    answerer, told = Answerer(MODELS["heart"], TOKENIZER), list[tuple[int, tuple[int, ...], int]]()
    packet = Packet(
        "7",
        "heart",
        (0, *TOKENIZER.encode("the quick")),
        Sampling(seed=3, max_new_tokens=60, logprobs=1, ignore_eos=True),
    )

    def ear(first: int, tokens: tuple[int, ...], scores: tuple[Any, ...]) -> None:
        told.append((first, tokens, len(scores)))

    after = answerer.begin(packet, 10**9, ear).result(timeout=PATIENCE_S)
    assert all(0 < len(tokens) <= SOON_TOKENS and scores == len(tokens) for _, tokens, scores in told)
    heard = [t for _, tokens, _ in told for t in tokens]
    assert [first for first, _, _ in told] == [sum(len(t) for _, t, _ in told[:i]) for i in range(len(told))]
    assert heard == list(after.tokens[-60:])[: len(heard)] and 60 - SOON_TOKENS <= len(heard) < 60
    assert after == answerer.begin(packet, 10**9).result()


def test_what_is_posted_while_the_loop_is_busy_arrives_together_and_in_order() -> None:
    async def go() -> tuple[list[int], int]:
        loop, heard, wakes = asyncio.get_running_loop(), list[int](), 0
        post, deliver = Post(loop), Post._deliver

        def counted() -> None:
            nonlocal wakes
            wakes += 1
            deliver(post)

        post._deliver = counted  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: [post(lambda i=i: heard.append(i)) for i in range(500)])  # type: ignore[misc]
        thread.start()
        thread.join()  # the loop is busy
        async with asyncio.timeout(PATIENCE_S):
            while len(heard) < 500:
                await asyncio.sleep(0)
        return heard, wakes

    assert asyncio.run(go()) == (list(range(500)), 1)


# -- over a socket -----------------------------------------------------------------------------------------------------


class Held(LocalKernels):
    """Kernels whose turns of more than `FIRST` bytes end when they are let."""

    def __init__(self) -> None:
        super().__init__(MODELS, TOKENIZER)
        self.let, self.before = threading.Event(), 10**9  # tokens of the answer before the first such turn

    async def turn(self, kernel: str, packet: Packet, budget_bytes: int, ear: Ear | None = None) -> Packet:
        if budget_bytes > FIRST:
            self.before = min(self.before, packet.position)
        after = await super().turn(kernel, packet, budget_bytes, ear)
        while budget_bytes > FIRST and not self.let.is_set():
            await asyncio.sleep(0.01)
        return after


@contextlib.contextmanager
def serving(kernels: LocalKernels) -> Iterator[str]:
    with listening(make_app(Service(CONFIG, POLICY, TOKENIZER, kernels))) as url:
        yield url


BODY = {"max_tokens": 60, "seed": 5, "ignore_eos": True, "logprobs": 1, "return_token_ids": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip


@pytest.mark.parametrize("mode", ["route", OCEAN, "heart"])
def test_text_is_there_before_its_turn_has_ended(mode: str) -> None:
    """Before it has 64 bytes: the first turn of 64 is not let end before some of its text has come."""
    kernels = Held()
    ask = {**BODY, "prompt": "the quick brown fox number " * 3, "mode": mode}
    kernels.let.set()
    with serving(kernels) as url, httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        whole = client.post("/v1/completions", json={k: v for k, v in ask.items() if k != "stream_options"}).json()
        kernels.let.clear()
        chunks: list[dict[str, Any]] = []
        with client.stream("POST", "/v1/completions", json={**ask, "stream": True}) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    if line:
                        assert line == "data: [DONE]"
                    continue
                chunks.append(json.loads(line.removeprefix("data: ")))
                if (chunks[-1].get("usage") or {}).get("completion_tokens", 0) > kernels.before:
                    kernels.let.set()
    text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
    tokens = [t for c in chunks if c["choices"] for t in c["choices"][0].get("token_ids", [])]
    (choice,) = whole["choices"]
    assert text == choice["text"] and tokens == choice["token_ids"]
    scores = [
        p
        for c in chunks
        if c["choices"] and c["choices"][0]["logprobs"]
        for p in c["choices"][0]["logprobs"]["token_logprobs"]
    ]
    assert scores == choice["logprobs"]["token_logprobs"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    told = next(c["constellation"] for c in reversed(chunks) if "looks" in c.get("constellation", {}))
    for same in ("looks", "hand_offs", "kernels", "certificate"):
        assert told[same] == whole["constellation"][same]


def test_who_leaves_in_the_middle_of_a_turn_frees_the_slot() -> None:
    async def leave() -> None:
        kernels = Held()
        made = Service(CONFIG, POLICY, TOKENIZER, kernels)
        steps = made.stream(Ask("x", Sampling(seed=1, max_new_tokens=100_000, ignore_eos=True), "heart"))
        assert isinstance(await anext(steps), Piece)  # of a turn that does not end
        await steps.aclose()
        async with asyncio.timeout(PATIENCE_S):
            while any(load["active"] for load in (await made.health())["kernels"].values()):
                await asyncio.sleep(0.01)
        assert (await made.health())["requests"] == 0

    asyncio.run(leave())
