"""J and kappa against the context length, an arm a line, with the running law that was fitted to each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from constellation.errors import ConfigError

QUANTITIES = {"coupling": "J, radians", "kappa": "kappa, 64 = this kernel at the shortest length"}


def plot(result: Mapping[str, Any], out: Path) -> list[Path]:
    """One PNG a quantity, beside `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'constellation[plots]'") from None
    return [_figure(Figure, result, q, out.with_name(f"{out.stem}_{q}.png")) for q in QUANTITIES]


def _figure(kind: Any, result: Mapping[str, Any], quantity: str, path: Path) -> Path:
    figure = kind(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    lengths = np.array(result["context_lengths"], float)
    many = np.geomspace(lengths[0], lengths[-1], 100)
    for at, (name, arm) in enumerate(result["arms"].items()):
        y_DL, law = np.array(arm["documents"][quantity]), arm["fits"][quantity]
        error = y_DL.std(0, ddof=1) / np.sqrt(len(y_DL))
        beta = law["running"]["value"]
        label = f"{name}, beta {'none' if beta is None else f'{beta:.2f}'}"
        axes.errorbar(lengths, y_DL.mean(0), error, fmt="o", ms=4, capsize=2, color=f"C{at}", label=label)
        slope, mean = np.polyfit(np.log(lengths), y_DL.mean(0), 1)
        axes.plot(many, mean + slope * np.log(many), color=f"C{at}", lw=1)
    if result["trained_context"] < lengths[-1]:
        axes.axvline(result["trained_context"], color="0.6", ls=":", lw=1)
        axes.text(result["trained_context"], axes.get_ylim()[1], " trained context", va="top", fontsize=8, color="0.4")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{int(n)}" for n in lengths])
    axes.set_xlabel("context length, tokens")
    axes.set_ylabel(QUANTITIES[quantity])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return path
