"""Several kernels answer together: their next-token distributions p_k, weighted by the posterior w_k, become one.

    mixture       log p = logsumexp_k(log p_k + log w_k)                    probabilities are averaged, never logits
    barycenter    log p = 2 logsumexp_k(log p_k / 2 + log w_k) + const      p = (sum_k w_k sqrt p_k)^2, normalised
    phi           as mixture, with w_k phi_k, renormalised before the best are taken: "phi-weighted activation"

The barycenter is the mean in the square-root chart, where Fisher-Rao geodesics are great circles: the weighted
mean of the points sqrt(p_k) taken back to the sphere. Of two distributions of equal weight it is their Frechet
mean; of more it is the one that iteration for that mean starts from (geometry/sphere.py), without the iteration.
Between p_k that share no token the mixture keeps all of them, and so does the barycenter, nearer to uniform weights.

Values: one kernel gives that kernel; equal p_k give p_k; a token impossible for all stays impossible.
`weights` and `mean` are also what an evaluation weighs and sums by (evaluate.py): evaluated is what is served.
Sums run over kernels in the order of their names, so no order of kernels changes a bit.
Reference: Rao (1945) for the geometry; c-BTM, Gururangan et al. (2023), for mixtures by posterior.

Shapes: K kernels, T positions, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from constellation.errors import ConfigError
from router.decide.modes import BARYCENTER, PHI

Weights = tuple[tuple[str, float], ...]


def weights(names: Sequence[str], posterior_K: NDArray[np.floating], k: int) -> Weights:
    """The `k` likeliest kernels and their posterior renormalised, by name: w > 0, sum w = 1.

    Of equal posteriors the first names are taken. All of them when there are no more than `k`.
    """
    p_K = np.maximum(posterior_K.astype(np.float64), 1e-300)
    best = sorted(sorted(range(len(names)), key=lambda i: (-p_K[i], names[i]))[:k], key=lambda i: names[i])
    total = sum(p_K[i] for i in best)
    return tuple((names[i], float(p_K[i] / total)) for i in best)


def judged(mode: str, posterior: NDArray[np.floating], integration_K: NDArray[np.floating] | None) -> NDArray[Any]:
    """What weights are taken from: the posterior (..., K), in mode phi times phi_k and renormalised.

    Equal phi_k change nothing. ConfigError in mode phi for kernels whose integration was not measured, or is 0 for all.
    """
    if mode != PHI:
        return posterior
    if integration_K is None or not (integration_K > 0).any():
        raise ConfigError("mode='phi' needs the kernels' phi, which was not measured; first: constellation report RUN")
    product: NDArray[Any] = posterior.astype(np.float64) * integration_K
    total = product.sum(-1, keepdims=True)
    return np.where(total > 0, product / np.where(total > 0, total, 1.0), posterior)


def weight_table(names: Sequence[str], posterior_PK: NDArray[np.floating], k: int) -> NDArray[np.float64]:
    """`weights` of each of P decisions, in the order of `names`, (P, K); 0 for kernels that are not asked."""
    place, table_PK = {name: i for i, name in enumerate(names)}, np.zeros(posterior_PK.shape)
    for row_K, posterior_K in zip(table_PK, posterior_PK):
        for name, weight in weights(names, posterior_K, k):
            row_K[place[name]] = weight
    return table_PK


def mean(mode: str, log_p_K: NDArray[np.floating], log_w_K: NDArray[np.floating]) -> NDArray[np.float64]:
    """The sum over kernels, the first axis, that `mode` is named for, before it is normalised; -inf weighs nothing."""
    power = 2.0 if mode == BARYCENTER else 1.0
    terms_K = log_p_K / power + log_w_K
    top = terms_K.max(axis=0)
    sure = np.where(np.isfinite(top), top, 0.0)  # -inf - -inf would be NaN
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = power * (sure + np.log(np.exp(terms_K - sure).sum(axis=0)))
    return found


def combine(mode: str, log_p_KTV: NDArray[np.floating], weight_K: ArrayLike) -> NDArray[np.float64]:
    """Log-probabilities of `mode`, "mixture", "barycenter" or "phi", (T, V); every row's probabilities sum to 1."""
    log_p_TV = mean(mode, log_p_KTV, np.log(np.asarray(weight_K, np.float64))[:, None, None])
    top_T1 = log_p_TV.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = log_p_TV - top_T1 - np.log(np.exp(log_p_TV - top_T1).sum(axis=1, keepdims=True))
    return found
