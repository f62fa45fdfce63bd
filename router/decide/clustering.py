"""Dividing text among kernels, each the same number of bytes.

Three steps. `spherical` is balanced spherical k-means in the chart u: Fisher-Rao centres of random-length prefixes.
`refine` then lets the kernels compete for the running text itself: every window of W bytes goes to the kernel whose
distribution fits all bytes *before* it best (KL score, the streaming decision queries will get), and each kernel's
distribution becomes that of its windows: balanced hard EM, or Bregman clustering under KL (Banerjee et al. 2005). As
2 KL -> d_FR^2 locally, it continues the first step; it ends where training text and queries are routed alike.
`anticipate` moves beginnings to where the text is going: a licence header counts for the kernel of the code after it.

Shapes: N points, K kernels, W windows, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from router.decide.counts import Windows
from router.decide.fisher_rao import log_ratio

_MOST_ENTRIES = 1 << 21  # of a score table that is balanced
SAMPLE_BYTES = 32 << 20  # text a fit reads at most, whole documents drawn at random


def sample(texts: Sequence[bytes], limit: int, rng: np.random.Generator) -> list[bytes]:
    """All texts if they fit, else whole texts in random order while they do."""
    if sum(map(len, texts)) <= limit:
        return [text for text in texts if text]
    chosen, held = [], 0
    for i in rng.permutation(len(texts)).tolist():
        piece = texts[i][: limit - held]
        if piece:
            chosen.append(piece)
            held += len(piece)
        if held >= limit:
            break
    return chosen


def balance(
    score_NK: NDArray[np.floating],
    weight_N: NDArray[np.float64],
    start: NDArray[np.float64] | None = None,
    tolerance: float = 0.01,
    iterations: int = 200,
) -> NDArray[np.float64]:
    """Bias b, (K,), mean 0, for which argmax_k (score + b) gives every kernel the same weight within `tolerance`.

    b minimises the convex dual sum_i w_i max_k (score_ik + b_k) - (W/K) sum_k b_k of the balanced assignment, whose
    subgradient is the loads less their mean; its signs move b with a step per kernel that grows while the sign stays
    and halves when it turns (Riedmiller & Braun 1993). The best b seen is returned: with fewer points than kernels,
    or equal points, no bias is exact.
    """  # fmt: skip
    k = score_NK.shape[1]
    every = -(-score_NK.size // _MOST_ENTRIES)  # of a large table, every so-manieth row
    score_NK, weight_N = score_NK[::every], weight_N[::every]
    moved_NK = np.empty_like(score_NK)
    mean_load = weight_N.sum() / k
    bias = np.zeros(k) if start is None else start.copy()
    step = np.full(k, 0.1 * float((score_NK - score_NK.mean(axis=1, keepdims=True)).std()) + 1e-12)
    before, best, least = np.zeros(k), bias.copy(), np.inf
    for _ in range(iterations):
        np.add(score_NK, bias, out=moved_NK)
        load = np.bincount(moved_NK.argmax(axis=1), weight_N, minlength=k) / mean_load - 1
        worst = float(np.abs(load).max())
        if worst < least:
            least, best = worst, bias.copy()
        if worst <= tolerance:
            break
        turn = np.sign(load) * np.sign(before)
        step *= np.where(turn > 0, 1.2, np.where(turn < 0, 0.5, 1.0))
        bias = bias - np.sign(load) * step
        before = load
    return best - best.mean()


def spherical(
    point_ND: NDArray[np.float64], weight_N: NDArray[np.float64], k: int, rng: np.random.Generator, rounds: int = 30
) -> NDArray[np.int64]:
    """Labels (N,) of balanced spherical k-means: unit vectors, equal weight per cluster, started by k-means++."""
    centre_KD = _spread_out(point_ND, weight_N, k, rng)
    label_N = np.full(len(point_ND), -1)
    bias_K = np.zeros(k)
    for _ in range(rounds):
        cos_NK = point_ND @ centre_KD.T
        bias_K = balance(cos_NK, weight_N, bias_K, tolerance=0.02, iterations=50)
        found_N = (cos_NK + bias_K).argmax(axis=1)
        if (found_N == label_N).all():
            break
        label_N = found_N
        member_KN = sparse.csr_matrix((weight_N, (label_N, np.arange(len(label_N)))), shape=(k, len(label_N)))
        sum_KD = member_KN @ point_ND
        length_K = np.linalg.norm(sum_KD, axis=1, keepdims=True)
        centre_KD = np.where(length_K > 0, sum_KD / np.maximum(length_K, 1e-300), centre_KD)
    return label_N


@dataclass(frozen=True, eq=False)
class Division:
    """A corpus divided by streaming decisions."""

    kernel_W: NDArray[np.int64]  # which kernel each window went to
    counts_KB: NDArray[np.int64]  # trigrams of each kernel's windows
    gain_nats: (
        float  # mean over trigrams of log P_k / p0, each predicted from bytes before its window; higher is better
    )


def refine(
    matrix_WB: sparse.csr_matrix,
    cut: Windows,
    counts_KB: NDArray[np.int64],
    pseudo_B: NDArray[np.float64],
    rounds: int = 12,
    enough: float = 2e-4,
) -> Division:
    """Balanced hard EM from `counts_KB` on, until a round gains less than `enough` nats per trigram."""  # fmt: skip
    k, begins = len(counts_KB), cut.first[:-1][np.diff(cut.first) > 0]
    rest = np.ones(len(cut.size), bool)
    rest[begins] = False  # a first window is assigned after it was read: no prediction
    trigrams = max(int(np.diff(cut.start)[rest].sum()), 1)
    size_W, bias_K, gain = cut.size.astype(np.float64), np.zeros(k), -np.inf
    for _ in range(rounds):
        own_WK = matrix_WB @ np.ascontiguousarray(log_ratio(counts_KB, pseudo_B).T)
        force_WK = in_force(cut.running(own_WK.copy()), cut)
        bias_K = balance(force_WK, size_W, bias_K)
        kernel_W = (force_WK + bias_K).argmax(axis=1)
        pooled_KB = pool(matrix_WB, kernel_W, k)
        counts_KB = np.where(pooled_KB.any(axis=1, keepdims=True), pooled_KB, counts_KB)
        before, gain = gain, float(own_WK[np.flatnonzero(rest), kernel_W[rest]].sum()) / trigrams
        if gain - before < enough:
            break
    return Division(kernel_W, counts_KB, gain)


def anticipate(
    matrix_WB: sparse.csr_matrix,
    cut: Windows,
    counts_KB: NDArray[np.int64],
    pseudo_B: NDArray[np.float64],
    horizon: int,
    rounds: int = 2,
) -> NDArray[np.int64]:
    """Counts (K, B) in which a window counts for the kernel decided `horizon` windows later, or at the text's end.

    Window i counts 1 + 20 // (1 + i) times, about log-uniformly over prefix lengths: few bytes of a corpus are
    beginnings, but every query has one.
    """  # fmt: skip
    k, place = len(counts_KB), np.arange(len(cut.size))
    later = np.minimum(place + horizon, cut.first[cut.text + 1] - 1)
    early_WB = sparse.diags(window_weights(cut)) @ matrix_WB
    bias_K = np.zeros(k)
    for _ in range(rounds):
        look_WK = cut.running(matrix_WB @ np.ascontiguousarray(log_ratio(counts_KB, pseudo_B).T))
        bias_K = balance(in_force(look_WK, cut), cut.size.astype(np.float64), bias_K)
        pooled_KB = pool(early_WB, (look_WK[later] + bias_K).argmax(axis=1), k)
        # A kernel left without text would be the corpus mean, and everything unheard-of would go there.
        counts_KB = np.where(pooled_KB.any(axis=1, keepdims=True), pooled_KB, counts_KB)
    return counts_KB


def window_weights(cut: Windows) -> NDArray[np.float64]:
    """1 + 20 // (1 + i) for the i-th window of a text, (W,): 21, 11, 7, 6, 5 ... 1."""
    place_W: NDArray[np.int64] = np.arange(len(cut.size)) - cut.first[cut.text]
    return (1 + 20 // (1 + place_W)).astype(np.float64)


def in_force(at_looks_W: NDArray, cut: Windows) -> NDArray:
    """What was known when each window began: the row before it; for a text's first window its own."""
    shifted = np.concatenate([at_looks_W[:1], at_looks_W[:-1]])
    begins = cut.first[:-1][np.diff(cut.first) > 0]
    shifted[begins] = at_looks_W[begins]
    return shifted


def pool(matrix_NB: sparse.csr_matrix, label_N: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Summed counts of each cluster, (K, B)."""
    member_KN = sparse.csr_matrix((np.ones(len(label_N)), (label_N, np.arange(len(label_N)))), shape=(k, len(label_N)))
    return np.rint((member_KN @ matrix_NB).toarray()).astype(np.int64)


def _spread_out(
    point_ND: NDArray[np.float64], weight_N: NDArray[np.float64], k: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """k-means++ (Arthur & Vassilvitskii 2007): centres drawn with probability weight x (1 - cos to the nearest)."""
    chosen = [int(rng.choice(len(point_ND), p=weight_N / weight_N.sum()))]
    apart_N = 1 - point_ND @ point_ND[chosen[0]]
    for _ in range(k - 1):
        chance = weight_N * np.maximum(apart_N, 0) + 1e-12 * weight_N
        chosen.append(int(rng.choice(len(point_ND), p=chance / chance.sum())))
        apart_N = np.minimum(apart_N, 1 - point_ND @ point_ND[chosen[-1]])
    start_KD: NDArray[np.float64] = point_ND[chosen]
    return start_KD
