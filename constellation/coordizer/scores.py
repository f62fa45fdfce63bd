"""What the next merge is chosen by: a weight for every pair, at the beginning of each round (merging.py).

    score(a, b) = n_ab w_ab         n how often, N tokens in the corpus, g a group of documents

    frequency     w = 1                                    byte-pair encoding (Gage 1994; Sennrich et al. 2016)
    superword     w = 1, inside words and then in phrases  SuperBPE (Liu et al. 2025), two phases
    pmi           w = max(0, ln n_ab N / (n_a n_b))        the pair's term of mutual information
    unigram_gain  w = (L after - L before) / n_ab          L = sum_t n_t ln n_t - N ln N, the unigram log-likelihood
    parity        w = n_ab in g / n_ab                     g compresses worst, bytes per token (Parity-aware BPE, 2025)
    basin         w = affinity of p_a and p_b              learnt coordinates, cos(d_FR / 2)   (coordinates.py)
    attention     w = mean attention of b to a             of a small kernel trained on the tokens so far (reading.py)
    kernel        w = ln(1 + e^gain)                       nats that a small kernel saves on held-out text (reading.py)

A round makes `growth` times as many tokens as there are. All of it is a function of the corpus and the merges so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from constellation.coordizer import coordinates
from constellation.coordizer.merging import Merger, Pairs
from constellation.coordizer.sample import Sample, tokenised
from constellation.errors import ConfigError

Weigh = Callable[[Merger, Pairs, Sample], NDArray[np.float64]]
GRID = 2.0**-24  # weights are multiples of it, so that the last bit of a logarithm decides nothing


@dataclass(frozen=True)
class Score:
    """A row of the table: `weigh` gives w (P,) of all pairs, None: all 1, in one round."""

    name: str
    weigh: Weigh | None = None
    growth: float = 1 / 64


def pmi(merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    n_V = merger.counts().astype(np.float64)
    n_a, n_b, n_ab = n_V[pairs.left_P], n_V[pairs.right_P], np.maximum(pairs.count_P, 1)
    return np.log(n_ab * n_V.sum() / (n_a * n_b)).clip(min=0)


def unigram_gain(merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    """The gain is exact but for a = b, where overlapping pairs are counted as if they were apart."""
    n_V = merger.counts().astype(np.float64)
    total, same = n_V.sum(), pairs.left_P == pairs.right_P
    n = np.maximum(pairs.count_P, 1).astype(np.float64)
    n = np.where(same, np.minimum(n, n_V[pairs.left_P] / 2), n)
    a, b = n_V[pairs.left_P], n_V[pairs.right_P]
    rest = np.where(same, _n_ln_n(a - 2 * n) - _n_ln_n(a), _n_ln_n(a - n) - _n_ln_n(a) + _n_ln_n(b - n) - _n_ln_n(b))
    gain = rest + _n_ln_n(n) - (_n_ln_n(total - n) - _n_ln_n(np.float64(total)))
    return gain / n


def parity(merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    bytes_per_token = (merger.bytes_W @ merger.seen_WG) / np.maximum(merger.length_W @ merger.seen_WG, 1)
    there = merger.seen_WG.sum(0) > 0
    worst = int(np.where(there, bytes_per_token, np.inf).argmin())
    own = merger.pairs(merger.seen_WG[:, worst])
    return own.count_P / np.maximum(pairs.count_P, 1)


def basin(merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    z = coordinates.coordinates(tokenised(sample.train, merger), merger.num_tokens)
    p = coordinates.on_simplex(z)
    return coordinates.affinity(p[pairs.left_P], p[pairs.right_P])


def attention(merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    from constellation.coordizer import reading

    return reading.attention_weights(merger, pairs, sample)


def kernel(merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    from constellation.coordizer import reading

    return reading.gain_weights(merger, pairs, sample, most=2 * round_of(SCORES["kernel"], merger.num_tokens))


SCORES = {
    score.name: score
    for score in (
        Score("frequency"),
        Score("superword"),
        Score("pmi", pmi),
        Score("unigram_gain", unigram_gain),
        Score("parity", parity),
        Score("basin", basin, 1 / 16),
        Score("attention", attention, 1 / 8),
        Score("kernel", kernel, 1 / 8),
    )
}


def score_of(name: str) -> Score:
    if name not in SCORES:
        raise ConfigError(f"score {name!r}: choose one of {', '.join(SCORES)}")
    return SCORES[name]


def round_of(score: Score, tokens: int) -> int:
    """New tokens of a round that begins with so many."""
    return max(1, round(score.growth * tokens))


def weights(score: Score, merger: Merger, pairs: Pairs, sample: Sample) -> NDArray[np.float64]:
    """w (P,) of `pairs`, at least 0, on a grid."""
    assert score.weigh is not None
    found: NDArray[np.float64] = np.round(score.weigh(merger, pairs, sample).clip(min=0) / GRID) * GRID
    return found


def _n_ln_n(n: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    n = np.maximum(n, 0)
    found: NDArray[np.float64] = n * np.log(np.where(n > 0, n, 1))
    return found
