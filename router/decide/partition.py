"""Training text divided by the decisions queries will get: byte ranges per kernel.

A text is walked like a query, a look every W bytes on all bytes so far. The bytes before the first look go where it
points, and where the policy abstains the likeliest kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.decide.clustering import balance
from router.decide.policy import ABSTAINED, Policy, Trajectory, decide

FAVOUR = float(np.log(2))  # nats by which log pi may favour or disfavour a kernel


class Weighted(Policy, Protocol):
    """A policy whose log prior can be shifted."""

    def rebalanced(self, log_shift: ArrayLike) -> Self:
        """The same policy with `log_shift`, (K,), added to its scores."""
        ...


P = TypeVar("P", bound=Weighted)


def partition(policy: Policy, texts: Sequence[bytes], every: int, hysteresis: float) -> list[NDArray[np.int64]]:
    """Per text the rows (begin, end, kernel), (S, 3) int64: adjoining byte ranges that cover it, kernels 0..K-1."""
    return [_ranges(t, len(text), hysteresis) for t, text in zip(policy.trajectories(texts, every), texts)]


def assign(
    policy: Policy,
    texts: Sequence[bytes],
    byte_N: NDArray[np.int64],
    document_N: NDArray[np.int64],
    every: int,
    hysteresis: float,
) -> NDArray[np.int64]:
    """(N,) the kernel that reads each token of `texts`, 0..K-1: the one whose range holds its first byte.

    `byte_N` counts the bytes of the token's document before it; tokens come in the order of their documents.
    """
    kernel_N = np.zeros(len(byte_N), np.int64)
    edges = np.searchsorted(document_N, np.arange(len(texts) + 1))
    for d, rows in enumerate(partition(policy, texts, every, hysteresis)):
        tokens = slice(edges[d], edges[d + 1])
        if len(rows):  # an empty text has no ranges
            kernel_N[tokens] = rows[np.searchsorted(rows[:, 0], byte_N[tokens], side="right") - 1, 2]
    return kernel_N


def segments(kernel_N: NDArray[np.int64], kernel: int) -> NDArray[np.int64]:
    """(S, 2) token ranges [start, end) that `kernel` reads: the runs of its number in `kernel_N`."""
    mine = np.concatenate([[0], (kernel_N == kernel).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(mine)).astype(np.int64)
    return edges.reshape(-1, 2)


def loads(ranges: Sequence[NDArray[np.int64]], num_kernels: int) -> NDArray[np.int64]:
    """Bytes each kernel reads, (K,)."""
    rows = np.concatenate([np.zeros((0, 3), np.int64), *ranges])
    total = np.zeros(num_kernels, np.int64)
    np.add.at(total, rows[:, 2], rows[:, 1] - rows[:, 0])
    return total


def balanced(policy: P, texts: Sequence[bytes], every: int, tolerance: float = 0.05, most: float = FAVOUR) -> P:
    """`policy` with log pi nearer to giving every kernel the same bytes of `texts`, within `tolerance` if it can be.

    A prior acts most where counts are fewest, on beginnings, and kernels whose texts are easily told apart can be
    brought to equal loads only by a prior that sends most beginnings astray. So as little of the exact bias is used as
    the tolerance takes, in quarters, and none favours a kernel by more than `most` nats: balance is the fit's work,
    the prior's are the last few per cent.
    """
    log_posterior_PK, size_P = in_force_bytes(policy, texts, every)
    exact_K = balance(log_posterior_PK, size_P, iterations=300)
    shifts = [np.clip(part * exact_K, -most, most) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def worst(shift_K: NDArray[np.float64]) -> float:
        kernel_P = (log_posterior_PK + shift_K).argmax(axis=1)
        load_K = np.bincount(kernel_P, size_P, minlength=len(shift_K)) / size_P.sum()
        return float(np.abs(load_K * len(shift_K) - 1).max())

    enough = [shift for shift in shifts if worst(shift) <= tolerance]
    return policy.rebalanced(enough[0] if enough else min(shifts, key=worst))


def in_force_bytes(
    policy: Policy, texts: Sequence[bytes], every: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log posterior of every look, (P, K), and the bytes it decides, (P,): what `cluster.balance` equalises."""
    looks = policy.trajectories(texts, every)
    bytes_P = [np.diff(_edges(t, len(text))) for t, text in zip(looks, texts)]
    log_PK = np.log(np.maximum(np.concatenate([t.posterior for t in looks]), np.finfo(np.float32).tiny))
    return log_PK.astype(np.float64), np.concatenate(bytes_P).astype(np.float64)


def _edges(trajectory: Trajectory, length: int) -> NDArray[np.int64]:
    """Look i decides bytes edges[i]..edges[i + 1]."""
    return np.concatenate([[0], trajectory.at_bytes[1:], [length]])


def _ranges(trajectory: Trajectory, length: int, hysteresis: float) -> NDArray[np.int64]:
    decided = decide(trajectory, hysteresis)
    kernel = np.where(decided == ABSTAINED, trajectory.posterior.argmax(axis=1), decided)
    edges = _edges(trajectory, length)
    keep = np.flatnonzero(np.diff(kernel, prepend=-1))  # where a run of one kernel begins
    rows = np.stack([edges[keep], np.append(edges[keep[1:]], length), kernel[keep]], axis=1)
    return rows[rows[:, 1] > rows[:, 0]]
