"""The service without HTTP: many at once, and what it frees when it is left."""

import asyncio
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from constellation.config import Config
from constellation.config import Router as RouterConfig
from constellation.decoding.batch import Prefill
from constellation.decoding.sample import Sampling
from constellation.errors import ConfigError, RunError
from constellation.roster import OCEAN
from router.answer import scoring
from router.answer.concurrency import Room
from router.answer.local import LocalKernels
from router.answer.packet import Packet
from router.answer.service import Answer, Ask, Service, numbered
from router.decide.fit import fit
from tests.asking import answers, streams, untimed, whole
from tests.cases import KERNEL, NAMES, READ, TOKENIZER, models

CONFIG = Config(kernel=KERNEL, router=RouterConfig(bins=512, dims=8, every=32, max_prefix=256, hysteresis=0.05))
POLICY = fit(READ, CONFIG.router, seed=0, names=NAMES, validation=READ)
MODELS = models()


def service() -> Service:
    return Service(CONFIG, POLICY, TOKENIZER, LocalKernels(MODELS, TOKENIZER))


ASKS = [
    Ask("the quick brown fox number", Sampling(seed=1, max_new_tokens=60)),
    Ask("def f(x):", Sampling(seed=2, max_new_tokens=90, top_p=0.9), measure=True),
    Ask("GENESIS", Sampling(temperature=0, max_new_tokens=70)),
    Ask("x", Sampling(seed=3, max_new_tokens=40), mode="memory"),
    Ask("", Sampling(seed=4, max_new_tokens=40), mode=OCEAN),
]


def test_many_at_once_streamed_or_not_get_the_answers_of_each_alone() -> None:
    expected = [one for ask in ASKS for one in answers(service(), [ask])]
    assert answers(service(), ASKS) == expected
    found = streams(service(), ASKS)
    assert [untimed(answer) for _, answer in found] == expected
    assert any(a.hand_offs for a in expected) and all(h.bits_lost is not None for h in expected[1].hand_offs)
    for pieces, answer in found:
        assert "".join(p.text for p in pieces) == answer.text
        assert tuple(t for p in pieces for t in p.token_ids) == answer.token_ids


def test_tokens_of_a_text_are_asked_like_the_text() -> None:
    text = ASKS[0].prompt
    assert isinstance(text, str)
    tokens = tuple(TOKENIZER.encode(text))
    asks = [dataclasses.replace(ASKS[0], prompt=prompt) for prompt in (text, tokens, (0, *tokens))]
    as_text, as_tokens, opened = answers(service(), asks)
    assert as_text == as_tokens
    assert opened.token_ids == as_text.token_ids and opened.prompt_tokens == len(tokens) + 1


def test_several_answers_to_one_question_differ_and_can_be_repeated() -> None:
    asks = [numbered(ASKS[0], i) for i in range(4)]
    assert asks[0] == ASKS[0] and [ask.sampling.index for ask in asks] == [0, 1, 2, 3]
    texts = [asyncio.run(whole(service(), ask))[1].text for ask in asks]
    assert len(set(texts)) == 4
    assert asyncio.run(whole(service(), numbered(ASKS[0], 2)))[1].text == texts[2]


@pytest.mark.parametrize("mode", ["route", OCEAN, "heart"])
def test_a_text_is_scored_token_by_token_as_whole_forward_passes_do(mode: str) -> None:
    tokens = TOKENIZER.encode("the quick brown fox jumps over GENESIS 1:1 number")[:40]
    scored = asyncio.run(service().score(tokens, mode, top=3))
    assert len(scored) == len(tokens)
    bias = torch.zeros(336)
    bias[[i for i in range(1, 336) if i < 16 or i >= TOKENIZER.vocab_size]] = float("-inf")
    trajectory = POLICY.trajectories([TOKENIZER.decode(tokens)], 32)[0]
    before = np.cumsum([0, *(len(TOKENIZER.token_bytes[t]) for t in tokens)])
    for i, one in enumerate(scored):
        assert one is not None
        name = mode
        if mode == "route":
            seen = int((trajectory.at_bytes <= before[i]).sum())
            from router.decide.policy import decide, kernel_name

            name = kernel_name(NAMES, int(decide(trajectory, 0.05)[seen - 1])) if seen else OCEAN
        with torch.no_grad():
            log_p = torch.log_softmax(MODELS[name](torch.tensor([[0, *tokens[:i]]]))[0, -1] + bias, -1)
        assert one.log_prob == pytest.approx(float(log_p[tokens[i]]), abs=1e-4)
        assert [t for t, _ in one.top] == log_p.topk(3).indices.tolist()
        assert (one.log_prob == max(p for _, p in one.top)) == (tokens[i] == int(log_p.argmax()))


