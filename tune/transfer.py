"""Does a learning rate found on a small model hold for a larger one? No Ray here.

For every size (width, depth) a parabola of the loss in x = ln(lr) through the trials near the lowest one gives
lr* = exp(-b / 2a). Over the sizes, by least squares,

    ln lr* = c + p_width ln(width) + p_depth ln(depth)

so that lr* ~ width^p_width depth^p_depth. All intervals are the bootstrap's over the evaluations within each size.
The regret of carrying the smallest size's lr* to another is the parabola's height there above its lowest point.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tune.analysis import LEVEL, Floats, Standings
from tune.history import History
from tune.importance import searched

RATE, WIDTH, DEPTH = "optim.lr", "kernel.width", "kernel.layers"
NEAR = math.log(8.0)  # the parabola is drawn through rates within a factor of 8 of the lowest loss
FEWEST_RATES = 4
RESAMPLES = 1000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Optimum:
    """Of one size; `rate` is None where the losses have no lowest point inside the rates tried."""

    width: float
    depth: float
    evaluations: int
    rate: float | None
    interval: Interval | None
    note: str = ""
    regret: float | None = None  # loss above this size's lowest, with the lr* of the first size that has one
    regret_interval: Interval | None = None


@dataclass(frozen=True)
class TransferRule:
    """Optima of all sizes for one way of scaling the update (`group`: its settings), and the exponents."""

    group: dict[str, Any]
    optima: tuple[Optimum, ...]
    exponents: dict[str, float]  # "width", "depth": those that the sweep varied
    intervals: dict[str, Interval]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def transfer(history: History, standings: Standings, seed: int = 0) -> list[TransferRule]:
    """One rule for each combination of the other optimizer settings that are choices, if two sizes have an optimum.

    Evaluations count at the highest rung, each seed as a point of its own.
    """
    names = {entry["name"]: entry for entry in searched(history.request)}
    if RATE not in names or not {WIDTH, DEPTH} & set(names):
        return []
    others = [n for n, e in names.items() if n.startswith("optim.") and n != RATE and e["prior"] == "choice"]
    points: dict[tuple[Any, ...], dict[tuple[float, float], list[tuple[float, float]]]]
    points = defaultdict(lambda: defaultdict(list))
    for t, number in enumerate(standings.numbers):
        settings = history.trials[number].settings
        having: dict[str, Any] = {n: settings.get(n, e.get("default")) for n, e in names.items()}
        width, depth = (float(having[n]) if n in having else 1.0 for n in (WIDTH, DEPTH))
        for value in standings.loss_TS[t][np.isfinite(standings.loss_TS[t])]:
            points[tuple(having[n] for n in others)][width, depth].append((math.log(having[RATE]), float(value)))
    rules = [_rule(dict(zip(others, group)), sizes, np.random.default_rng(seed)) for group, sizes in points.items()]
    return [rule for rule in rules if sum(o.rate is not None for o in rule.optima) > 1]


def _rule(
    group: dict[str, Any], sizes: Mapping[tuple[float, float], Sequence[tuple[float, float]]], draw: np.random.Generator
) -> TransferRule:
    ordered = sorted(sizes)
    fits = [_fit(np.array(sizes[size]), draw) for size in ordered]
    smallest = next((fit for fit in fits if fit.note == ""), None)
    optima = []
    for (width, depth), fit in zip(ordered, fits):
        known = fit.note == ""
        optimum = Optimum(
            width, depth, len(sizes[width, depth]), math.exp(fit.vertex) if known else None,
            _interval(np.exp(fit.vertex_B)) if known else None, fit.note,
            *(fit.regret(smallest) if known and smallest is not None else (None, None)),
        )  # fmt: skip
        optima.append(optimum)
    used = [(size, fit) for size, fit in zip(ordered, fits) if fit.note == ""]
    exponents, intervals = _exponents([size for size, _ in used], [fit for _, fit in used])
    return TransferRule(group, tuple(optima), exponents, intervals)


@dataclass(frozen=True)
class _Parabola:
    curvature: float
    vertex: float  # in ln(lr)
    vertex_B: Floats  # of the resamples, NaN where a resample has no lowest point
    curvature_B: Floats
    note: str = ""

    def regret(self, small: _Parabola) -> tuple[float, Interval]:
        """a (x_small - x*)^2, and the bootstrap interval of it."""
        again = self.curvature_B * (small.vertex_B - self.vertex_B) ** 2
        return self.curvature * (small.vertex - self.vertex) ** 2, _interval(again)


def _fit(points_N2: Floats, draw: np.random.Generator) -> _Parabola:
    x, y = points_N2.T
    near = np.abs(x - x[np.argmin(y)]) <= NEAR
    x, y = x[near], y[near]
    none = np.full(RESAMPLES, np.nan)
    if len(np.unique(x)) < FEWEST_RATES:
        return _Parabola(0.0, 0.0, none, none, f"fewer than {FEWEST_RATES} rates near the lowest loss")
    weight_BN = draw.multinomial(len(x), np.full(len(x), 1 / len(x)), size=RESAMPLES).astype(np.float64)
    (a,), (vertex,) = _vertices(x, y, np.ones((1, len(x))))
    a_B, vertex_B = _vertices(x, y, weight_BN)
    low, high = x.min(), x.max()
    if not (a > 0 and low <= vertex <= high):
        side = "lower" if y[np.argmin(x)] < y[np.argmax(x)] else "higher"
        return _Parabola(0.0, 0.0, none, none, f"no lowest point inside the rates tried; try {side} ones")
    inside = (a_B > 0) & (vertex_B > low - NEAR) & (vertex_B < high + NEAR)
    return _Parabola(float(a), float(vertex), np.where(inside, vertex_B, np.nan), np.where(inside, a_B, np.nan))


def _vertices(x_N: Floats, y_N: Floats, weight_BN: Floats) -> tuple[Floats, Floats]:
    """Curvature and vertex of the weighted least-squares parabola of each row, NaN where three rates are wanting."""
    centre = x_N.mean()
    z = x_N - centre
    powers = z[:, None] ** np.arange(5)
    moment = weight_BN @ powers
    left = moment[:, np.add.outer([2, 1, 0], [2, 1, 0])]
    right = weight_BN @ (powers[:, [2, 1, 0]] * y_N[:, None])
    solved = np.full_like(right, np.nan)
    sound = np.linalg.det(left) > 1e-9 * moment[:, 2] ** 3  # both ~ weight^3 rates^6
    solved[sound] = np.linalg.solve(left[sound], right[sound][..., None])[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        return solved[:, 0], centre - solved[:, 1] / (2 * solved[:, 0])


def _exponents(
    sizes: Sequence[tuple[float, float]], fits: Sequence[_Parabola]
) -> tuple[dict[str, float], dict[str, Interval]]:
    varied = [(k, name) for k, name in enumerate(("width", "depth")) if len({size[k] for size in sizes}) > 1]
    columns = [np.ones(len(sizes)), *(np.log([size[k] for size in sizes]) for k, _ in varied)]
    design = np.stack(columns, 1)
    if not varied or np.linalg.matrix_rank(design) < len(columns):
        return {}, {}
    project = np.linalg.pinv(design)
    rule = project @ np.array([fit.vertex for fit in fits])
    again = project @ np.stack([fit.vertex_B for fit in fits])
    names = [name for _, name in varied]
    return (
        {name: float(rule[i]) for i, name in enumerate(names, start=1)},
        {name: _interval(again[i]) for i, name in enumerate(names, start=1)},
    )


def _interval(values: Floats) -> Interval:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
