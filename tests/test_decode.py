"""Decoding with a cache, batched, against a whole forward pass for every token."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel
from constellation.errors import ConfigError, RunError
from constellation.kernel.decode import Decoder, Decoding, decode, decode_naive, generate
from constellation.kernel.model import EXPLICIT_UP_TO, KernelLM
from constellation.kernel.sample import Sampling

MINI = Kernel(vocab_size=300, width=24, layers=2, heads=3, hidden=40, context=48, coupling_ref=8)
KINDS = [("fidelity", "fixed"), ("fidelity", "learned"), ("dot", "off")]
GREEDY = Sampling(temperature=0)


def mini(**changes):
    """Far from uniform, so that greedy tokens are no near ties and sampled ones differ."""
    model = KernelLM(dataclasses.replace(MINI, **changes), seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0 if weight.dim() == 2 else 1.0)
    return model


MODEL = mini()


def window(length, seed=0, vocabulary=300):
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoded(model, windows, samplings, room, lengths=None):
    requests = [Decoding(list(w), s) for w, s in zip(windows, samplings)]
    lengths = lengths or [s.max_new_tokens for s in samplings]
    decode(Decoder(model), requests, room, lambda i, token: requests[i].taken == lengths[i])
    return [r.tokens[len(w) :] for r, w in zip(requests, windows)]


@pytest.mark.parametrize(("metric", "coupling"), KINDS)
@pytest.mark.parametrize("s", [GREEDY, Sampling(seed=5), Sampling(top_p=0.9, repetition_penalty=1.2, seed=6)], ids=str)
def test_cached_batched_tokens_equal_a_whole_forward_pass_for_every_token(metric, coupling, s):
    model = mini(metric=metric, coupling=coupling)
    windows = [window(n, n) for n in (1, 2, 16, 17, 29)]
    samplings = [dataclasses.replace(s, max_new_tokens=20, seed=i) for i in range(5)]
    naive = [decode_naive(model, w, s) for w, s in zip(windows, samplings)]
    assert decoded(model, windows, samplings, room=20) == naive
    assert len({tuple(t) for t in naive}) == 5


def test_beyond_the_explicit_path_too():
    model = mini(context=EXPLICIT_UP_TO + 40)
    windows = [window(EXPLICIT_UP_TO - 3), window(5, 1), window(EXPLICIT_UP_TO + 20, 2)]
    samplings = [dataclasses.replace(GREEDY, max_new_tokens=8)] * 3
    assert decoded(model, windows, samplings, room=8) == [decode_naive(model, w, samplings[0]) for w in windows]


@pytest.mark.parametrize("length", [1, 3, 45, 48, 200])
def test_a_room_of_one_token_is_the_sliding_window(length):
    s = Sampling(max_new_tokens=60, seed=3)
    assert decoded(MODEL, [window(length)], [s], room=1) == [decode_naive(MODEL, window(length), s)]


def test_step_logits_equal_those_of_the_whole_window():
    decoder, windows = Decoder(MODEL), [window(3), window(20, 1)]
    more = torch.tensor([window(10, 2), window(10, 3)])
    cache, logits = decoder.prefill(windows, room=10)
    for at in range(10):
        for row, w in enumerate(windows):
            whole = MODEL(torch.tensor([[*w, *more[row, :at].tolist()]]))[0, -1].detach()
            torch.testing.assert_close(logits[row], whole, rtol=1e-4, atol=1e-4)
        logits = decoder.step(cache, more[:, at])
    assert cache.length_R[:2].tolist() == [13, 30]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=9), st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_a_batch_equals_its_requests_one_by_one(lengths, seed):
    windows = [window(n, seed + i) for i, n in enumerate(lengths)]
    samplings = [Sampling(max_new_tokens=1 + (7 * i + seed) % 19, seed=i, top_k=i * 20) for i in range(len(lengths))]
    together = decoded(MODEL, windows, samplings, room=19)
    assert together == [decoded(MODEL, [w], [s], room=19)[0] for w, s in zip(windows, samplings)]
    assert [len(t) for t in together] == [s.max_new_tokens for s in samplings]


def test_kept_rows_go_on_as_if_the_others_had_never_been():
    windows = [window(n, n) for n in (4, 30, 9, 11, 2, 21)]
    decoder = Decoder(MODEL)
    cache, logits = decoder.prefill(windows, room=8)
    logits = decoder.step(cache, logits.argmax(-1))
    kept = cache.keep([4, 1])
    alone, first = decoder.prefill([windows[4], windows[1]], room=8)
    torch.testing.assert_close(decoder.step(alone, first.argmax(-1)), logits[[4, 1]], rtol=1e-5, atol=1e-5)
    for _ in range(4):
        tokens = logits.argmax(-1)
        logits = decoder.step(cache, tokens)
        torch.testing.assert_close(decoder.step(kept, tokens[[4, 1]]), logits[[4, 1]], rtol=1e-5, atol=1e-5)


def test_stopping_one_row_leaves_the_others_alone():
    windows, s = [window(n, n) for n in (5, 6, 7, 8, 9)], [Sampling(seed=i) for i in range(5)]
    full = decoded(MODEL, windows, s, room=16, lengths=[30] * 5)
    ragged = decoded(MODEL, windows, s, room=16, lengths=[1, 30, 3, 17, 2])
    assert ragged == [t[:n] for t, n in zip(full, [1, 30, 3, 17, 2])]


def test_decoding_goes_on_where_it_stopped():
    s = Sampling(max_new_tokens=30, seed=8)
    whole = decode_naive(MODEL, window(5), s)
    first = decode_naive(MODEL, window(5), dataclasses.replace(s, max_new_tokens=11))
    rest = [Decoding([*window(5), *first], s, taken=11)]
    decode(Decoder(MODEL), rest, 19, lambda i, token: rest[i].taken == 30)
    assert rest[0].tokens == [*window(5), *whole]


def test_tokens_with_an_infinite_bias_never_come():
    bias = torch.zeros(300).index_fill_(0, torch.arange(0, 300, 3), float("-inf"))
    requests = [Decoding(window(4, i), Sampling(temperature=3.0, seed=i)) for i in range(4)]
    decode(Decoder(MODEL), requests, 40, lambda i, token: requests[i].taken == 40, bias)
    assert all(token % 3 for r in requests for token in r.tokens[4:])


def test_generate_gives_each_window_its_number_of_tokens():
    windows = [window(2), window(70, 1)]
    out = generate(MODEL, windows, [Sampling(max_new_tokens=3), Sampling(max_new_tokens=100, seed=1)])
    assert [len(t) for t in out] == [3, 100]
    assert out[0] == decode_naive(MODEL, windows[0], Sampling(max_new_tokens=3))


def test_weights_may_change_between_turns():
    model = mini(coupling="learned")
    decoder = Decoder(model)
    decoder.prefill([window(4)], room=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    expected = model(torch.tensor([window(4)]))[0, -1].detach()
    torch.testing.assert_close(decoder.prefill([window(4)], room=1)[1][0], expected, rtol=1e-4, atol=1e-4)


def test_decoding_is_fp32_inside_autocast_and_leaves_no_graph():
    decoder = Decoder(MODEL)
    cache, exact = decoder.prefill([window(9)], room=2)
    after = decoder.step(cache, exact.argmax(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache, logits = decoder.prefill([window(9)], room=2)
        assert torch.equal(logits, exact)
        assert torch.equal(decoder.step(cache, exact.argmax(-1)), after)
    assert not logits.requires_grad


@pytest.mark.parametrize(("windows", "room"), [([], 1), ([[]], 1), ([[1], []], 1), ([[1] * 40], 9), ([[1] * 49], 0)])
def test_windows_that_do_not_fit_are_refused(windows, room):
    with pytest.raises(ConfigError, match="context of 48"):
        Decoder(MODEL).prefill(windows, room)


def test_a_diverged_model_is_named_and_not_sampled():
    model = mini()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        generate(model, [[1]], [GREEDY])
