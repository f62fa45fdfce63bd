"""Steps and CPU-seconds to a target, their ratios to a baseline paired by seed, and how sure they are.

reach     where a sequence of (steps, CPU-seconds, metric), longest last, first meets the target; between two
          members it is interpolated, linear in the metric (or its logarithm), log in steps and seconds
Ratio     geometric mean over seeds with a 95 % interval of Student's t on the logarithms
z         (ln goal - mean ln ratio) / (sd / sqrt n), one-sided: large when the ratio lies below the goal;
          its p-value is taken from Student's t with n - 1 degrees of freedom, which small n demands
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.stats

Point = tuple[float, float, float | None]  # steps, cpu_s, metric; None where the run diverged


@dataclass(frozen=True)
class Reached:
    """Where the target was met. `bound`: already at the first point, so it may be less."""

    steps: float
    cpu_s: float
    bound: bool = False


def reach(points: Sequence[Point], target: float, log_metric: bool = False) -> Reached | None:
    """The first crossing of `target`, None when the metric stays above it."""
    before: Point | None = None
    for steps, cpu, metric in points:
        if metric is not None and metric <= target:
            if before is None:
                return Reached(steps, cpu, bound=True)
            if before[2] is None or (log_metric and metric == 0.0):  # diverged before, or arrived where no logarithm is
                return Reached(steps, cpu)  # the later of the two: nothing is known between them
            scale = math.log if log_metric else float
            high, low, goal = scale(before[2]), scale(metric), scale(target)
            part = (high - goal) / (high - low)
            between = [a ** (1 - part) * b**part for a, b in zip(before[:2], (steps, cpu))]
            return Reached(between[0], between[1])
        before = (steps, cpu, metric)
    return None


@dataclass(frozen=True)
class Ratio:
    """Of n seeds, `reached` met the target; mean and interval are None unless all did."""

    values: tuple[float | None, ...]
    mean: float | None
    low: float | None
    high: float | None
    reached: int
    bounds: int = 0  # of them met it at the shortest run: the mean is an upper bound

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.mean is None:
            return f"> 1 ({self.reached} of {len(self.values)} reach it)"
        sign = "≤ " if self.bounds else ""
        if self.low is None or self.high is None:
            return f"{sign}{self.mean:.2f}"
        return f"{sign}{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(values: Sequence[float | None], bounds: int = 0) -> Ratio:
    """Of values paired by seed; None is a seed that did not reach the target."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return Ratio(tuple(values), None, None, None, len(known), bounds)
    logs = np.log(known)
    mean = float(logs.mean())
    if len(logs) == 1:
        return Ratio(tuple(values), math.exp(mean), None, None, 1, bounds)
    half = float(scipy.stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Ratio(tuple(values), math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(known), bounds)


def z_below(values: Sequence[float | None], goal: float) -> tuple[float, float] | None:
    """(z, p) of "the ratio is below `goal`"; None with a missing value, fewer than two, or no spread."""
    known = [v for v in values if v is not None]
    if len(known) < max(2, len(values)):
        return None
    logs = np.log(known)
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    if error < 1e-12:
        return None
    z = (math.log(goal) - float(logs.mean())) / error
    return z, float(scipy.stats.t.sf(z, len(logs) - 1))
