"""Recipes: which panels answer a usual question, each a function of folders and an axis.

    kernels          models beside each other: loss, held-out text, gradient norm, rate
    constellations   whole constellations: loss and held-out text of every model against the tokens it has seen
    optimizers       runs by their optimizer: loss against steps and against seconds, gradient norm, way from the start
    routers          a fitted router: priors, angles between kernels, spectrum, how far is too far
    sweeps           OUT/report.json: best so far, and the metric against every number that was searched

The sweep's report has `trials`, a list of {"settings": {name: value}, "metric": number or null, ...}, in the order in
which they ended, and says with `metric` what they are compared by and with `mode` whether "min" or "max" is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from constellation.artifacts.saved import SavedRun, open_run
from constellation.artifacts.table import find
from constellation.errors import ArtifactError, ConfigError
from constellation.plots.figure import Axes
from constellation.plots.panel import Curve, Shown, curves
from constellation.storage import array_file
from constellation.storage.atomic import read_object

NAMED = 6  # numbers searched by a sweep that get a panel each


def runs_in(folders: Sequence[Path]) -> list[tuple[str, SavedRun]]:
    """Every run in `folders` with a name that tells them apart; ConfigError when there is none in one of them."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; name a run, a constellation or an experiment")
        own = [Path(file).parent for file in find(str(folder), "meta.json")]
        if not own:
            raise ConfigError(f"{folder} holds no run (no meta.json); train one: constellation train --run {folder}")
        found += own
    found = list(dict.fromkeys(path.resolve() for path in found))
    if len(found) == 1:
        return [("", open_run(found[0]))]
    deep = 1 if len({path.name for path in found}) == len(found) else 2
    return [("/".join(path.parts[-deep:]), open_run(path)) for path in found]


def panels_of(runs: Sequence[tuple[str, SavedRun]], shown: Sequence[Shown], axis: str, log: bool = False) -> Axes:
    """One panel: these signals of these runs."""
    prefix = [f"{name} " if name else "" for name, _ in runs]
    lines = [line for p, (_, run) in zip(prefix, runs) for one in shown for line in curves(run, one, axis, p)]
    return Axes(tuple(lines), ", ".join(map(str, shown)), log)


def kernels(folders: Sequence[Path], axis: str) -> list[Axes]:
    return _some(runs_in(folders), axis, "loss_smooth", "dev_bits_per_byte", "grad_norm", "lr")


def constellations(folders: Sequence[Path], axis: str) -> list[Axes]:
    return _some(runs_in(folders), "tokens", "loss_smooth", "dev_bits_per_byte")


def optimizers(folders: Sequence[Path], axis: str) -> list[Axes]:
    runs = [(f"{name} {run.meta['config']['optim']['name']}".strip(), run) for name, run in runs_in(folders)]
    timed = [(name, run) for name, run in runs if "wall_s" in run.signals]
    return [
        *_some(runs, "step", "loss_smooth"),
        *_some(timed, "wall_s", "loss_smooth"),
        *_some(runs, "step", "grad_norm", "theta_moved"),
    ]


def routers(folders: Sequence[Path], axis: str) -> list[Axes]:
    found = []
    for folder in folders:
        header, arrays = array_file.read(folder / "router" if (folder / "router").is_dir() else folder, "router")
        label = "" if len(folders) == 1 else f"{folder.name} "
        names, counts = list(header["names"]), arrays["kernel_counts"].astype(float)
        points = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1e-300))
        angles = 2 * np.arccos(np.clip(points @ points.T, -1, 1))
        number, spread = np.arange(len(names), dtype=float), arrays["spread"]
        prior = np.exp(arrays["log_prior"] - np.logaddexp.reduce(arrays["log_prior"]))
        found += [
            Axes((_points(f"{label}prior", number, prior, "kernel"),), "prior", points=True, ticks=tuple(names)),
            Axes(
                tuple(_points(f"{label}{n} to", number, angles[i], "kernel", "rad") for i, n in enumerate(names)),
                "Fisher-Rao angle between kernels", points=True, ticks=tuple(names),
            ),
            Axes((_points(f"{label}spread", np.arange(len(spread)), spread, "direction"),), "spread"),
            Axes(
                (_points(f"{label}abstains beyond", arrays["limit_bytes"], arrays["limit_rad"], "bytes read", "rad"),),
                "abstains beyond",
            ),
        ]  # fmt: skip
    return found


def sweeps(folders: Sequence[Path], axis: str) -> list[Axes]:
    found = []
    for folder in folders:
        report = read_object(folder / "report.json")
        trials = report.get("trials")
        if not isinstance(trials, list) or not all(isinstance(trial, dict) for trial in trials):
            raise ArtifactError(f"{folder / 'report.json'} has no list of trials; it is not the report of a sweep")
        name, largest = str(report.get("metric", "metric")), report.get("mode") == "max"
        metric = np.array([_number(trial.get("metric")) for trial in trials])
        if not np.isfinite(metric).any():
            raise ArtifactError(f"{folder / 'report.json'}: none of {len(trials)} trials has a metric; nothing to draw")
        worst = np.where(np.isfinite(metric), metric, -np.inf if largest else np.inf)
        best = (np.maximum if largest else np.minimum).accumulate(worst)
        number = np.arange(1, len(trials) + 1, dtype=float)
        found.append(Axes((_points(f"{folder.name} best {name}", number, best, "trials"),), "best so far"))
        found.append(Axes((_points(f"{name} of every trial", number, metric, "trials"),), name, points=True))
        for setting in _searched(trials)[:NAMED]:
            x = np.array([_number(_settings(trial).get(setting)) for trial in trials])
            order = np.argsort(x)
            found.append(Axes((_points(name, x[order], metric[order], setting),), name, points=True, log_x=_decades(x)))
    return found


RECIPES: dict[str, Callable[[Sequence[Path], str], list[Axes]]] = {
    "kernels": kernels,
    "constellations": constellations,
    "optimizers": optimizers,
    "routers": routers,
    "sweeps": sweeps,
}


def _some(runs: Sequence[tuple[str, SavedRun]], axis: str, *names: str) -> list[Axes]:
    """A panel for each of `names`, of the runs that have it; none where no run does."""
    found = []
    for name in names:
        own = [(label, run) for label, run in runs if name in run.signals]
        if own:
            found.append(panels_of(own, [Shown(name)], axis))
    return found


def _points(label: str, x: NDArray[Any], y: NDArray[Any], x_unit: str, unit: str = "1") -> Curve:
    return Curve(label, np.asarray(x, float), np.asarray(y, float), x_unit, unit)


def _settings(trial: Mapping[str, Any]) -> Mapping[str, Any]:
    own = trial.get("settings")
    return own if isinstance(own, Mapping) else {}


def _searched(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are numbers and differ between trials."""
    names = dict.fromkeys(name for trial in trials for name in _settings(trial))
    return [n for n in names if len({v for t in trials if np.isfinite(v := _number(_settings(t).get(n)))}) > 1]


def _decades(x: NDArray[np.float64]) -> bool:
    """Whether positive values span a hundredfold."""
    own = x[np.isfinite(x)]
    return bool(own.size and own.min() > 0 and own.max() / own.min() >= 100)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
