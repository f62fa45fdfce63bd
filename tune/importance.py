"""Which settings mattered: PED-ANOVA with an interval, beside what shuffled metrics give. No Ray here.

PED-ANOVA (Watanabe, Bansal, Hutter 2023) asks how far the best trials' distribution of one setting departs from that of
all trials, by Pearson's divergence of two kernel density estimates on a grid of at most 50 steps,

    importance = sum_g p_all(g) (p_top(g) / p_all(g) - 1)^2,     >= 0, and 0 when the setting made no difference

equal to Optuna's `PedAnovaImportanceEvaluator`, which the tests hold it against; here for all resamples at once.
`top` is the best quarter of the finished trials, at least ten of them and at most half. Trials of several rungs are put
in order by the rung they reached, then by their mean there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from tune.analysis import LEVEL, Floats

GRID = 50
FEWEST = 10  # finished trials
RESAMPLES = 400
TOP = 0.25  # of the trials; Optuna's tenth needs hundreds of trials before its interval leaves the null
Entry = Mapping[str, Any]  # of request["space"]: name, prior, low, high, choices, default
Integers = NDArray[np.intp]


@dataclass(frozen=True)
class Importance:
    """Of one setting; `low`, `high`: bootstrap over trials; `null_high`: what 97.5 % of shuffled metrics stay below."""

    name: str
    value: float
    low: float
    high: float
    null: float  # median over shuffled metrics
    null_high: float

    @property
    def verdict(self) -> str:
        return "matters" if self.low > self.null_high else "not distinguishable from noise"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def importances(
    space: Sequence[Entry], settings: Sequence[Mapping[str, Any]], order_T: Floats, seed: int = 0
) -> list[Importance]:
    """Most important first, those that matter before the others; [] with fewer than ten finished trials.

    `settings[t]` is what trial t was given (absent: the default), `order_T` its place, NaN for an unfinished one.
    The interval is the bootstrap's of the square root (a distance), moved by its bias: a resample holds trials twice,
    which adds divergence.
    """
    rows = np.flatnonzero(np.isfinite(order_T))
    n = len(rows)
    if n < FEWEST:
        return []
    top = max(math.ceil(TOP * n), min(FEWEST, n // 2))
    generator = np.random.default_rng(seed)
    place = order_T[rows]
    resamples = max(100, min(RESAMPLES, 4_000_000 // n))
    drawn_BT = generator.integers(n, size=(resamples, n))
    best_BK = np.take_along_axis(drawn_BT, np.argpartition(place[drawn_BT], top - 1, axis=1)[:, :top], 1)
    shuffled_BK = np.argpartition(generator.random((resamples, n)), top - 1, axis=1)[:, :top]
    everything, first = np.arange(n)[None], np.argsort(place)[None, :top]
    found = []
    for dimension in space:
        grid = steps(dimension)
        cell = cells(dimension, [settings[t].get(dimension["name"], dimension.get("default")) for t in rows.tolist()])
        choice = dimension["prior"] == "choice"

        def density(chosen_BK: Integers, cell: Integers = cell, grid: int = grid, choice: bool = choice) -> Floats:
            counts = _counts(cell[chosen_BK], grid)
            return _categorical(counts) if choice else _smoothed(counts)

        all_1G = density(everything)
        value = float(_divergence(density(first), all_1G)[0])
        again = _divergence(density(best_BK), density(drawn_BT))
        null = _divergence(density(shuffled_BK), all_1G)
        root = np.sqrt(again)
        ends = np.quantile(root, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - (root.mean() - math.sqrt(value))
        low, high = np.maximum(ends, 0.0) ** 2
        found.append(
            Importance(
                dimension["name"], value, float(low), float(high),
                float(np.median(null)), float(np.quantile(null, (1 + LEVEL) / 2)),
            )
        )  # fmt: skip
    return sorted(found, key=lambda i: (i.verdict != "matters", -i.value))


def searched(request: Mapping[str, Any]) -> list[Entry]:
    """The settings that the sweep varied: entries of `request["space"]` (a list, or a space that has `dimensions`)."""
    space = request.get("space", [])
    entries = space.get("dimensions", []) if isinstance(space, Mapping) else space if isinstance(space, list) else []
    found = [{**e, "choices": list(e.get("choices") or e.get("values") or [])} for e in entries]
    return [e for e in found if len(e["choices"]) > 1 or (e["prior"] != "choice" and e["low"] < e["high"])]


def steps(dimension: Entry) -> int:
    """Steps of the grid: the choices, the whole numbers, at most 50."""
    if dimension["prior"] == "choice":
        return len(dimension["choices"])
    if dimension["prior"] in ("int", "logint"):
        size = int(dimension["high"]) - int(dimension["low"]) + 1
        return min(GRID, math.ceil(math.log2(size)) + 1 if dimension["prior"] == "logint" else size)
    return GRID


def is_log(dimension: Entry) -> bool:
    return dimension["prior"] in ("log", "logint")


def cells(dimension: Entry, values: Sequence[Any]) -> Integers:
    """Step of the grid of each value; what lies outside the range counts at its end."""
    if dimension["prior"] == "choice":
        place = {str(c): i for i, c in enumerate(dimension["choices"])}
        return np.array([place.get(str(v), 0) for v in values], np.intp)
    low, high = float(dimension["low"]), float(dimension["high"])
    at = np.clip(np.array([low if v is None else float(v) for v in values]), low, high)
    if is_log(dimension):
        low, high, at = math.log(low), math.log(high), np.log(at)
    grid = steps(dimension)
    width = (high - low) / max(1, grid - 1) or 1.0
    return np.clip(np.ceil((at - low) / width - 0.5), 0, grid - 1).astype(np.intp)


def unit(entry: Entry, values: Sequence[Any]) -> Floats:
    """Values on [0, 1], on a log scale where the prior is; choices at equal distances."""
    if entry["prior"] == "choice":
        return cells(entry, values) / max(1, len(entry["choices"]) - 1)
    low, high, at = float(entry["low"]), float(entry["high"]), np.array(values, np.float64)
    if is_log(entry):
        low, high, at = math.log(low), math.log(high), np.log(np.maximum(at, 1e-300))
    return np.asarray(np.clip((at - low) / (high - low), 0, 1))


def _divergence(top_BG: Floats, all_BG: Floats) -> Floats:
    top, whole = top_BG + 1e-12, all_BG + 1e-12
    return np.asarray((whole * (top / whole - 1) ** 2).sum(1))


def _counts(cell_BK: Integers, grid: int) -> Floats:
    rows = len(cell_BK)
    flat = (cell_BK + grid * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, minlength=rows * grid).reshape(rows, grid).astype(np.float64)


def _categorical(counts_BC: Floats) -> Floats:
    """Frequencies with Optuna's prior: every seen choice is a kernel that leaks 1 / (seen + 1) to each choice."""
    choices, n = counts_BC.shape[1], counts_BC.sum(1, keepdims=True)
    leak = 1.0 / ((counts_BC > 0).sum(1, keepdims=True) + 1)
    return np.asarray(((counts_BC + n * leak) / (1 + choices * leak) + 1 / choices) / (n + 1))


