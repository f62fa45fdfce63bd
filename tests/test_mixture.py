"""Kernels that answer together: the laws of DEFINITIONS, and drafts that change nothing but the cost."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Config, Kernel
from constellation.config import Router as RouterConfig
from constellation.decoding.sample import RowSettings, Sampling, sample
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM
from constellation.roster import OCEAN
from router.answer.local import LocalKernels
from router.answer.query import Ask
from router.answer.service import Service
from router.decide.mixture import combine, weights
from router.decide.modes import BARYCENTER, MIXED, MIXTURE
from router.decide.policy import RouteChoice
from tests import asking
from tests.cases import NAMES, TOKENIZER

KERNEL = Kernel(vocab_size=336, width=24, layers=2, heads=3, hidden=40, context=48, coupling_ref=8)
CONFIG = Config(kernel=KERNEL, router=RouterConfig(every=24, hysteresis=0.0))


def distributions(seed: int, kernels: int, rows: int = 3, tokens: int = 7) -> np.ndarray:
    p = np.random.default_rng(seed).dirichlet(np.full(tokens, 0.5), (kernels, rows))
    return np.log(np.maximum(p, 1e-30))


# -- the formulas ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from(MIXED))
@settings(max_examples=60)
def test_probabilities_sum_to_one_and_follow_their_formula(seed: int, kernels: int, mode: str) -> None:
    log_p = distributions(seed, kernels)
    w = np.random.default_rng(seed + 1).dirichlet(np.ones(kernels))
    p = np.exp(combine(mode, log_p, w))
    if mode == BARYCENTER:
        expected = np.einsum("k,ktv->tv", w, np.exp(log_p / 2)) ** 2
    else:
        expected = np.einsum("k,ktv->tv", w, np.exp(log_p))
    np.testing.assert_allclose(p, expected / expected.sum(1, keepdims=True), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("mode", MIXED)
def test_one_kernel_is_itself_equal_kernels_are_each_and_what_is_impossible_stays_so(mode: str) -> None:
    log_p = distributions(3, 1)
    log_p[0, :, 2] = -np.inf
    log_p -= np.logaddexp.reduce(log_p, axis=2, keepdims=True)
    for k in (1, 4):
        found = combine(mode, np.repeat(log_p, k, axis=0), np.full(k, 1 / k))
        np.testing.assert_allclose(found, log_p[0], atol=1e-12)
        assert np.isneginf(found[:, 2]).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_the_barycenter_of_two_equals_is_their_frechet_mean(seed: int) -> None:
    """Half the Fisher-Rao distance from each: arccos of sum sqrt(p q), the angle between square roots."""
    log_p = distributions(seed, 2, rows=1)
    middle = combine(BARYCENTER, log_p, [0.5, 0.5])[0]

    def angle(a: np.ndarray, b: np.ndarray) -> float:
        s, t = np.exp(a / 2), np.exp(b / 2)
        return float(2 * np.arctan2(np.linalg.norm(s - t), np.linalg.norm(s + t)))

    whole = angle(log_p[0, 0], log_p[1, 0])
    assert angle(log_p[0, 0], middle) == pytest.approx(whole / 2, abs=1e-9)
    assert angle(log_p[1, 0], middle) == pytest.approx(whole / 2, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 9))
def test_weights_sum_to_one_are_the_largest_and_do_not_know_the_order_of_kernels(
    seed: int, kernels: int, k: int
) -> None:
    random = np.random.default_rng(seed)
    names = [f"k{i}" for i in range(kernels)]
    p = random.dirichlet(np.ones(kernels)).astype(np.float32)
    found = weights(names, p, k)
    assert len(found) == min(k, kernels) and sum(w for _, w in found) == pytest.approx(1, abs=1e-12)
    assert [n for n, _ in found] == sorted(n for n, _ in found)
    assert min(p[names.index(n)] for n, _ in found) >= max(
        [p[names.index(n)] for n in names if n not in dict(found)], default=0
    )
    order = random.permutation(kernels)
    assert weights([names[i] for i in order], p[order], k) == found
    if k >= kernels:
        np.testing.assert_allclose([w for _, w in found], np.float64(p) / np.float64(p).sum(), rtol=1e-9)


# -- answers -----------------------------------------------------------------------------------------------------------


def model(seed: int, spread: float = 0.05) -> KernelLM:
    """Kernels that agree by and large: one is the common part, `spread` its own."""
    made, common = KernelLM(KERNEL, seed=seed), KernelLM(KERNEL, seed=99)
    with torch.no_grad():
        for weight, shared in zip(made.parameters(), common.parameters()):
            weight.copy_(4 * (shared + spread * (weight - shared)) if weight.dim() == 2 else weight)
    return made


MODELS = {name: model(i) for i, name in enumerate((OCEAN, *NAMES), 1)}


class ByteSums:
    """An arbitrary but causal policy: the sum of the last bytes weighs the kernels."""

    def __init__(self, names=NAMES, min_bytes=3):
        self.names, self.min_bytes = tuple(names), min_bytes

    def route(self, texts):
        out = []
        for text in texts:
            score = np.array([np.sin((1 + sum(text[-24:])) * (1 + NAMES.index(n))) for n in self.names])
            p = (np.exp(score) / np.exp(score).sum()).astype(np.float32)
            short = len(text) < self.min_bytes
            index = -1 if short else int(p.argmax())
            nowhere, none = np.full(len(p), np.nan, np.float32), np.zeros(0, np.float32)
            name = OCEAN if short else self.names[index]
            out.append(
                RouteChoice(name, index, p, none, nowhere, max(0, len(text) - 2), short, "", (), (), "sums", 0.0)
            )
        return out

    def trajectories(self, texts, every):
        raise NotImplementedError


class Counted(LocalKernels):
    """Kernels that count how often they are asked, and may be asked in any order."""

    def __init__(self, models=MODELS):
        super().__init__(models, TOKENIZER)
        self.turned = self.read = 0

    async def turn(self, *call):
        self.turned += 1
        return await super().turn(*call)

    async def log_probs(self, *call):
        self.read += 1
        return await super().log_probs(*call)


def ask(prompt="the quick brown fox", mode=MIXTURE, top_k=2, draft=True, **sampling):
    return Ask(prompt, Sampling(**{"max_new_tokens": 60, **sampling}), mode, top_k, draft=draft)


def answers(asks, policy=None, kernels=None):
    return asking.answers(Service(CONFIG, policy or ByteSums(), TOKENIZER, kernels or Counted()), asks)


HOW = [
    {"seed": 1, "logprobs": 2}, {"temperature": 0}, {"seed": 2, "top_p": 0.9, "temperature": 1.3},
    {"seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7, "max_new_tokens": 90},
    {"seed": 4, "stop": ("e",), "min_tokens": 20}, {"seed": 5, "min_p": 0.05, "logit_bias": ((40, 3.0), (41, -100.0))},
    {"seed": 6, "stop_token_ids": (36, 37, 38), "ignore_eos": True, "index": 2},
]  # fmt: skip


@pytest.mark.parametrize("mode", [MIXTURE, BARYCENTER])  # phi needs a fitted router: test_phi_mode
def test_what_is_drafted_and_read_at_once_is_what_is_drawn_token_by_token(mode: str) -> None:
    fast, slow = Counted(), Counted()
    for how in HOW:
        (drafted,) = answers([ask(mode=mode, **how)], kernels=fast)
        (single,) = answers([ask(mode=mode, draft=False, **how)], kernels=slow)
        assert drafted == single
    assert fast.read + fast.turned < slow.read, "fewer calls in all"


def test_each_token_of_a_mixture_is_told_with_its_own_probability() -> None:
    service = Service(CONFIG, ByteSums(), TOKENIZER, Counted())
    ((pieces, _),) = asking.streams(service, [ask(seed=1, logprobs=2, max_new_tokens=30)])
    for piece in pieces:
        assert piece.logprobs is not None and len(piece.logprobs) == len(piece.token_ids)
        for own, top in piece.logprobs:
            assert own <= max(p for _, p in top) + 1e-6 and len(top) == 2
    assert sum(len(p.token_ids) for p in pieces) == 30


def test_a_mixture_of_all_is_the_dense_mixture_drawn_by_hand() -> None:
    """The oracle: whole forward passes, averaged with numpy, one token at a time."""
    (answer,) = answers([ask(top_k=3, seed=7, max_new_tokens=40)])
    tokens, text, found = [0, *TOKENIZER.encode("the quick brown fox")], b"the quick brown fox", []
    bias = torch.zeros(336)
    bias[[i for i in range(1, 336) if i < 16 or i >= TOKENIZER.vocab_size]] = float("-inf")
    since, due = 0, 16
    posterior = ByteSums().route([text])[0].posterior
    while len(found) < len(answer.token_ids):
        if since >= due:
            since, due = 0, 16 if len(text) < 24 else 24
            posterior = ByteSums().route([text])[0].posterior
        tokens = tokens if len(tokens) <= 48 else tokens[-36:]
        with torch.no_grad():
            p_K = [torch.softmax(MODELS[n](torch.tensor([tokens]))[0, -1] + bias, -1).double() for n in NAMES]
        p = sum(w * one for w, one in zip(posterior / posterior.sum(), p_K))
        token = int(sample(torch.log(p)[None].float(), RowSettings([Sampling(seed=7)]), [len(found)])[0])
        found.append(token)
        tokens.append(token)
        text += TOKENIZER.token_bytes[token]
        since += len(TOKENIZER.token_bytes[token])
    assert tuple(found) == answer.token_ids
    assert all(len(look.weights) == 3 for look in answer.looks)


@pytest.mark.parametrize("mode", [MIXTURE, BARYCENTER])  # phi needs a fitted router: test_phi_mode
def test_one_kernel_alone_is_that_kernel_bit_for_bit(mode: str) -> None:
    for how in HOW:
        (mixed,) = answers([ask(mode=mode, top_k=3, **how)], ByteSums(["heart"], 0))
        (alone,) = answers([ask(mode="heart", **how)])
        assert (mixed.text, mixed.token_ids, mixed.kernels) == (alone.text, alone.token_ids, ("heart",))


@pytest.mark.parametrize("mode", [MIXTURE, BARYCENTER])  # phi needs a fitted router: test_phi_mode
def test_permuting_the_kernels_changes_nothing(mode: str) -> None:
    asks = [ask(mode=mode, **how) for how in HOW[:3]]
    expected = answers(asks)
    assert any(len(look.weights) == 2 for a in expected for look in a.looks)
    for names in itertools.permutations(NAMES):
        assert answers(asks, ByteSums(names), Counted({n: MODELS[n] for n in (*names, OCEAN)})) == expected


def test_a_batch_equals_each_alone() -> None:
    asks = [ask(mode=MIXED[i % 2], **how) for i, how in enumerate(HOW)] + [ask("", seed=9), ask(mode="route", seed=9)]
    assert answers(asks) == [answers([one])[0] for one in asks]


def test_weights_are_those_of_the_last_look_and_an_abstention_is_ocean_alone() -> None:
    (answer,) = answers([ask("", seed=3)])
    assert answer.looks[0].weights == ((OCEAN, 1.0),) and answer.kernels[0] == OCEAN
    text = b""
    data = TOKENIZER.decode(answer.token_ids)
    for look in answer.looks[1:]:
        text = data[: look.at_bytes]
        assert look.weights == weights(NAMES, ByteSums().route([text])[0].posterior, 2)
        assert sum(w for _, w in look.weights) == pytest.approx(1)
        assert look.kernel == max(look.weights, key=lambda one: one[1])[0]


@pytest.mark.parametrize("top_k", [0, -1, True, 1.5])
def test_a_number_of_kernels_that_is_none_is_refused(top_k) -> None:
    with pytest.raises(ConfigError, match="top_k="):
        answers([ask(top_k=top_k)])
