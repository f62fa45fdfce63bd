"""How well the constellation answers: causal bits per byte of every way to choose.

Each model scores every held-out token once (train/score.py); every way to answer is then arithmetic on that
table. The weight of a token uses only bytes before it: the decision in force at byte s is the last
one made at or before s, and before the first one OCEAN answers.

    routed           the kernel in force, one active at a time
    mixture_K        sum over the K likeliest kernels of w_k p_k(token), w the posterior in force, renormalised: the
                     weights and the sum are those of the mode `mixture` (mixture.py)
    phi_K            the same with w_k phi_k, where the kernels' phi was measured: the mode `phi`
    ocean            the generalist alone
    alone:<role>     one kernel on everything
    uniform          all kernels, equal weights
    permuted         routed, with the kernels' names permuted: mean over derangements by rotation (a null)
    bayes            all kernels, weights = likelihood of the document so far (K models active)
    oracle           the best kernel of each document in hindsight (unattainable)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.decide.fisher_rao import FisherRaoRouter
from router.decide.mixture import judged, mean, weight_table
from router.decide.modes import MIXTURE, PHI
from router.decide.policy import ABSTAINED, Policy, Trajectory, decide

LN2 = math.log(2)


@dataclass(frozen=True, eq=False)
class Scores:
    """Nats of N tokens of D documents under OCEAN and K kernels."""

    names: tuple[str, ...]
    ocean_N: NDArray[np.float32]
    kernels_KN: NDArray[np.float32]
    document_N: NDArray[np.int64]
    byte_N: NDArray[np.int64]  # bytes of the document before the token
    byte_length_D: NDArray[np.int64]
    domains: tuple[str | None, ...]

    def bits_D(self, nats_N: NDArray[np.floating]) -> NDArray[np.float64]:
        """Bits of each document."""
        return np.bincount(self.document_N, nats_N, minlength=len(self.byte_length_D)) / LN2


def look_in_force(
    byte_N: NDArray[np.int64], document_N: NDArray[np.int64], trajectories: Sequence[Trajectory]
) -> NDArray[np.int64]:
    """(N,) index of the last look at or before each token's first byte, among all looks in a row; -1 before the first.

    `byte_N` counts the bytes of the token's document before it; tokens come in the order of their documents.
    """
    looks = np.concatenate([[0], np.cumsum([len(t) for t in trajectories])])
    out = np.empty(len(byte_N), np.int64)
    edges = np.searchsorted(document_N, np.arange(len(trajectories) + 1))
    for d, trajectory in enumerate(trajectories):
        tokens = slice(edges[d], edges[d + 1])
        last = np.searchsorted(trajectory.at_bytes, byte_N[tokens], side="right") - 1
        out[tokens] = np.where(last < 0, -1, looks[d] + last)
    return out


def choose(scores: Scores, kernel_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Nats when kernel_N answers each token, -1 = OCEAN."""
    picked = np.take_along_axis(scores.kernels_KN, np.maximum(kernel_N, 0)[None], axis=0)[0]
    return np.where(kernel_N == ABSTAINED, scores.ocean_N, picked)


def mix(scores: Scores, log_weight_KN: NDArray[np.floating]) -> NDArray[np.float64]:
    """-log sum_k w_k p_k of each token: probabilities are averaged, never logits."""
    return -mean(MIXTURE, -scores.kernels_KN, log_weight_KN)


def answers(
    scores: Scores,
    trajectories: Sequence[Trajectory],
    hysteresis: float,
    mixtures: Sequence[int] = (3,),
    integration_K: NDArray[np.floating] | None = None,
) -> dict[str, NDArray[np.floating]]:
    """Nats of every token for every way to answer, by the names above; phi_k where the kernels' phi is known."""
    kernels = len(scores.names)
    look_N = look_in_force(scores.byte_N, scores.document_N, trajectories)
    early = look_N < 0
    decided = np.concatenate([decide(t, hysteresis) for t in trajectories])
    kernel_N = np.where(early, ABSTAINED, decided[np.maximum(look_N, 0)])
    abstained = kernel_N == ABSTAINED
    out: dict[str, NDArray[np.floating]] = {"routed": choose(scores, kernel_N)}
    posterior = np.concatenate([t.posterior for t in trajectories])
    for mode, k in itertools.product((MIXTURE,) if integration_K is None else (MIXTURE, PHI), mixtures):
        own = judged(mode, posterior, integration_K)
        with np.errstate(divide="ignore"):
            log_weights = np.log(weight_table(scores.names, own, k))[np.maximum(look_N, 0)].T
        out[f"{mode}_{k}"] = np.where(abstained, scores.ocean_N, mix(scores, log_weights))
    out["ocean"] = scores.ocean_N
    for k, name in enumerate(scores.names):
        out[f"alone:{name}"] = scores.kernels_KN[k]
    out["uniform"] = mix(scores, np.full((kernels, 1), -math.log(kernels)))
    turns = [choose(scores, np.where(abstained, ABSTAINED, (kernel_N + r) % kernels)) for r in range(1, kernels)]
    out["permuted"] = np.mean(turns, axis=0) if turns else out["routed"]
    out["bayes"] = mix(scores, _likelihood_weights(scores))
    totals_KD = np.stack([scores.bits_D(scores.kernels_KN[k]) for k in range(kernels)])
    out["oracle"] = choose(scores, totals_KD.argmin(axis=0)[scores.document_N])
    return out


def _likelihood_weights(scores: Scores) -> NDArray[np.float64]:
    """Log posterior of each kernel given the tokens of the document before this one, uniform prior, (K, N)."""
    before = np.cumsum(scores.kernels_KN, axis=1, dtype=np.float64) - scores.kernels_KN
    first = np.searchsorted(scores.document_N, np.arange(len(scores.byte_length_D)))
    log_KN = -(before - before[:, first][:, scores.document_N])
    result: NDArray[np.float64] = log_KN - np.logaddexp.reduce(log_KN, axis=0)
    return result


def report(scores: Scores, nats: Mapping[str, NDArray[np.floating]]) -> dict[str, dict[str, object]]:
    """Bits per byte of each way to answer: over all bytes, after byte 64, per domain."""
    late = scores.byte_N >= 64
    late_bytes = np.maximum(scores.byte_length_D - 64, 0).sum()
    domains = sorted({d for d in scores.domains if d is not None})
    member = {d: np.array([x == d for x in scores.domains]) for d in domains}
    out: dict[str, dict[str, object]] = {}
    for name, values in nats.items():
        bits = scores.bits_D(values)
        row: dict[str, object] = {"bits_per_byte": float(bits.sum() / scores.byte_length_D.sum())}
        row["after_64_bytes"] = float(values[late].sum() / LN2 / late_bytes) if late_bytes else None
        row["domains"] = {d: float(bits[m].sum() / scores.byte_length_D[m].sum()) for d, m in member.items()}
        out[name] = row
    return out


def evaluate(
    scores: Scores,
    policy: Policy,
    texts: Sequence[bytes],
    every: int,
    hysteresis: float,
    mixtures: Sequence[int] = (3,),
) -> dict[str, dict[str, object]]:
    """`report` of every way to answer `texts` (the documents of `scores`, in order) by `policy`."""
    phi_K = policy.integration if isinstance(policy, FisherRaoRouter) else None
    return report(scores, answers(scores, policy.trajectories(texts, every), hysteresis, mixtures, phi_K))
