"""Panels: what one set of axes shows, as the command line names it.

    loss_nats                  a scalar signal
    loss_nats,loss_smooth      several in one panel; a second unit has the right-hand axis
    theta:components           a vector signal, a line an entry
    theta:summary              its root mean square and its norm over the entries
    theta:hybrid=3             root mean square and the 3 entries that are largest at the end
    theta:residual             values - truth; of a vector its root mean square

A vector signal alone is shown as its summary. Everything is read from signals (artifacts/saved.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from constellation.artifacts.saved import SavedRun
from constellation.artifacts.signal import Signal
from constellation.errors import ArtifactError, ConfigError

MODES = ("components", "summary", "hybrid", "residual")
TOP = 5  # entries of hybrid, unless it says how many
MOST = 64  # lines of components
AXES = ("step", "tokens", "wall_s")


@dataclass(frozen=True)
class Curve:
    """One line: y (R,) against x (R,), with a band of one standard error where there is one."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x_unit: str
    unit: str
    stderr: NDArray[np.float64] | None = None
    truth: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Shown:
    """One signal of a panel and how its entries are shown."""

    name: str
    mode: str | None = None
    top: int = TOP

    def __str__(self) -> str:
        return self.name + (f":{self.mode}" if self.mode else "")


def panel(words: str) -> tuple[Shown, ...]:
    """The panel that `words` name; ConfigError when they name none."""
    found = []
    for word in words.split(","):
        name, _, mode = word.strip().partition(":")
        mode, _, top = mode.partition("=")
        if not name or (mode and mode not in MODES) or (top and (mode != "hybrid" or not top.isdecimal())):
            raise ConfigError(f"--panel {words!r}: SIGNAL or SIGNAL:MODE is wanted, MODE one of {', '.join(MODES)},"
                              " hybrid=N for its N largest")  # fmt: skip
        found.append(Shown(name, mode or None, int(top) if top else TOP))
    return tuple(found)


def curves(run: SavedRun, shown: Shown, axis: str = "step", prefix: str = "") -> list[Curve]:
    """The lines of one signal of `run`; ArtifactError when it, or the axis, is not there."""
    signal = run.signal(shown.name)
    if shown.mode == "residual" and signal.truth is None:
        raise ArtifactError(f"{run.path}: {shown.name} has no truth, so there is no residual; choose another mode")
    signal = signal.residual() if shown.mode == "residual" else signal
    x, x_unit = _along(run, signal, axis)
    label = prefix + (str(shown) if shown.mode == "residual" else shown.name)
    if signal.is_scalar:
        if shown.mode in ("components", "hybrid", "summary"):
            raise ConfigError(f"--panel {shown}: {shown.name} is one number a step; leave :{shown.mode} out")
        truth = None if signal.truth is None else np.broadcast_to(signal.truth, signal.values.shape)
        return [Curve(label, x, signal.values, x_unit, signal.unit, signal.stderr, truth)]
    entries = signal.values.reshape(len(signal.values), -1)
    rms = Curve(f"{label} rms", x, np.sqrt(np.square(entries).mean(1)), x_unit, signal.unit)
    if shown.mode == "residual":
        return [rms]
    if shown.mode in (None, "summary"):
        return [rms, Curve(f"{label} norm", x, np.linalg.norm(entries, axis=1), x_unit, signal.unit)]
    every = np.arange(entries.shape[1])
    if shown.mode == "components" and len(every) > MOST:
        raise ConfigError(f"--panel {shown}: {len(every)} lines, at most {MOST}; take hybrid={TOP} or summary")
    last = np.abs(entries[-1]) if len(entries) else np.zeros(len(every))
    chosen = every if shown.mode == "components" else np.sort(np.argsort(-last, kind="stable")[: shown.top])
    lines = [_entry(signal, entries, i, f"{prefix}{shown.name}[{i}]", x, x_unit) for i in chosen.tolist()]
    return lines if shown.mode == "components" else [rms, *lines]


def _entry(
    signal: Signal, entries: NDArray[np.float64], i: int, label: str, x: NDArray[np.float64], x_unit: str
) -> Curve:
    stderr = None if signal.stderr is None else signal.stderr.reshape(entries.shape)[:, i]
    truth = None if signal.truth is None else np.broadcast_to(signal.truth, signal.values.shape)
    own = None if truth is None else truth.reshape(entries.shape)[:, i]
    return Curve(label, x, entries[:, i], x_unit, signal.unit, stderr, own)


def _along(run: SavedRun, signal: Signal, axis: str) -> tuple[NDArray[np.float64], str]:
    """Where each row of `signal` is along `axis`; between the axis's own rows by interpolation."""
    if axis == "step":
        return signal.step.astype(float), "steps"
    along = run.signal(axis)
    return np.interp(signal.step, along.step, along.values), along.unit


def scaled(values: NDArray[np.float64], unit: str) -> tuple[float, str]:
    """(factor, unit) in which the largest of `values` is a number to read: k, M, G of counts, min or h of seconds."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    if unit == "s":
        return (1 / 3600, "h") if largest >= 2 * 3600 else (1 / 60, "min") if largest >= 120 else (1.0, "s")
    if unit in ("tokens", "steps", "bytes"):
        for power, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
            if largest >= power:
                return (1e-3 if letter == "k" else 1 / power), f"{letter} {unit}"
    return 1.0, unit
