"""Differences between arms with their uncertainty: paired by seed and document.

`difference(a, b, bytes)` takes bits of S seeds x D documents of two arms and returns the difference
in bits per byte, a - b, negative when a is better, with

    a 95 % interval   hierarchical bootstrap: seeds, then documents within each drawn seed, 10 000 times
    a p-value         one-sided paired t-test over the seeds' differences (the check; NaN for one seed)

`holm` turns the p-values of a family of claims into adjusted ones (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95  # of intervals
MARGIN = -0.01  # bits per byte; a win is declared when the interval's upper end lies below it


@dataclass(frozen=True)
class Difference:
    """a - b in bits per byte; `low`, `high` the 95 % interval."""

    mean: float
    low: float
    high: float
    p_value: float
    per_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """ "better" | "worse" | "no difference shown", at the declared margin of 0.01."""
        if self.high < MARGIN:
            return "better"
        return "worse" if self.low > -MARGIN else "no difference shown"

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "verdict": self.verdict}

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def difference(
    a_SD: NDArray[np.floating], b_SD: NDArray[np.floating], bytes_D: NDArray[np.integer], seed: int = 0
) -> Difference:
    """Of two arms with bits a and b; equal arms give exactly 0 with an interval of width 0."""
    gap_SD = np.asarray(a_SD, np.float64) - np.asarray(b_SD, np.float64)
    seeds, documents = gap_SD.shape
    per_seed = gap_SD.sum(1) / bytes_D.sum()
    generator = np.random.default_rng(seed)
    sums, sizes = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for _ in range(seeds):
        drawn = generator.integers(seeds, size=RESAMPLES)
        for part in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * documents // 4_000_000)):
            at = generator.integers(documents, size=(len(part), documents))
            sums[part] += gap_SD[drawn[part, None], at].sum(1)
            sizes[part] += bytes_D[at].sum(1)
    low, high = np.quantile(sums / sizes, [0.025, 0.975])
    p = float("nan")
    if seeds > 1 and np.ptp(per_seed) > 0:
        import scipy.stats

        p = float(scipy.stats.ttest_1samp(per_seed, 0.0, alternative="less").pvalue)
    return Difference(float(per_seed.mean()), float(low), float(high), p, tuple(map(float, per_seed)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given; NaN stays NaN and counts as the largest."""
    order = np.argsort([1.0 if p != p else p for p in p_values], kind="stable")
    adjusted, highest = [float("nan")] * len(p_values), 0.0
    for rank, i in enumerate(order):
        if p_values[i] == p_values[i]:
            highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
            adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Paired:
    """Mean of paired differences with Student's 95 % interval; of width 0 for equal ones, infinite for one alone."""

    mean: float
    low: float
    high: float


def paired(gaps: Sequence[float]) -> Paired:
    """Of the differences of each seed.

    >>> paired([1.0, 1.0, 1.0])
    Paired(mean=1.0, low=1.0, high=1.0)
    """
    mean = math.fsum(gaps) / len(gaps)
    if len(gaps) < 2:
        return Paired(mean, -math.inf, math.inf)
    import scipy.special

    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    half = float(scipy.special.stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / len(gaps))
    return Paired(mean, mean - half, mean + half)


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Probability that one of `positive` is larger than one of `negative`, ties count half: [0, 1], .5 for chance.

    >>> auroc([3, 2], [1, 0]), auroc([1, 2], [1, 2])
    (1.0, 0.5)
    """
    a, b = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float((a > b).mean() + (a == b).mean() / 2)
