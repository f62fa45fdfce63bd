"""Sweeps of known truth, recorded as real ones are: the machine of tune/sweep.py told what a formula says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from constellation.presets import preset
from tune.events import LOG, SCHEMA
from tune.history import Cost, Evaluation, Outcome, Trial
from tune.request import SweepRequest
from tune.schedulers import make_scheduler
from tune.space import Dimension, Space
from tune.sweep import Start

RATE = Dimension("optim.lr", "log", 3e-3, low=1e-4, high=1.0)
WARMUP = Dimension("train.warmup", "uniform", 0.05, low=0.0, high=0.9)  # changes nothing
LAYERS = Dimension("kernel.layers", "int", 3, low=1, high=8)
METRIC = Dimension("kernel.metric", "choice", "fidelity", values=("fidelity", "dot"))
BEST_RATE = 1e-2


def truth(settings: dict[str, Any]) -> float:
    """Loss without noise: the rate matters most, then the metric, the layers least, the warmup not at all."""
    rate = math.log10(settings["optim.lr"] / BEST_RATE)
    return 2 + 0.2 * rate**2 + 0.15 * (settings["kernel.metric"] == "dot") + 0.005 * abs(settings["kernel.layers"] - 5)


def record(
    out: Path,
    *,
    trials: int = 40,
    seeds: int = 1,
    scheduler: str = "none",
    search: str = "random",
    workers: int = 2,
    noise: float = 0.005,
    dimensions: tuple[Dimension, ...] = (RATE, WARMUP, LAYERS, METRIC),
    loss: Callable[[dict[str, Any]], float] = truth,
    fails: Callable[[dict[str, Any]], bool] = lambda settings: False,
) -> SweepRequest:
    """Write OUT/events.jsonl; a whole evaluation lasts 90 s, and a seed shifts all its trials by the same amount."""
    space = Space("synthetic", "", "model", "dev_bits_per_byte", {}, dimensions, {})
    rungs = make_scheduler(scheduler, space, trials).rungs
    request = SweepRequest(space, preset("tiny"), None, 1e6, trials, workers, seeds, 0, search, scheduler, rungs)
    lines: list[dict[str, Any]] = [{"event": "begun", "schema": SCHEMA, "request": request.to_json()}]
    sweep = request.sweep(lambda event, **values: lines.append({"event": event, **values}))
    made: dict[Evaluation, Outcome] = {}
    while action := sweep.next():
        if isinstance(action, Start):
            made[action.evaluation] = _outcome(action.trial, action.evaluation, action.share, noise, loss, fails)
        else:
            sweep.tell(action.evaluation, made.pop(action.evaluation))
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return request


def _outcome(
    trial: Trial, evaluation: Evaluation, share: float, noise: float,
    loss: Callable[[dict[str, Any]], float], fails: Callable[[dict[str, Any]], bool],
) -> Outcome:  # fmt: skip
    draw = np.random.default_rng([evaluation.trial, evaluation.rung, evaluation.seed])
    cost = Cost(1e6 * share, 1e12 * share, 80 * share, 90 * share)
    if fails(trial.settings):
        return Outcome("failed", None, "diverged at step 12", cost)
    shift = 0.05 * math.sin(evaluation.seed + 1) + 0.3 * (1 - share)
    return Outcome("done", loss(trial.settings) + shift + noise * float(draw.normal()), "", cost)
