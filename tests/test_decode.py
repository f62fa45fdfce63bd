"""Decoding of many requests at once, with a cache, against a whole forward pass for every token."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel
from constellation.decoding.batch import Batch, Writing
from constellation.decoding.decode import decode_naive, generate
from constellation.decoding.sample import Sampling
from constellation.errors import ConfigError, RunError
from constellation.kernel.model import EXPLICIT_UP_TO
from tests.cases import lively_kernel

MINI = Kernel(vocab_size=300, width=24, layers=2, heads=3, hidden=40, context=48, coupling_ref=8)
KINDS = [("fidelity", "fixed"), ("fidelity", "learned"), ("dot", "off")]
GREEDY = Sampling(temperature=0)


def mini(**changes):
    return lively_kernel(dataclasses.replace(MINI, **changes))


MODEL = mini()


def window(length, seed=0, vocabulary=300):
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoded(model, windows, samplings, room, lengths=None, **options):
    lengths = lengths or [s.max_new_tokens for s in samplings]
    works = [
        Writing(tokens=list(w), sampling=s, room=room, take=lambda token, i=i: len(works[i].tokens) == ends[i])
        for i, (w, s) in enumerate(zip(windows, samplings))
    ]
    ends = [len(w) + n for w, n in zip(windows, lengths)]
    batch = Batch(model, **options)
    for work in works:
        batch.add(work)
    while not batch.idle:
        batch.step()
    for work in works:
        work.done.result()
    return [work.tokens[len(w) :] for work, w in zip(works, windows)]


EVERY_SETTING = Sampling(
    top_p=0.9, repetition_penalty=1.2, seed=6, presence_penalty=0.8, frequency_penalty=-0.3, min_tokens=9,
    stop_token_ids=(3, 5), logit_bias=((7, 4.0), (9, -100.0)), index=2,
)  # fmt: skip


@pytest.mark.parametrize(("metric", "coupling"), KINDS)
@pytest.mark.parametrize("s", [GREEDY, Sampling(seed=5), EVERY_SETTING], ids=["greedy", "plain", "every setting"])
def test_cached_batched_tokens_equal_a_whole_forward_pass_for_every_token(metric, coupling, s):
    model = mini(metric=metric, coupling=coupling)
    windows = [window(n, n) for n in (1, 2, 16, 17, 29)]
    samplings = [dataclasses.replace(s, max_new_tokens=20, seed=i) for i in range(5)]
    naive = [decode_naive(model, w, s) for w, s in zip(windows, samplings)]
    assert decoded(model, windows, samplings, room=20) == naive
    assert len({tuple(t) for t in naive}) == 5


def test_in_a_long_context_too():
    model = mini(context=EXPLICIT_UP_TO + 40)
    windows = [window(EXPLICIT_UP_TO - 3), window(5, 1), window(EXPLICIT_UP_TO + 20, 2)]
    samplings = [dataclasses.replace(GREEDY, max_new_tokens=8)] * 3
    assert decoded(model, windows, samplings, room=8) == [decode_naive(model, w, samplings[0]) for w in windows]


@pytest.mark.parametrize("length", [1, 3, 45, 48, 200])
@pytest.mark.parametrize(
    "s", [Sampling(max_new_tokens=60, seed=3), dataclasses.replace(EVERY_SETTING, max_new_tokens=60)]
)
def test_a_room_of_one_token_is_the_sliding_window(length, s):
    assert decoded(MODEL, [window(length)], [s], room=1) == [decode_naive(MODEL, window(length), s)]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=9), st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_a_batch_equals_its_requests_one_by_one(lengths, seed):
    windows = [window(n, seed + i) for i, n in enumerate(lengths)]
    samplings = [Sampling(max_new_tokens=1 + (7 * i + seed) % 19, seed=i, top_k=i * 20) for i in range(len(lengths))]
    together = decoded(MODEL, windows, samplings, room=19)
    assert together == [decoded(MODEL, [w], [s], room=19)[0] for w, s in zip(windows, samplings)]
    assert [len(t) for t in together] == [s.max_new_tokens for s in samplings]


def test_stopping_one_row_leaves_the_others_alone():
    windows, s = [window(n, n) for n in (5, 6, 7, 8, 9)], [Sampling(seed=i) for i in range(5)]
    full = decoded(MODEL, windows, s, room=16, lengths=[30] * 5)
    ragged = decoded(MODEL, windows, s, room=16, lengths=[1, 30, 3, 17, 2])
    assert ragged == [t[:n] for t, n in zip(full, [1, 30, 3, 17, 2])]


@pytest.mark.parametrize(
    "s", [Sampling(max_new_tokens=30, seed=8), dataclasses.replace(EVERY_SETTING, max_new_tokens=30)]
)
def test_decoding_goes_on_where_it_stopped(s):
    whole = decode_naive(MODEL, window(5), s)
    first = decode_naive(MODEL, window(5), dataclasses.replace(s, max_new_tokens=11))
    work = Writing(tokens=[*window(5), *first], sampling=s, taken=11, room=19, take=lambda token: work.taken == 30)
    batch = Batch(MODEL)
    batch.add(work)
    while not batch.idle:
        batch.step()
    assert work.tokens == [*window(5), *whole]


def test_tokens_with_an_infinite_bias_never_come():
    bias = torch.zeros(300).index_fill_(0, torch.arange(0, 300, 3), float("-inf"))
    samplings = [Sampling(temperature=3.0, seed=i, max_new_tokens=40) for i in range(4)]
    for precision in ("fp32", "int8"):
        out = decoded(MODEL, [window(4, i) for i in range(4)], samplings, 40, bias_V=bias, precision=precision)
        assert all(token % 3 for tokens in out for token in tokens)


def test_generate_gives_each_window_its_number_of_tokens():
    windows = [window(2), window(70, 1)]
    out = generate(MODEL, windows, [Sampling(max_new_tokens=3), Sampling(max_new_tokens=100, seed=1)])
    assert [len(t) for t in out] == [3, 100]
    assert out[0] == decode_naive(MODEL, windows[0], Sampling(max_new_tokens=3))


def test_a_batch_holds_the_weights_as_they_were():
    model = mini(coupling="learned")
    s = dataclasses.replace(GREEDY, max_new_tokens=8)
    before = decode_naive(model, window(4), s)
    batch = Batch(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-0.9)
    work = Writing(tokens=window(4), sampling=s, room=8, take=lambda token: work.taken == 8)
    batch.add(work)
    while not batch.idle:
        batch.step()
    assert work.tokens[4:] == before != generate(model, [window(4)], [s])[0]


def test_decoding_is_fp32_inside_autocast():
    s = dataclasses.replace(GREEDY, max_new_tokens=20)
    exact = generate(MODEL, [window(9)], [s])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(MODEL, [window(9)], [s]) == exact


@pytest.mark.parametrize("tokens", [[], [300], [-1]])
def test_a_window_that_cannot_be_read_is_refused(tokens):
    with pytest.raises(ConfigError, match=r"at least one token|vocabulary"):
        generate(MODEL, [tokens], [GREEDY])


def test_a_diverged_model_is_named_and_not_sampled():
    model = mini()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        generate(model, [[1]], [Sampling(top_p=0.5)])
