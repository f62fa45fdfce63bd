"""Figures: panels, two in a row, drawn without a display, as PNG or SVG.

A panel's title is its signals with their final values and units; several lines are told apart by the legend.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from constellation.errors import ConfigError
from constellation.plots.panel import Curve, scaled
from constellation.storage.atomic import write_bytes

COLUMNS = 2
FORMATS = (".png", ".svg")
FEW = 12  # values of a line that are marked one by one
LEGEND = 12  # lines that a legend names


@dataclass(frozen=True)
class Axes:
    """The curves of one panel. `points`: no line between them; `ticks` name whole numbers on the horizontal axis."""

    curves: tuple[Curve, ...]
    title: str
    log: bool = False
    points: bool = False
    ticks: tuple[str, ...] = ()
    log_x: bool = False


def draw(panels: Sequence[Axes], file: Path, title: str = "") -> Path:
    """Write `file`, .png or .svg; ConfigError for another ending, no panel, or without matplotlib."""
    if file.suffix not in FORMATS:
        raise ConfigError(f"--out {file}: a file that ends in {' or '.join(FORMATS)} is wanted")
    if not panels:
        raise ConfigError("there is nothing to draw; name a signal: --panel loss_nats")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'constellation[plots]'") from None
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.8 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, own in zip(places, panels):
        _panel(place, own)
    for place in places[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(title)
    held = io.BytesIO()
    with rc_context({"svg.hashsalt": "constellation"}):  # the same figure is the same file
        figure.savefig(held, format=file.suffix[1:], dpi=110, metadata={"Date": None} if file.suffix == ".svg" else {})
    write_bytes(file, held.getvalue())
    return file


def final(curve: Curve) -> str:
    """The last finite value of a curve, with its unit."""
    finite = curve.y[np.isfinite(curve.y)]
    if not finite.size:
        return "no value"
    return f"{finite[-1]:.4g}" + ("" if curve.unit == "1" else f" {curve.unit}")


def _label(curve: Curve, own: Axes) -> str:
    return curve.label if own.points else f"{curve.label}: {final(curve)}"


def _panel(place: Any, own: Axes) -> None:
    units = list(dict.fromkeys(curve.unit for curve in own.curves))
    if len(units) > 2:
        raise ConfigError(f"one panel shows at most two units, these have {', '.join(units)}; use --panel again")
    sides = {unit: place if i == 0 else place.twinx() for i, unit in enumerate(units)}
    along, x_name = scaled(np.concatenate([c.x for c in own.curves] or [np.zeros(1)]), own.curves[0].x_unit)
    scales = {u: scaled(np.concatenate([c.y for c in own.curves if c.unit == u]), u) for u in units}
    lines = []
    for i, curve in enumerate(own.curves):
        factor, _ = scales[curve.unit]
        side, look = (
            sides[curve.unit],
            {"color": f"C{i % 10}", "lw": 1.4, "ls": "" if own.points else "-", "ms": 3.5},
        )
        look["marker"] = "o" if own.points or len(curve.x) <= FEW else None
        lines += side.plot(curve.x * along, curve.y * factor, label=_label(curve, own), **look)
        if curve.stderr is not None:
            low, high = ((curve.y + sign * curve.stderr) * factor for sign in (-1, 1))
            side.fill_between(curve.x * along, low, high, color=look["color"], alpha=0.2, lw=0)
        if curve.truth is not None:
            side.plot(curve.x * along, curve.truth * factor, color=look["color"], ls="--", lw=0.9)
    for unit, side in sides.items():
        side.set_ylabel({"1": ""}.get(scales[unit][1], scales[unit][1]))
        if own.log:
            side.set_yscale("log")
    place.set_xlabel(x_name)
    if own.log_x:
        place.set_xscale("log")
    place.grid(alpha=0.25)
    only = own.curves[0] if len(own.curves) == 1 else None
    place.set_title(_label(only, own) if only else own.title, fontsize=10)
    if own.ticks:
        place.set_xticks(range(len(own.ticks)), own.ticks, rotation=90 if len(own.ticks) > 8 else 0, fontsize=8)
    if len(lines) > 1:
        place.legend(handles=lines[:LEGEND], fontsize=7, title=f"{len(lines)} lines" if len(lines) > LEGEND else None)
