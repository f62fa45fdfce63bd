"""What every router answers with, and the one rule that turns posteriors into decisions.

A policy sees UTF-8 bytes and nothing else. It answers in two ways: `route` looks at whole texts
(one `RouteChoice` each), `trajectories` looks again after every W bytes on all bytes so far, and oftener
before the first W (one `Trajectory` each). Both are causal: what is said at byte t depends on bytes before t alone.
Training text is assigned and queries are answered by the same `decide(trajectory, hysteresis)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from constellation.roster import OCEAN

ABSTAINED = -1  # index of OCEAN among the decisions
FIRST = 16  # bytes before the first look, and between looks until W: a text's beginning is the generalist's no longer


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The router's view of one text as it grows; P decisions, K kernels.

    `at_bytes[i]` bytes were seen, no more: 16, 32, ... below W, then W, 2W, ... up to the text's length;
    a text shorter than 16 has one look at its end. An empty text has one look at 0 bytes, which abstains.
    """

    at_bytes: NDArray[np.int64]  # (P,) increasing
    posterior: NDArray[np.float32]  # (P, K) rows sum to 1
    distance_rad: NDArray[np.float32]  # (P,) Fisher-Rao distance to the nearest centre, [0, pi]; NaN without centres
    abstain: NDArray[np.bool_]  # (P,) the generalist should answer

    def __len__(self) -> int:
        return len(self.at_bytes)


@dataclass(frozen=True, eq=False)
class RouteChoice:
    """Who answers one text, and why. K kernels."""

    kernel: str  # a kernel's name, or "ocean" after abstaining
    index: int  # of the kernel, -1 for ocean
    posterior: NDArray[np.float32]  # (K,) sums to 1
    z: NDArray[np.float32]  # (n,) basin coordinates in radians of the sphere; empty for a policy without them
    distances_rad: NDArray[np.float32]  # (K,) Fisher-Rao distance to every centre, [0, pi]
    counts_used: int  # trigrams counted, bytes - 2
    abstained: bool
    reason: str  # "" or why it abstained: "too short" | "far" | "low posterior"
    root: tuple[float, ...]  # E8 address of the likeliest kernel, 8 numbers; empty without addresses
    neighbours: tuple[str, ...]  # other kernels, nearest first: where a hand-off would go
    decided_by: str  # score that decided: "kl" | "tangent" | "blend" | the baseline's own
    tangent_weight: float  # weight of the tangent score in the blend, [0, 1]

    def to_json(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Plain values for `constellation route --json`; with `names` the vectors over kernels become tables."""

        def over_kernels(values: NDArray[np.float32]) -> Any:
            plain = [None if v != v else round(float(v), 6) for v in values.tolist()]
            return plain if names is None else dict(zip(names, plain))

        return {
            "kernel": self.kernel,
            "index": self.index,
            "posterior": over_kernels(self.posterior),
            "z": [round(float(v), 6) for v in self.z.tolist()],
            "distances_rad": over_kernels(self.distances_rad),
            "counts_used": self.counts_used,
            "abstained": self.abstained,
            "reason": self.reason,
            "root": list(self.root),
            "neighbours": list(self.neighbours),
            "decided_by": self.decided_by,
            "tangent_weight": round(self.tangent_weight, 6),
        }


@runtime_checkable
class Policy(Protocol):
    """Anything that can say who answers: the Fisher-Rao router and its baselines."""

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels, in the order of posteriors."""
        ...

    def trajectories(self, texts: Sequence[bytes], every: int) -> list[Trajectory]:
        """The looks at every text, where `looks(len(text), every)` says."""
        ...

    def route(self, texts: Sequence[bytes]) -> list[RouteChoice]:
        """One choice per text, from all of it."""
        ...


def decide(trajectory: Trajectory, hysteresis: float, current: int = ABSTAINED) -> NDArray[np.int64]:
    """Kernel in force from `at_bytes[i]` on, (P,) int64, -1 = OCEAN.

    A kernel stays until another leads it by more than `hysteresis` nats of log posterior; an
    abstention is followed at once, and left for the likeliest kernel. `current` is in force before
    the first look, so a long text may be decided piece by piece.
    """
    log_PK = np.log(np.maximum(trajectory.posterior, np.finfo(np.float32).tiny))
    best_P = log_PK.argmax(axis=1)
    behind_PK = log_PK.max(axis=1, keepdims=True) - log_PK > hysteresis  # kernel k would be left at i
    best, abstain = best_P.tolist(), trajectory.abstain.tolist()
    decided = []
    for i in range(len(trajectory)):
        if abstain[i]:
            current = ABSTAINED
        elif current == ABSTAINED or behind_PK[i, current]:
            current = best[i]
        decided.append(current)
    return np.asarray(decided, dtype=np.int64)


def even(length: int, every: int) -> NDArray[np.int64]:
    """`every`, 2 `every`, ... up to `length`; `length` itself when it is shorter."""
    return np.arange(every, length + 1, every, dtype=np.int64) if length >= every else np.array([length], np.int64)


def looks(length: int, every: int) -> NDArray[np.int64]:
    """Where a text of `length` bytes is looked at: FIRST, 2 FIRST, ... below `every`, then `every`, 2 `every`, ..."""
    if every <= FIRST or length < FIRST:
        return even(length, every)
    return np.append(np.arange(FIRST, min(every, length + 1), FIRST), np.arange(every, length + 1, every))


def look_often_at_first(
    evenly: Callable[[Sequence[bytes], int], list[Trajectory]], texts: Sequence[bytes], every: int
) -> list[Trajectory]:
    """The trajectories at `looks`, by a function that gives those at `even` steps."""
    later = evenly(texts, every)
    if every <= FIRST:
        return later
    early = evenly([text[: every - 1] for text in texts], FIRST)
    return [a if len(text) < every else _join(a, b) for text, a, b in zip(texts, early, later)]


def _join(a: Trajectory, b: Trajectory) -> Trajectory:
    names = ("at_bytes", "posterior", "distance_rad", "abstain")
    return Trajectory(*(np.concatenate([getattr(a, name), getattr(b, name)]) for name in names))


def kernel_name(names: Sequence[str], index: int) -> str:
    return OCEAN if index == ABSTAINED else names[index]
