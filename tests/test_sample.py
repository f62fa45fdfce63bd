"""The sampler against a naive one: one request at a time, a full sort, float64."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from constellation.decoding import native
from constellation.decoding.compiled import available
from constellation.decoding.sample import PREFILTER, RowSettings, Sampling, penalised, sample, uniform
from constellation.errors import ConfigError

GOLDEN, ONE, TWO, WORD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64 - 1
EOS = 0


def naive_uniform(seed, position, index=0):
    def mix(x):
        x = (x ^ (x >> 30)) * ONE & WORD
        x = (x ^ (x >> 27)) * TWO & WORD
        return x ^ (x >> 31)

    stream = mix((seed + GOLDEN) & WORD)
    if index:
        stream = mix((stream + index * 0xD1B54A32D192ED03) & WORD)
    return (mix((stream + (position + 1) * GOLDEN) & WORD) >> 12) / 2**52


def naive_distribution(logits, s, seen=(), counts=None, position=10**9):
    """[(token, probability)] in the order of the draw, probabilities not yet normalised."""
    x = np.array(logits, dtype=np.float64)
    for i in seen:
        x[i] = x[i] / s.repetition_penalty if x[i] > 0 else x[i] * s.repetition_penalty
    for i, n in (counts or {}).items():
        x[i] -= s.presence_penalty + s.frequency_penalty * n
    for i, value in s.logit_bias:
        x[i] += value
    if position < s.min_tokens:
        x[[*s.stop_token_ids, *([] if s.ignore_eos else [EOS])]] = -np.inf
    p = np.exp((x - x.max()) / s.temperature)
    p /= p.sum()
    if not (s.top_k or s.top_p < 1 or s.min_p):
        return list(enumerate(p))
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: s.top_k or None]
    total = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= s.top_p * total and s.top_p < 1:
            break
        mass += p[i]
        kept.append(i)
    return [(i, p[i]) for i in kept if p[i] >= s.min_p * p[order[0]]]


def naive_sample(logits, s, position, seen=(), counts=None):
    if s.temperature == 0:
        s = dataclasses.replace(s, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        return max(naive_distribution(logits, s, seen, counts, position), key=lambda pair: pair[1])[0]
    pairs = naive_distribution(logits, s, seen, counts, position)
    target, mass = naive_uniform(s.seed, position, s.index) * sum(p for _, p in pairs), 0.0
    for i, p in pairs:
        mass += p
        if mass > target:
            return i
    raise AssertionError("fell off the end")


@pytest.fixture(params=["torch", "C"], scope="module", autouse=True)
def way(request):
    """Both samplers are held to the naive one."""
    global WAY
    WAY = request.param
    if WAY == "C" and not available():
        pytest.skip("no C compiler")


def draw(logits_BV, samplings, positions, seen=None, counts=None):
    logits_BV = torch.as_tensor(np.array(logits_BV), dtype=torch.float32)
    marks = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, ids in enumerate(seen or []):
        marks[row, list(ids)] = True
    table = torch.zeros_like(logits_BV)
    for row, of in enumerate(counts or []):
        table[row, list(of)] = torch.tensor(list(of.values()), dtype=torch.float32)
    together = RowSettings(samplings, ends=(EOS,))
    if WAY == "torch":
        return sample(logits_BV, together, positions, marks, table).tolist()
    return native.draw(penalised(logits_BV, together, np.array(positions), marks, table), together.records, positions)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 40, 255, 256, 257, 400]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0001, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    seed=st.integers(0, 2**64 - 1),
    max_new_tokens=st.just(20_000),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, -1.0]),
    logit_bias=st.dictionaries(st.integers(0, 2), st.sampled_from([-100.0, -1.0, 2.5]), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    min_tokens=st.sampled_from([0, 0, 5000]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (1,)]),
    index=st.sampled_from([0, 1, 7, 2**32 - 1]),
)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_a_batch_of_different_requests_equals_the_naive_sampler_one_by_one(data):
    vocabulary = data.draw(st.sampled_from([3, 200, 256, 257, 600]))
    batch = data.draw(st.lists(samplings, min_size=1, max_size=5))
    scale = data.draw(st.sampled_from([0.05, 1.0, 4.0]))  # 0.05: so flat that 256 tokens do not hold the mass
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = (scale * rng.standard_normal((len(batch), vocabulary))).astype(np.float32)
    positions = rng.integers(0, 10_000, len(batch)).tolist()
    seen = [rng.integers(0, vocabulary, 20).tolist() for _ in batch]
    counts = [{i: int(rng.integers(1, 4)) for i in ids[:8]} for ids in seen]
    expected = [
        naive_sample(x, s, at, set(ids), of) for x, s, at, ids, of in zip(logits, batch, positions, seen, counts)
    ]
    assert draw(logits, batch, positions, seen, counts) == expected


@given(st.lists(samplings, min_size=2, max_size=6), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_neighbours_in_the_batch_change_nothing(batch, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(batch), 500)).astype(np.float32)
    positions = rng.integers(0, 1000, len(batch)).tolist()
    together = draw(logits, batch, positions, [[1, 2]] * len(batch))
    alone = [draw(logits[i : i + 1], [s], [positions[i]], [[1, 2]])[0] for i, s in enumerate(batch)]
    assert together == alone


@pytest.mark.parametrize(
    "s",
    [
        Sampling(seed=1),
        Sampling(seed=2, temperature=0.7),
        Sampling(seed=3, top_k=5),
        Sampling(seed=4, top_p=0.8),
        Sampling(seed=5, min_p=0.1),
        Sampling(seed=6, temperature=1.5, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(s):
    rng = np.random.default_rng(0)
    logits, count = 2 * rng.standard_normal(30), 20_000
    drawn = np.bincount(draw(np.tile(logits, (count, 1)), [s] * count, range(count), [[0, 1, 2]] * count), minlength=30)
    pairs = naive_distribution(logits.astype(np.float32), s, {0, 1, 2})
    tokens, p = np.array([i for i, _ in pairs]), np.array([p for _, p in pairs])
    assert drawn.sum() == drawn[tokens].sum(), "a token was drawn that the filters exclude"
    expected = count * p / p.sum()
    few = expected < 5
    observed = np.append(drawn[tokens][~few], drawn[tokens][few].sum())
    expected = np.append(expected[~few], expected[few].sum())
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_the_uniform_numbers_are_splitmix64_in_plain_integers(seed, position):
    for index in (0, 1, 3, 2**32 - 1):
        u = uniform(*(np.array([x], np.uint64) for x in (seed, position, index)))
        assert u.item() == naive_uniform(seed, position, index)
        assert 0 <= u.item() < 1
    first = uniform(np.array([seed], np.uint64), np.array([position], np.uint64))
    assert first.item() == naive_uniform(seed, position)


def test_the_uniform_numbers_are_uniform_and_independent_along_seeds_and_positions():
    seeds, positions = (a.astype(np.uint64) for a in np.mgrid[0:300, 0:300])
    for u in (uniform(seeds, positions), uniform(np.uint64(7) + 0 * seeds, positions, seeds)):  # seeds, then indices
        _check_uniform(u)


def _check_uniform(u):
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert len(np.unique(u)) == u.size
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, 1:], u[:-1, :-1])):
        cells = np.histogram2d(a.ravel(), b.ravel(), bins=16)[0]
        assert stats.chisquare(cells.ravel()).pvalue > 1e-3


def test_greedy_takes_the_first_of_several_largest():
    assert draw([[0.0, 3.0, 3.0, 1.0]], [Sampling(temperature=0)], [0]) == [1]


@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=1e-30),
        Sampling(temperature=5e-324),
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
        Sampling(min_p=1.0),
    ],
    ids=str,
)
def test_settings_that_leave_one_token_are_greedy(s):
    logits = np.random.default_rng(0).standard_normal((64, 700)).astype(np.float32) * 5
    assert draw(logits, [s] * 64, range(64)) == logits.argmax(1).tolist()


@pytest.mark.parametrize("s", [Sampling(temperature=100.0), Sampling(temperature=100.0, top_p=0.999)], ids=str)
def test_an_excluded_token_is_never_drawn(s):
    logits = np.zeros((500, 300))
    logits[:, ::2] = -math.inf
    drawn = draw(logits, [s] * 500, range(500))
    assert all(token % 2 for token in drawn)
    assert len(set(drawn)) > 100


def test_a_penalty_makes_seen_tokens_rarer_whatever_the_sign_of_their_logit():
    logits = np.tile([2.0, 2.0, -2.0, -2.0], (4000, 1))
    drawn = np.bincount(draw(logits, [Sampling(repetition_penalty=2.0, seed=9)] * 4000, range(4000), [[0, 2]] * 4000))
    p = np.exp([1.0, 2.0, -4.0, -2.0])
    assert np.allclose(drawn / 4000, p / p.sum(), atol=0.02)
    assert drawn[2] < drawn[3]


def test_the_fallback_is_taken_only_by_rows_that_need_it():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 2000)).astype(np.float32) * [[4.0], [0.01]]
    s = Sampling(top_p=0.9)
    likeliest = [len(naive_distribution(x, s)) for x in logits]
    assert likeliest[0] < PREFILTER < likeliest[1]
    for position in range(50):
        assert draw(logits, [s, s], [position] * 2) == [naive_sample(x, s, position) for x in logits]


@pytest.mark.parametrize(
    "s", [Sampling(top_p=0.9), Sampling(min_p=0.01, temperature=1.5), Sampling(top_p=0.7, min_p=0.2)]
)
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_prefixes_of_thousands_of_tokens_are_those_of_the_whole_sort(s, scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal((3, 5000))).astype(np.float32)
    logits[:, ::7] = -np.inf
    for position in range(40):
        theirs = [naive_sample(x, s, position) for x in logits]
        mine = draw(logits, [s] * 3, [position] * 3)
        if scale:
            assert mine == theirs
        assert all(x[token] == 0 for x, token in zip(logits, mine) if not scale)  # all equal: any order is right


def test_a_row_that_is_not_finite_has_no_token():
    if WAY == "C":
        logits = np.zeros((6, 37))
        logits[0], logits[1, 36], logits[2, 3], logits[3, 3], logits[4] = -np.inf, np.nan, np.nan, np.inf, -np.inf
        logits[4, 36] = -1e30
        for s in (Sampling(), Sampling(temperature=0), Sampling(top_p=0.5)):
            assert [token < 0 for token in draw(logits, [s] * 6, range(6))] == [True, True, True, True, False, False]


def test_an_end_cannot_come_before_min_tokens_and_may_afterwards():
    logits = np.zeros((1, 300)) - 9.0
    logits[:, [EOS, 5]] = 9.0
    s = Sampling(min_tokens=3, stop_token_ids=(5,), max_new_tokens=9)
    drawn = [draw(logits, [dataclasses.replace(s, seed=seed)], [at])[0] for at in range(5) for seed in range(20)]
    assert not {EOS, 5} & set(drawn[:60])
    assert {EOS, 5} >= set(drawn[60:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 100.1),
        ("repetition_penalty", 1e-3), ("repetition_penalty", 101.0), ("temperature", "1"),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2),
        ("repetition_penalty", 0.0), ("seed", -1), ("seed", 2**64), ("seed", 0.5), ("max_new_tokens", 0),
        ("presence_penalty", 2.1), ("frequency_penalty", -3), ("frequency_penalty", math.nan), ("min_tokens", -1),
        ("min_tokens", 129), ("ignore_eos", 1), ("stop_token_ids", (-1,)), ("stop_token_ids", tuple(range(65))),
        ("stop_token_ids", (True,)), ("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("index", -1),
        ("logit_bias", ((1, 101),)), ("logit_bias", ((1, 2.0, 3),)), ("logit_bias", ((-1, 2.0),)),
        ("logit_bias", ((1, 2.0), (1, 3.0))), ("logit_bias", tuple((i, 1.0) for i in range(301))), ("logit_bias", {}),
        ("stop", "end"), ("stop", ("",)), ("stop", (b"x",)), ("stop", None),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})
    with pytest.raises(ConfigError, match=name):
        Sampling.from_json({name: value})


@given(samplings, st.lists(st.text(min_size=1), max_size=3))
def test_settings_survive_json(s, stop):
    s = dataclasses.replace(s, stop=tuple(stop))
    assert Sampling.from_json(s.changed()) == s == Sampling.from_json(json.loads(json.dumps(s.changed())))
    assert Sampling().changed() == {}


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'topp'.*top_p"):
        Sampling.from_json({"topp": 0.9})
