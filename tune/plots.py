"""Figures of a sweep, PNG and SVG, without a display. No Ray here.

ranking      the best trials' difference to the best, with intervals       importance  beside the shuffled metric's
best_so_far  against FLOPs, CPU-seconds, the sweep's clock                 parallel    a line a trial
slices       the metric against each setting                              contour     of the two most important
transfer     lr* over the sizes, when the sweep varied them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from constellation.errors import ConfigError
from tune.analysis import Floats, best_so_far
from tune.findings import SweepReport, ranked
from tune.importance import Entry, cells, is_log, searched, unit

RANKED, LINES, POINTS = 25, 300, 5000  # shown at most: the best, and an even choice of the rest
SLICE_COLUMNS = 4


def plot(found: SweepReport, folder: Path) -> list[Path]:
    """Write what can be drawn; a ConfigError without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'constellation[plots]'") from None
    drawings: list[tuple[str, Callable[[SweepReport, Any], Any]]] = [
        ("ranking", _ranking), ("importance", _importance), ("best_so_far", _best_so_far), ("parallel", _parallel),
        ("slices", _slices), ("contour", _contour), ("transfer", _transfer),
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context({"font.size": 9, "svg.hashsalt": "constellation", "axes.grid": True, "grid.alpha": 0.25}):
        for name, draw in drawings:
            figure = draw(found, Figure)
            if figure is None:
                continue
            for kind in ("png", "svg"):
                written.append(folder / f"{name}.{kind}")
                figure.savefig(written[-1], dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return written


def _ranking(found: SweepReport, Figure: Any) -> Any:
    order = ranked(found)
    rows = order[:RANKED]
    if found.default is not None and found.default not in rows:
        rows = [*rows, found.default]
    if not rows:
        return None
    figure = Figure(figsize=(7.5, 1.4 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        gap, best = found.to_best.get(row), row == found.best
        if gap is not None and gap.low is not None and gap.high is not None:
            axis.plot([gap.low, gap.high], [place, place], color="C3" if gap.shown else "C0", lw=1.6)
        if best or gap is not None:
            known = best or (gap is not None and gap.low is not None)
            colour = "black" if best else "C3" if gap is not None and gap.shown else "C0"
            value = 0.0 if best or gap is None else gap.mean
            axis.plot([value], [place], "o" if known else "x", color=colour, ms=5)
    axis.axvline(0, color="black", lw=0.8, ls="--")
    labels = [f"{found.history.trials[found.standings.numbers[r]].origin} {found.standings.numbers[r]}" for r in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set_xlabel(f"{found.metric} minus the best's, paired seeds, 95 % interval\n(cross: one seed, no interval)")
    axis.set_title(f"{len(rows)} of {len(order)} trials; red: the interval excludes zero", fontsize=9)
    return figure


def _importance(found: SweepReport, Figure: Any) -> Any:
    if not found.importance:
        return None
    figure = Figure(figsize=(7.5, 1.4 + 0.36 * len(found.importance)), layout="constrained")
    axis = figure.subplots()
    for place, i in enumerate(found.importance):
        colour = "C0" if i.verdict == "matters" else "C7"
        axis.barh(place, i.null_high, color="C1", alpha=0.35, height=0.7, label=None if place else "shuffled, 97.5 %")
        axis.plot([i.low, i.high], [place, place], color=colour, lw=1.8)
        axis.plot([i.value], [place], "o", color=colour, ms=5)
    axis.set_yticks(range(len(found.importance)), [i.name for i in found.importance])
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=max(1e-3, max(i.null_high for i in found.importance)))
    axis.set_xlim(left=0)
    axis.set_xlabel("importance (Pearson divergence), 95 % interval; grey: not distinguishable from noise")
    axis.legend(loc="lower right")
    return figure


def _best_so_far(found: SweepReport, Figure: Any) -> Any:
    so_far = best_so_far(found.history, found.standings)
    if not np.isfinite(so_far.metric_N).any():
        return None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    spent = (("FLOPs", so_far.flops_N), ("CPU-seconds", so_far.cpu_s_N), ("the sweep's clock, s", so_far.clock_N))
    for axis, (label, x) in zip(panels, spent):
        axis.step(x, so_far.metric_N, where="post", lw=1.6)
        axis.set_xlim(left=0)
        axis.set_xlabel(f"{label}, failed and stopped charged" if axis is panels[0] else label)
    seed = found.standings.seeds[0]
    panels[0].set_ylabel(f"best {found.metric} so far\n(rung {found.standings.rung}, seed {seed})")
    return figure


def _parallel(found: SweepReport, Figure: Any) -> Any:
    entries, order = searched(found.history.request), found.standings.order_T()
    rows = _chosen(order, LINES)
    if not entries or not len(rows):
        return None
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    height = np.stack([unit(e, _values(found, e, rows)) for e in entries], 1)
    share = np.argsort(np.argsort(order[rows])) / max(1, len(rows) - 1)
    figure = Figure(figsize=(max(6.0, 1.5 * len(entries) + 1), 4.6), layout="constrained")
    axis = figure.subplots()
    place = np.arange(len(entries))
    backwards = np.argsort(-share)
    shake = np.random.default_rng(0).uniform(-0.015, 0.015, height.shape)  # lines of one choice are told apart
    lines = np.stack([np.broadcast_to(place, height.shape), height + shake], -1)[backwards]
    colour = colormaps["viridis"](share[backwards])
    lines_drawn = LineCollection(list(lines), colors=colour, linewidths=np.where(share < 0.1, 1.6, 0.5)[backwards])
    lines_drawn.set_rasterized(True)
    axis.add_collection(lines_drawn)
    for at, entry in enumerate(entries):
        axis.axvline(at, color="black", lw=0.8)
        for at_height, text in _ticks(entry):
            axis.text(
                at + 0.03, at_height, text, fontsize=7, va="center", bbox={"fc": "white", "ec": "none", "pad": 0.5}
            )
    axis.set_xlim(-0.2, len(entries) - 0.6)
    axis.set_ylim(-0.06, 1.06)
    axis.set_xticks(place, [e["name"].replace(".", ".\n") for e in entries])
    axis.set_yticks([])
    finished = int(np.isfinite(order).sum())
    axis.set_title(f"{len(rows)} of {finished} finished trials; dark and thick: the best tenth of them", fontsize=9)
    return figure


def _slices(found: SweepReport, Figure: Any) -> Any:
    entries = searched(found.history.request)
    rungs = [r for r in range(found.standings.loss_TRS.shape[1]) if np.isfinite(found.standings.loss_TRS[:, r]).any()]
    if not entries or not rungs:
        return None
    columns = min(SLICE_COLUMNS, len(entries))
    lines = math.ceil(len(entries) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.8 * lines + 0.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns, sharey=True)).ravel()
    every = _mean_TR(found)
    shown = every[np.isfinite(every)]
    for axis, entry in zip(panels, entries):
        for rung in rungs:
            rows = _chosen(every[:, rung], POINTS // len(rungs))
            x = _place(entry, _values(found, entry, rows))
            axis.plot(
                x, every[rows, rung], ".", ms=4, alpha=0.6, color="C0" if rung == rungs[-1] else f"C{rung + 1}",
                label=f"rung {rung}", rasterized=True,
            )  # fmt: skip
        axis.set_xlabel(entry["name"])
        _scale(axis, entry, "x")
    low, high = float(shown.min()), float(np.quantile(shown, 0.95))
    panels[0].set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9)
    for line in range(lines):
        panels[line * columns].set_ylabel(found.metric)
    for axis in panels[len(entries) :]:
        axis.set_visible(False)
    if len(rungs) > 1:
        panels[0].legend(fontsize=7)
    return figure


def _contour(found: SweepReport, Figure: Any) -> Any:
    """The rung with most trials, so that the surface is not drawn through the few that were promoted."""
    entries = {e["name"]: e for e in searched(found.history.request)}
    names = [i.name for i in found.importance[:2]]
    if len(names) < 2:
        return None
    every = _mean_TR(found)
    rung = int(np.argmax(np.isfinite(every).sum(0)))
    rows = _chosen(every[:, rung], POINTS)
    first, second = (entries[name] for name in names)
    x, y = (_place(entry, _values(found, entry, rows)) for entry in (first, second))
    z = every[rows, rung]
    top = float(np.quantile(z, 0.9))
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    _scale(axis, first, "x")
    _scale(axis, second, "y")
    colours = {"cmap": "viridis", "vmin": float(z.min()), "vmax": top}
    if "choice" not in (first["prior"], second["prior"]) and len(rows) >= 30:
        _surface(axis, first, second, x, y, np.minimum(z, top), colours)
    points = axis.scatter(x, y, c=z, s=14, edgecolors="white", linewidths=0.3, rasterized=True, **colours)
    figure.colorbar(points, ax=axis, label=f"{found.metric} at rung {rung}", extend="max")
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    return figure


def _surface(axis: Any, first: Entry, second: Entry, x: Floats, y: Floats, z: Floats, colours: dict[str, Any]) -> None:
    """A mean over the neighbours, by Gaussian weights a tenth of the range wide, where there are any."""
    u, v = (np.log(p) if is_log(e) else p for e, p in ((first, x), (second, y)))
    grids = [np.linspace(w.min(), w.max(), 40) for w in (u, v)]
    spread = [max(float(np.ptp(w)) / 10, 1e-12) for w in (u, v)]
    near_x, near_y = (np.exp(-0.5 * ((g[:, None] - w) / s) ** 2) for g, w, s in zip(grids, (u, v), spread))
    weight = near_y @ near_x.T
    height = (near_y * z) @ near_x.T / np.maximum(weight, 1e-300)
    across, up = (np.exp(g) if is_log(e) else g for e, g in ((first, grids[0]), (second, grids[1])))
    axis.contourf(across, up, np.where(weight > 0.3, height, np.nan), levels=12, alpha=0.7, **colours)


def _transfer(found: SweepReport, Figure: Any) -> Any:
    if not found.transfer:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    sides = [(panels[0], "width", "depth"), (panels[1], "depth", "width")]
    for axis, along, _ in sides:
        axis.set_visible(any(len({getattr(o, along) for o in rule.optima}) > 1 for rule in found.transfer))
    for group, rule in enumerate(found.transfer):
        name = ", ".join(map(str, rule.group.values()))
        for axis, along, other in sides:
            for fixed in sorted({getattr(o, other) for o in rule.optima}):
                line = [o for o in rule.optima if getattr(o, other) == fixed and o.rate and o.interval]
                if not line:
                    continue
                x, rate = [getattr(o, along) for o in line], [o.rate for o in line]
                bars = np.abs(np.array([o.interval for o in line]).T - np.array(rate))
                axis.errorbar(
                    x, rate, yerr=bars, marker="os^D"[group % 4], capsize=3, lw=1,
                    label=" ".join(filter(None, (name, f"{other} {fixed:g}"))),
                )  # fmt: skip
            slope, ends = rule.exponents.get(along), rule.intervals.get(along)
            if slope is not None and ends is not None:
                told = f"{name} lr* ~ {along}^{slope:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]".strip()
                axis.set_title("\n".join(filter(None, (axis.get_title(), told))), fontsize=8)
            _logarithmic(axis, "x", sorted({getattr(o, along) for o in rule.optima}))
            axis.set_yscale("log")
            axis.set_xlabel(along)
    for axis in panels:
        axis.set_ylabel("lr*, 95 % interval")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6, ncols=2, framealpha=0.6)
    return figure


def _logarithmic(axis: Any, which: str, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    side = getattr(axis, f"{which}axis")
    side.set_minor_locator(NullLocator())
    side.set_minor_formatter(NullFormatter())


def _scale(axis: Any, entry: Entry, which: str) -> None:
    if entry["prior"] == "choice":
        choices = entry["choices"]
        getattr(axis, f"set_{which}ticks")(range(len(choices)), [str(c) for c in choices])
        getattr(axis, f"set_{which}lim")(-0.5, len(choices) - 0.5)
    elif is_log(entry):
        getattr(axis, f"set_{which}scale")("log")


def _values(found: SweepReport, entry: Entry, rows: Sequence[int] | Any) -> list[Any]:
    trials, numbers = found.history.trials, found.standings.numbers
    return [trials[numbers[t]].settings.get(entry["name"], entry.get("default")) for t in rows]


def _place(entry: Entry, values: Sequence[Any]) -> Floats:
    """Where values stand on an axis: numbers as they are, choices by their number with a little noise."""
    if entry["prior"] != "choice":
        return np.array(values, np.float64)
    return cells(entry, values) + np.random.default_rng(0).uniform(-0.2, 0.2, len(values))


def _ticks(entry: Entry) -> list[tuple[float, str]]:
    if entry["prior"] == "choice":
        last = max(1, len(entry["choices"]) - 1)
        return [(i / last, str(c)) for i, c in enumerate(entry["choices"])]
    low, high = float(entry["low"]), float(entry["high"])
    middle = math.sqrt(low * high) if is_log(entry) else (low + high) / 2
    return [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]


def _mean_TR(found: SweepReport) -> Floats:
    loss = found.standings.loss_TRS
    known = np.isfinite(loss)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, loss, 0.0).sum(-1) / known.sum(-1))


def _chosen(values: Floats, most: int) -> Any:
    """Rows with a value, best first; of more than `most` the best half and an even choice of the others."""
    rows = np.flatnonzero(np.isfinite(values))
    rows = rows[np.argsort(values[rows], kind="stable")]
    if len(rows) <= most:
        return rows
    half = most // 2
    return np.concatenate([rows[:half], rows[half :: math.ceil((len(rows) - half) / (most - half))]])
