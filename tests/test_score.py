"""Scoring: every token once, causally, equal to the naive loop over documents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import TokenCache, build_cache
from constellation.data.corpus import Document
from constellation.kernel.model import KernelLM
from constellation.presets import tiny
from constellation.train.score import bits_per_byte, score, windows

TEXTS = ["a", "the sphere of square roots " * 9, "", "x = [i for i in range(9)]\n" * 20, "short"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    tokenizer = Tokenizer.train(TEXTS, 300)
    return build_cache([Document(t, None, "", None, {}) for t in TEXTS], tokenizer, tmp_path_factory.mktemp("cache"))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(2, 40), st.data())
def test_windows_score_every_target_once_with_enough_context(
    lengths: list[int], context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    seen = [np.zeros(n, int) for n in lengths]
    for d, first, scored in zip(*windows(np.array(lengths), context, stride), strict=True):
        stop = min(first + context, lengths[d])
        seen[d][scored:stop] += 1
        assert first == 0 or scored - first >= context - stride
    assert all((s == 1).all() for s in seen)


@torch.no_grad()
def naive(model: KernelLM, tokens: np.ndarray, context: int, stride: int) -> np.ndarray:
    out, stream = np.zeros(len(tokens)), np.concatenate([[0], tokens])
    done, first = 0, 0
    while done < len(tokens):
        x = torch.from_numpy(stream[first : first + context].astype(np.int64))[None]
        log_p = torch.log_softmax(model(x)[0], -1)
        for t in range(done, min(first + context, len(tokens))):
            out[t] = -log_p[t - first, int(tokens[t])]
        done, first = min(first + context, len(tokens)), first + stride
    return out


@pytest.mark.parametrize("stride", [1, 20, 64])
def test_score_equals_the_naive_loop(cache: TokenCache, stride: int) -> None:
    model = KernelLM(tiny().kernel, seed=3)
    found = score(model, cache, stride=stride, batch=3)
    for d, nats in enumerate(found):
        tokens = np.asarray(cache.tokens[cache.offsets[d] : cache.offsets[d + 1]])
        assert np.allclose(nats, naive(model, tokens, 64, stride), atol=1e-4)


def test_a_part_of_the_documents_scores_the_same(cache: TokenCache) -> None:
    model = KernelLM(tiny().kernel, seed=3)
    whole, part = score(model, cache), score(model, cache, [3, 1])
    assert np.allclose(part[0], whole[3], atol=1e-5) and np.allclose(part[1], whole[1], atol=1e-5)


def test_scores_are_causal(cache: TokenCache, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TEXTS, 300)
    model = KernelLM(tiny().kernel, seed=3)
    text = TEXTS[1]
    other = build_cache([Document(text[:150] + "?" * 60, None, "", None, {})], tokenizer, tmp_path)
    a, b = score(model, cache, [1])[0], score(model, other)[0]
    same = len(tokenizer.encode(text[:150])) - 2
    assert np.allclose(a[:same], b[:same], atol=1e-4) and not np.allclose(
        a[same + 3 : same + 9], b[same + 3 : same + 9]
    )


def test_a_prefix_token_changes_the_scores_and_not_their_number(cache: TokenCache) -> None:
    model = KernelLM(tiny().kernel, seed=3)
    plain = score(model, cache)
    labelled = score(model, cache, prefix=np.full(len(TEXTS), 5))
    assert [len(a) for a in plain] == [len(a) for a in labelled]
    assert not np.allclose(plain[1], labelled[1], atol=1e-3)


def test_uniform_predictions_cost_log2_v_bits_per_token(cache: TokenCache) -> None:
    model = KernelLM(tiny().kernel, seed=3)
    with torch.no_grad():
        model.embedding.weight.zero_()
    nats = score(model, cache)
    expected = np.log2(512) * len(cache.tokens) / cache.byte_length.sum()
    assert bits_per_byte(nats, cache.byte_length) == pytest.approx(expected, rel=1e-5)
