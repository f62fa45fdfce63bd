"""Which kernel reads which training bytes: the decisions that queries will get, turned into token ranges.

Training text is walked like a query, a look every W bytes on all bytes so far, so that a kernel is
trained on what the router will send it: beginnings of documents included, where a licence header may
belong to another kernel than the code after it. The bytes before the first look go where it points,
and where a policy abstains the likeliest kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.policy import ABSTAINED, Policy, Trajectory, decide


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


def assign(
    policy: Policy,
    texts: Sequence[bytes],
    byte_N: NDArray[np.int64],
    document_N: NDArray[np.int64],
    every: int,
    hysteresis: float,
) -> NDArray[np.int64]:
    """(N,) the kernel that reads each token of `texts`, 0..K-1."""
    trajectories = policy.trajectories(texts, every)
    decided = [
        np.where(k == ABSTAINED, t.posterior.argmax(1), k) for t in trajectories for k in [decide(t, hysteresis)]
    ]
    first = np.concatenate([[0], np.cumsum([len(t) for t in trajectories])])[:-1]
    look = look_in_force(byte_N, document_N, trajectories)
    kernel_N: NDArray[np.int64] = np.concatenate(decided)[np.where(look < 0, first[document_N], look)]
    return kernel_N


def segments(kernel_N: NDArray[np.int64], kernel: int) -> NDArray[np.int64]:
    """(S, 2) token ranges [start, end) that `kernel` reads: the runs of its number in `kernel_N`."""
    mine = np.concatenate([[0], (kernel_N == kernel).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(mine)).astype(np.int64)
    return edges.reshape(-1, 2)
