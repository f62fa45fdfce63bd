"""Trials compared on the same seeds, rungs held against each other, what was reached for what cost. No Ray here.

Letters of shapes: T trials, R rungs, S seeds. Of every metric less is better: it is called the loss here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from constellation.experiments.statistics import holm
from tune.history import History

LEVEL = 0.95
RESAMPLES = 1000
FEWEST_PAIRS = 8  # trials that two rungs must share before their correlation means anything
COSTS = ("tokens", "flops", "cpu_s", "wall_s")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Standings:
    """Losses of all trials; NaN where there is no finished evaluation."""

    numbers: tuple[int, ...]  # trial of row t
    seeds: tuple[int, ...]
    loss_TRS: Floats

    @classmethod
    def of(cls, history: History) -> Standings:
        numbers, seeds = tuple(sorted(history.trials)), tuple(history.seeds)
        rungs = max([len(history.rungs), *(e.rung + 1 for e in history.outcomes)])
        loss = np.full((len(numbers), rungs, len(seeds)), np.nan)
        row, column = {n: t for t, n in enumerate(numbers)}, {s: i for i, s in enumerate(seeds)}
        for evaluation, outcome in history.outcomes.items():
            if outcome.metric is not None and evaluation.trial in row:
                loss[row[evaluation.trial], evaluation.rung, column[evaluation.seed]] = outcome.metric
        return cls(numbers, seeds, loss)

    @cached_property
    def rung(self) -> int | None:
        """The highest rung at which a trial finished; None when none did."""
        reached = np.flatnonzero(np.isfinite(self.loss_TRS).any((0, 2)))
        return int(reached[-1]) if len(reached) else None

    @cached_property
    def loss_TS(self) -> Floats:
        """Losses at the highest rung reached by any trial."""
        return self.loss_TRS[:, self.rung if self.rung is not None else 0]

    def order_T(self) -> Floats:
        """Place of each trial, best first: a higher rung before a lower one, then the mean over seeds; NaN: unknown."""
        mean_TR = _mean(self.loss_TRS)
        reached_TR = np.isfinite(mean_TR)
        known = reached_TR.any(1)
        rungs = mean_TR.shape[1]
        top_T = rungs - 1 - np.argmax(reached_TR[:, ::-1], axis=1)
        order = np.full(len(mean_TR), np.nan)
        rows = np.flatnonzero(known)
        sequence = np.lexsort((mean_TR[rows, top_T[rows]], -top_T[rows]))
        order[rows[sequence]] = np.arange(len(rows))
        return order

    def best(self) -> int | None:
        """Row of the lowest mean loss at the highest rung among the trials with the most seeds; None without any."""
        count_T = np.isfinite(self.loss_TS).sum(1)
        if not count_T.size or count_T.max() == 0:
            return None
        return int(np.nanargmin(np.where(count_T == count_T.max(), _mean(self.loss_TS), np.nan)))


@dataclass(frozen=True)
class PairedDifference:
    """Metric of a trial minus that of another, on the seeds both have.

    The 95 % interval is Student's, d +- t(n - 1) s / sqrt(n) over the n seeds' differences; with one seed there is
    none (`low`, `high`, `p` None). `p` is two-sided; `p_holm` is Holm's over the family that was compared.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    seeds: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        if self.low is None:
            return "one seed: no interval"
        if not self.shown:
            return "no difference at this budget"
        return "different" if self.p_holm is not None and self.p_holm < 1 - LEVEL else "different, but not after Holm"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.4g}"
        return f"{self.mean:+.4g} [{self.low:+.4g}, {self.high:+.4g}]"


def differences(standings: Standings, reference: int) -> dict[int, PairedDifference]:
    """Of every row that shares a seed with the row `reference`, to it; Holm's family is all with an interval."""
    gap_TS = standings.loss_TS - standings.loss_TS[reference]
    count_T = np.isfinite(gap_TS).sum(1)
    rows = np.flatnonzero((count_T > 0) & (np.arange(len(count_T)) != reference))
    gap, n = gap_TS[rows], count_T[rows]
    mean = _mean(gap)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.nansum((gap - mean[:, None]) ** 2, 1) / (n - 1) / n)
        half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * error
        p = 2 * scipy.stats.t.sf(np.abs(mean) / error, n - 1)
    p = np.where((n > 1) & (error == 0), (mean == 0).astype(float), p)  # equal gaps on all seeds
    adjusted = holm(p.tolist())
    return {
        int(row): PairedDifference(m, m - h, m + h, q, a, k)
        if k > 1
        else PairedDifference(m, None, None, None, None, 1)
        for row, m, h, q, a, k in zip(rows, mean.tolist(), half.tolist(), p.tolist(), adjusted, n.tolist())
    }