def _smoothed(counts_BG: Floats) -> Floats:
    """Mixture of Gaussians of Scott's width, cut at the ends of the grid, and one as wide as the grid as the prior."""
    grid = counts_BG.shape[1]
    g, n = np.arange(grid), counts_BG.sum(1)
    mean = counts_BG @ g / n
    deviation = np.sqrt((counts_BG * (g - mean[:, None]) ** 2).sum(1) / np.maximum(1, n - 1))
    cumulative = counts_BG.cumsum(1)
    quartile = np.maximum(n // 4, 1)[:, None], (n * 3 // 4)[:, None]
    spread = np.argmax(cumulative > quartile[1], 1) - np.argmax(cumulative >= quartile[0], 1)
    width = np.maximum(1.059 * np.minimum(spread / 1.34, deviation) * n**-0.2, 0.5 / 1.64)
    kernel_BGG = _cut_gaussian(g, width[:, None], grid)
    prior_G = _cut_gaussian(np.array([(grid - 1) / 2]), np.array([[float(grid)]]), grid)[0, 0]
    mixed = np.einsum("bg,bgx->bx", counts_BG, kernel_BGG, optimize=True)
    return np.asarray((mixed + prior_G) / (n + 1)[:, None])


def _cut_gaussian(centre_M: NDArray[Any], width_B1: Floats, grid: int) -> Floats:
    """Mass (B, M, grid) of each step under Gaussians at the centres, which have all of it on the grid."""
    edge = np.arange(grid + 1) - 0.5
    below = ndtr((edge - centre_M[:, None]) / width_B1[:, :, None])
    mass = np.diff(below, axis=-1)
    return np.asarray(mass / (below[..., -1:] - below[..., :1]))