def test_every_mode_scores_a_text_as_the_evaluation_does() -> None:
    """Oracle: router/decide/evaluate.py on a table of what each kernel says of each token."""
    from router.decide.evaluate import Scores, answers

    tokens = [*TOKENIZER.encode("the quick brown fox number def f(x): GENESIS 1:1 number GENESIS 1:1 " * 4), 0]
    made = service()

    def nats(mode: str, top_k: int = 3) -> np.ndarray:
        return np.array([-one.log_prob for one in asyncio.run(made.score(tokens, mode, top_k=top_k)) if one])

    sizes = np.array([len(TOKENIZER.token_bytes[t]) for t in tokens])
    table = Scores(
        NAMES, nats(OCEAN), np.stack([nats(n) for n in NAMES]), np.zeros(len(tokens), np.int64),
        np.cumsum(sizes) - sizes, np.array([sizes.sum()]), (None,),
    )  # fmt: skip
    expected = answers(table, POLICY.trajectories([TOKENIZER.decode(tokens)], 32), 0.05, (2, 3))
    np.testing.assert_allclose(nats("route"), expected["routed"], atol=1e-5)
    for k in (2, 3):
        np.testing.assert_allclose(nats("mixture", k), expected[f"mixture_{k}"], atol=1e-5)
    np.testing.assert_allclose(nats("barycenter", 1), nats("mixture", 1), atol=1e-5)
    assert not np.array_equal(nats("barycenter", 3), nats("mixture", 3))


def test_the_first_token_is_not_scored_when_it_is_the_end_of_another_text() -> None:
    with_end = asyncio.run(service().score([0, 40, 41], "heart"))
    assert with_end[0] is None and with_end[1:] == asyncio.run(service().score([40, 41], "heart"))
    assert asyncio.run(service().score([0], "heart")) == [None] and asyncio.run(service().score([], "heart")) == []


def test_a_long_text_is_scored_in_windows_that_see_half_a_context_at_least() -> None:
    tokens = TOKENIZER.encode("the quick brown fox jumps over the lazy dog " * 30)[:200]
    scored = asyncio.run(service().score(tokens, "heart"))
    assert len(scored) == 200
    cache = [0, *tokens]
    for i in (0, 63, 64, 95, 96, 150, 199):
        first = 0 if i < 64 else (i - 64) // 32 * 32 + 32
        assert i - first >= 32 or first == 0
        with torch.no_grad():
            logits = MODELS["heart"](torch.tensor([cache[first : i + 1]]))[0, -1]
        logits[[j for j in range(1, 336) if j < 16 or j >= TOKENIZER.vocab_size]] = float("-inf")
        assert scored[i].log_prob == pytest.approx(float(torch.log_softmax(logits, -1)[tokens[i]]), abs=1e-4)  # type: ignore[union-attr]


def test_a_decision_is_the_normalised_probability_of_each_answer() -> None:
    made, prompt, answers = service(), "the quick brown", [" fox", " dog, naïve", "="]
    found, told = asyncio.run(made.decide(prompt, answers, "heart"))
    assert (told.kernels, told.text, told.mode) == (("heart",), "", "heart")
    tokens = [TOKENIZER.encode(a) for a in answers]
    assert len({len(t) for t in tokens}) > 1
    sums = [
        sum(s.log_prob for s in asyncio.run(made.score([*TOKENIZER.encode(prompt), *t], "heart"))[-len(t) :])  # type: ignore[union-attr]
        for t in tokens
    ]
    expected = np.exp(sums) / np.exp(sums).sum()
    assert sum(found) == pytest.approx(1) and found == pytest.approx(list(expected), rel=1e-4)
    for wrong in ([], ["a", "a"], ["a", ""]):
        with pytest.raises(ConfigError, match="answers:"):
            asyncio.run(made.decide(prompt, wrong))