@dataclass(frozen=True)
class RungCorrelation:
    """Spearman's rho of the trials' losses at two rungs, with a bootstrap interval over the trials."""

    lower: int
    higher: int
    pairs: int
    rho: float | None
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        if self.pairs < FEWEST_PAIRS or self.rho is None or self.low is None:
            return f"too few pairs ({self.pairs} of {FEWEST_PAIRS}): unknown"
        return "correlated" if self.low > 0 else "not shown to correlate: early stopping chose by chance"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def rung_correlations(standings: Standings, seed: int = 0) -> list[RungCorrelation]:
    """Of every pair of rungs, over the trials that finished at both, each by its mean over the seeds it has at both."""
    loss = standings.loss_TRS
    return [
        _correlation(loss[:, low], loss[:, high], low, high, np.random.default_rng(seed))
        for low in range(loss.shape[1])
        for high in range(low + 1, loss.shape[1])
    ]


def _correlation(a_TS: Floats, b_TS: Floats, low: int, high: int, generator: np.random.Generator) -> RungCorrelation:
    both = np.isfinite(a_TS) & np.isfinite(b_TS)
    a, b = (_mean(np.where(both, x, np.nan)) for x in (a_TS, b_TS))
    known = both.any(1)
    a, b = a[known], b[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return RungCorrelation(low, high, len(a), None, None, None)
    rho = float(_rank_product(a[None], b[None])[0])
    drawn = generator.integers(len(a), size=(max(200, min(RESAMPLES, 2_000_000 // len(a))), len(a)))
    again = _rank_product(a[drawn], b[drawn])
    ends = np.nanquantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return RungCorrelation(low, high, len(a), rho, float(ends[0]), float(ends[1]))


def _rank_product(a_BT: Floats, b_BT: Floats) -> Floats:
    """Pearson's correlation of the ranks of each row; NaN for a row without spread."""
    ranks = [scipy.stats.rankdata(x, axis=1) for x in (a_BT, b_BT)]
    x, y = (r - r.mean(1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)))


@dataclass(frozen=True)
class BestSoFar:
    """In the order in which evaluations ended (N of them), everything charged: failed and stopped ones too."""

    clock_N: Floats  # the sweep's clock
    flops_N: Floats  # spent by then
    cpu_s_N: Floats
    metric_N: Floats  # best at the highest rung, on the first seed alone; NaN before the first


def best_so_far(history: History, standings: Standings) -> BestSoFar:
    ended = sorted(history.outcomes.items(), key=lambda item: (item[1].ended, item[0]))
    first = standings.seeds[0] if standings.seeds else 0
    loss = np.array([
        o.metric if o.metric is not None and (e.rung, e.seed) == (standings.rung, first) else np.inf
        for e, o in ended
    ])  # fmt: skip
    best = np.minimum.accumulate(loss) if len(loss) else loss
    return BestSoFar(
        np.array([o.ended for _, o in ended]),
        np.cumsum([o.cost.flops for _, o in ended]),
        np.cumsum([o.cost.cpu_s for _, o in ended]),
        np.where(np.isfinite(best), best, np.nan),
    )


def spent(history: History, standings: Standings) -> dict[str, dict[str, float]]:
    """Cost and number of evaluations by fate: "full" (at the highest rung), "lower" (below it), "failed", "all"."""
    total = {fate: dict.fromkeys(("evaluations", *COSTS), 0.0) for fate in ("full", "lower", "failed", "all")}
    for evaluation, outcome in history.outcomes.items():
        fate = "failed" if outcome.metric is None else "full" if evaluation.rung == standings.rung else "lower"
        for part in (total[fate], total["all"]):
            part["evaluations"] += 1
            for name in COSTS:
                part[name] += getattr(outcome.cost, name)
    return total


def _mean(values: Floats) -> Floats:
    """Mean over the last axis of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(-1) / known.sum(-1))
