"""Loss against steps and against CPU-seconds, one figure a task.

Left: held-out metric along the full run of each row (thin: every seed; thick: seed 0). Middle: the same against
CPU-seconds. Right, where there are several lengths: what fully decayed runs end at, by length, mean over seeds;
the dashed line is tuned AdamW's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from constellation.errors import ConfigError
from constellation.experiments.optim_peers import BASELINE, ROWS
from constellation.experiments.optim_tasks import TASKS


def plot(result: Mapping[str, Any], path: Path) -> list[Path]:
    """PNG files beside `path`, one a task; a ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'constellation[plots]'") from None
    return [_figure(Figure, result, name, path.with_name(f"{path.stem}_{name}.png")) for name in result["summary"]]


def _figure(kind: Any, result: Mapping[str, Any], name: str, path: Path) -> Path:
    task, part = TASKS[name], result["summary"][name]
    runs = [r for r in result["tasks"][name]["runs"] if r["metric"] is not None]
    rows = [n for n in part["rows"] if any(r["row"] == n for r in runs)]
    rows.sort(key=lambda n: part["rows"][n].get("final_mean") or float("inf"))
    several = len({r["rung"] for r in runs}) > 1
    figure = kind(figsize=(15 if several else 10.5, 4.8), layout="constrained")
    axes = figure.subplots(1, 3 if several else 2, sharey=False)
    for row in rows:
        style = _style(row)
        mine = [r for r in runs if r["row"] == row]
        for axis, column in ((axes[0], 0), (axes[1], 1)):
            for run in (r for r in mine if r["curve"]):
                x, y = [p[column] for p in run["curve"]], [p[2] for p in run["curve"]]
                first = run["seed"] == min(r["seed"] for r in mine)
                look = {"lw": 1.8, "label": row} if first else {"lw": 0.5, "alpha": 0.4}
                axis.plot(x, y, **{**style, **look})
        if several:
            lengths = sorted({r["done"] for r in mine})
            ends = [float(np.mean([r["metric"] for r in mine if r["done"] == n])) for n in lengths]
            axes[2].plot(lengths, ends, marker="o", ms=3, lw=1.6, label=row, **style)
    labels = ["steps", "CPU-seconds (one thread)", "steps of a fully decayed run"]
    finals = [r["metric"] for r in runs if r["rung"] == 1.0]
    target = part["rows"].get(BASELINE, {}).get("final_mean")
    for axis, label in zip(axes, labels):
        axis.set_xlabel(label)
        axis.set_ylabel(f"held-out {task.metric}" if not task.log_metric else task.metric)
        axis.grid(alpha=0.25)
        if task.log_metric:
            axis.set_yscale("log")
        elif finals:  # the ends are what is compared; the first steps leave at the top
            low, high = min(finals), float(np.median(finals))
            axis.set_ylim(low - 0.3 * (high - low) - 1e-3, high + 6 * max(high - low, 0.02 * high))
        if target:
            axis.axhline(target, color="black", ls="--", lw=0.8)
    axes[1].set_xlim(left=0, right=_enough(runs))
    axes[0].legend(fontsize=7, ncols=2)
    figure.suptitle(part["title"])
    figure.savefig(path, dpi=110)
    return path


def _style(row: str) -> dict[str, Any]:
    """Baseline black, ours solid, peers dotted."""
    if row == BASELINE:
        return {"color": "black"}
    from matplotlib import colormaps

    order = [n for n in ROWS if n != BASELINE]
    own = ROWS[row].source == "ours"
    return {"color": colormaps["tab20"](order.index(row) % 20), "ls": "-" if own else ":"}


def _enough(runs: list[dict[str, Any]]) -> float:
    """CPU-seconds that show all but the slowest rows: twice the median run."""
    return float(2 * np.median([r["cpu_s"] for r in runs if r["rung"] == 1.0]))
