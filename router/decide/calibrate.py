"""How far to believe the scores, and when to say "none of mine": fitted on text held out from the centres.

Every validation text is looked at after 16, 32, 64 ... bytes, up to half of it, and the question at each look is which
kernel the whole text goes to. Temperatures maximise the likelihood of that answer, separately for the KL and the
tangent score (two numbers each: size at 128 bytes, and how it changes with length, because trigrams of one text are
not independent and naive Bayes grows too sure); then the weight of the tangent score in the blend, below and from 128
bytes on. A weight has to earn its place: less than 0.005 nats of gain leaves the KL score alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from constellation.errors import DataError
from router.decide.fisher_rao import SHORT_BYTES, Calibration, FisherRaoRouter

WORTH_NATS = 0.005  # a blend that gains less is not used
_TEXTS = 512  # of a length looked at, at most


def calibrate(router: FisherRaoRouter, validation: Sequence[bytes]) -> Calibration:
    """Temperatures and blend weights for `router`, whose own are ignored."""
    texts = [text for text in validation if len(text) >= 2 * router.config.min_prefix][: 4 * _TEXTS]
    if not texts:
        wanted = 2 * router.config.min_prefix
        raise DataError(f"the router's validation text: none of {len(validation)} has {wanted} bytes; hold out more")
    label_N = router.sums(texts)[2].argmax(axis=1)
    looks = [(i, size) for size in _doublings(router, len(max(texts, key=len)) // 2)
             for i, text in enumerate(texts) if len(text) >= 2 * size]  # fmt: skip
    label_P = label_N[[i for i, _ in looks]]
    n_P, kl_PK, tangent_PK = _scores(router, [texts[i][:size] for i, size in looks])
    kl = _temperature(kl_PK, n_P, label_P, guess=0.2)
    tangent = _temperature(tangent_PK, n_P, label_P, guess=5.0)
    found = Calibration(*kl, *tangent, 0.0, 0.0)
    kl_PK = kl_PK * found.gamma(n_P)[:, None]
    tangent_PK = tangent_PK * found.beta(n_P)[:, None]
    short = n_P + 2 < SHORT_BYTES
    return dataclasses.replace(
        found,
        tangent_weight_short=_blend(kl_PK[short], tangent_PK[short], label_P[short]),
        tangent_weight_long=_blend(kl_PK[~short], tangent_PK[~short], label_P[~short]),
    )


def abstention(
    router: FisherRaoRouter, texts: Sequence[bytes], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lengths in bytes, (G,), and how far from its nearest centre a training text of that length may lie, (G,) radians.

    The `abstain_quantile` of the looks along training texts, per doubling of the length, because few counts lie near
    the corpus mean; the largest where there are too few looks for a quantile. It never falls with length, and stays
    beyond the longest text.
    """
    some = [texts[i] for i in rng.permutation(len(texts))[:_TEXTS].tolist()]
    least, every = router.config.min_prefix, router.config.every
    seen = router.trajectories([text[: 2 * every] for text in some], least) + router.trajectories(some, every)
    at_P = np.concatenate([t.at_bytes for t in seen])
    distance_P = np.concatenate([t.distance_rad for t in seen]).astype(np.float64)
    octave_P = np.floor(np.log2(np.maximum(at_P, 1) / least)).astype(int)
    enough = 1 / (1 - min(router.config.abstain_quantile, 1 - 1e-9))
    sizes, limits = [], []
    for octave in range(max(int(octave_P.max()), 0) + 1):
        found = distance_P[octave_P == octave]
        if len(found):
            quantile = router.config.abstain_quantile if len(found) >= enough else 1.0
            sizes.append(least * 2.0 ** (octave + 0.5))  # the middle of the doubling
            limits.append(float(np.quantile(found, quantile)))
    if not sizes:  # no text as long as the shortest prefix: nothing is known, nothing is far
        return np.array([float(least)]), np.array([np.pi])
    return np.array(sizes), np.maximum.accumulate(limits)


def _doublings(router: FisherRaoRouter, longest: int) -> list[int]:
    sizes = [router.config.min_prefix]
    while 2 * sizes[-1] <= longest:
        sizes.append(2 * sizes[-1])
    return sizes


def _scores(
    router: FisherRaoRouter, texts: Sequence[bytes]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """n (P,), KL score (P, K) and cosines in the chart (P, K)."""
    n_P, frame_PF, kl_PK = router.sums(texts)
    z_Pn = router.judge(n_P, frame_PF, kl_PK).z
    return n_P, kl_PK, router.chart(z_Pn) @ router.charts.T


def _temperature(
    score_PK: NDArray[np.float64], n_P: NDArray[np.float64], label_P: NDArray[np.int64], guess: float
) -> tuple[float, float]:
    """(scale, slope) of `Calibration`; one imaginary look holds them within reason when every look is right."""
    from scipy.optimize import minimize

    log_n = np.log(np.maximum(n_P, 1) / (SHORT_BYTES - 2))

    def cost(x: NDArray[np.float64]) -> float:
        prior = 0.5 * ((x[0] - np.log(guess)) ** 2 / 4 + x[1] ** 2) / len(n_P)
        return _nats(np.exp(x[0] + x[1] * log_n)[:, None] * score_PK, label_P) + prior

    best = minimize(cost, [np.log(guess), -0.3], method="L-BFGS-B", bounds=[(-12, 6), (-1, 1)])
    return float(np.exp(best.x[0])), float(best.x[1])


def _blend(kl_PK: NDArray[np.float64], tangent_PK: NDArray[np.float64], label_P: NDArray[np.int64]) -> float:
    if not len(label_P):
        return 0.0
    weights = np.linspace(0, 1, 21)
    nats = [_nats((1 - w) * kl_PK + w * tangent_PK, label_P) for w in weights]
    best = int(np.argmin(nats))
    return float(weights[best]) if nats[best] < nats[0] - WORTH_NATS else 0.0


def _nats(score_PK: NDArray[np.float64], label_P: NDArray[np.int64]) -> float:
    """Mean -log softmax(score)[label]."""
    return float((np.logaddexp.reduce(score_PK, axis=1) - score_PK[np.arange(len(label_P)), label_P]).mean())