def test_a_question_that_cannot_be_answered_is_refused_before_anything_is_decoded() -> None:
    for ask, wanted in (
        (Ask("x", mode="hart"), "'hart'"),
        (Ask((1, 9999)), "9999 is no token"),
        (Ask("x", Sampling(stop=("long" * 200,))), "stop texts are too long"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            service().check(ask)


def test_the_service_lists_its_models_and_explains_a_route() -> None:
    made = service()
    assert made.models() == ["constellation", *(f"constellation/{n}" for n in (OCEAN, *NAMES))]
    found = made.explain("def f(x): number")
    assert found["kernel"] == POLICY.route([b"def f(x): number"])[0].kernel and found["router_hash"] == POLICY.hash


def test_who_leaves_is_taken_out_of_the_batch() -> None:
    """An answer that would take minutes is left: its slot is free at once, and the next question is answered."""
    endless = Ask("the quick brown fox number", Sampling(seed=1, max_new_tokens=100_000, ignore_eos=True))

    async def leave() -> None:
        made = service()
        steps = made.stream(endless)
        await anext(steps)
        left = asyncio.create_task(anext(steps))
        await asyncio.sleep(0)
        assert (await made.health())["requests"] == 1
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await steps.aclose()
        while any(load["active"] for load in (await made.health())["kernels"].values()):
            await asyncio.sleep(0.01)
        assert (await made.health())["requests"] == 0
        assert (await whole(made, ASKS[0]))[1].text

    asyncio.run(leave())


class Held:
    """A service whose kernel `heart` is inside a step until `release()`."""

    def __init__(self) -> None:
        local = LocalKernels(MODELS, TOKENIZER)
        self.service = Service(CONFIG, POLICY, TOKENIZER, local)
        self.engine = local.answerer("heart").engine
        self.inside, self.may_go = threading.Event(), threading.Event()
        self.engine.submit([Prefill(tokens=[0], first=0, emit=self._hold)], lambda: None)
        self.inside.wait()

    def _hold(self, at: int, logits: Any) -> None:
        self.inside.set()
        self.may_go.wait()

    async def submitted(self, works: int) -> None:
        """Returns when so many works wait for the kernel."""
        while len(self.engine._news) < works:
            await asyncio.sleep(0)

    async def release(self) -> dict[str, Any]:
        """What the kernel has done once it has nothing to do."""
        self.may_go.set()
        while not self.engine.batch.idle or self.engine._news:
            await asyncio.sleep(0.01)
        return self.engine.stats()


ANSWERS = [f"{a} {b}" for a in ("fox", "dog", "cat") for b in range(80)]


@pytest.mark.parametrize(
    ("leave", "works"),
    [
        (lambda made: made.decide("the quick", ANSWERS, "heart"), len(ANSWERS)),
        (lambda made: made.score(TOKENIZER.encode("the quick brown fox " * 40), "heart"), 2),
        (lambda made: anext(made.stream(Ask("the quick", Sampling(max_new_tokens=9), "heart"))), 1),
    ],
    ids=["decide", "score", "stream"],
)
def test_whatever_is_left_leaves_no_work_in_the_kernel(leave: Any, works: int) -> None:
    async def go() -> None:
        held = Held()
        task = asyncio.ensure_future(leave(held.service))
        await held.submitted(works)
        assert (await held.service.health())["requests"] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await held.service.health())["requests"] == 0
        done = await held.release()
        assert (done["prompt_tokens"], done["tokens"]) == (1, 0)  # what held it, and nothing else

    asyncio.run(go())


def test_two_requests_of_one_name_are_two_requests() -> None:
    """The name is the client's: whoever calls his own like another's and leaves takes nothing from that one."""
    ask = Ask("the quick", Sampling(seed=1, max_new_tokens=40), "heart", request="mine")

    async def go() -> Answer:
        held = Held()
        stays, leaves = (asyncio.ensure_future(whole(held.service, ask)) for _ in range(2))
        await held.submitted(2)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        await held.release()
        return (await stays)[1]

    found = asyncio.run(go())
    assert found.request == "mine"
    assert untimed(found) == untimed(asyncio.run(whole(service(), ask))[1])


class Weighed(LocalKernels):
    """Kernels that count the log-probabilities they are asked for, in bytes."""

    def __init__(self) -> None:
        super().__init__(MODELS, TOKENIZER)
        self.under_way, self.most, self.calls = 0, 0, 0

    async def log_probs(self, kernel: str, windows: Sequence[Sequence[int]], tail: int) -> Any:
        size = len(windows) * tail * KERNEL.vocab_size * 4
        self.under_way, self.calls = self.under_way + size, self.calls + 1
        self.most = max(self.most, self.under_way)
        try:
            return await super().log_probs(kernel, windows, tail)
        finally:
            self.under_way -= size


def test_answers_times_length_times_kernels_times_vocabulary_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one kernel only scores are sent; of several as many log-probabilities at once as there is room for."""
    text = TOKENIZER.encode("the quick brown fox number def f(x): GENESIS 1:1 number " * 3)

    async def asked(made: Service, mode: str) -> list[Any]:
        return await asyncio.gather(
            *(made.decide("def f(x):", ANSWERS[i::6], mode) for i in range(6)),
            *(made.score(text, mode) for _ in range(3)),
            *(whole(made, Ask("def f(x): number", Sampling(seed=i, max_new_tokens=8), mode)) for i in range(3)),
        )

    def plain(found: list[Any]) -> list[Any]:
        return [*(p for p, _ in found[:6]), *found[6:9], *(answer.token_ids for _, answer in found[9:])]

    for mode in ("heart", "mixture"):
        free, kernels = Weighed(), Weighed()
        expected = asyncio.run(asked(Service(CONFIG, POLICY, TOKENIZER, free), mode))
        row = KERNEL.vocab_size * 4
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "PIECE_BYTES", 9 * row)
            patch.setattr(scoring, "HELD_BYTES", 30 * row)
            found = asyncio.run(asked(Service(CONFIG, POLICY, TOKENIZER, kernels), mode))
        assert plain(found) == plain(expected)
        if mode == "heart":
            assert kernels.calls == free.calls == 0
        else:
            # a draft and what follows it is one call, however long: at most FIRST bytes and one more, from 3 kernels
            assert 0 < kernels.most <= max(30, 3 * 17) * row < free.most
            assert kernels.calls > free.calls


def test_room_is_given_in_order_and_never_twice() -> None:
    async def go() -> None:
        room, inside, order = Room(10), 0, []

        async def stay(name: int, amount: int, leave: asyncio.Event) -> None:
            nonlocal inside
            async with room.of(amount):
                order.append(name)
                inside += min(amount, 10)
                assert inside <= 10
                await leave.wait()
                inside -= min(amount, 10)

        events = [asyncio.Event() for _ in range(6)]
        amounts = (6, 5, 4, 99, 1, 0)
        tasks = [asyncio.ensure_future(stay(i, amount, events[i])) for i, amount in enumerate(amounts)]

        async def now() -> list[int]:
            for _ in range(9):
                await asyncio.sleep(0)
            return order

        assert await now() == [0]  # 4 would fit 2, but 1 came first
        tasks[1].cancel()
        assert await now() == [0, 2]
        events[2].set()
        events[0].set()
        assert await now() == [0, 2, 3]  # more than all of it: alone
        tasks[3].cancel()
        assert await now() == [0, 2, 3, 4, 5]
        for event in events:
            event.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert room.free == 10

    asyncio.run(go())


def test_an_error_of_a_kernel_ends_the_stream_with_its_reason() -> None:
    class Broken(LocalKernels):
        async def turn(self, *call: object) -> Packet:
            raise RunError("heart's logits are not finite")

    async def ask() -> None:
        made = Service(CONFIG, POLICY, TOKENIZER, Broken(MODELS, TOKENIZER))
        with pytest.raises(RunError, match="not finite"):
            await whole(made, ASKS[0])
        assert (await made.health())["requests"] == 0

    asyncio.run(ask())
