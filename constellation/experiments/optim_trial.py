"""One training run of `bench optim`: a frozen request, a JSON file when it is done.

The rate follows one shape for all: up linearly over the first twentieth, down linearly to zero. Time is the
CPU time of this process, with one thread, in the steps alone: batch, forward, backward, update; evaluations
are not counted. A request's file is named by the hash of its content, so that a second call finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import time
import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from constellation.errors import ConstellationError
from constellation.experiments.optim_peers import ROWS, Optimizer
from constellation.experiments.optim_tasks import TASKS, Task, TaskProblem
from constellation.storage.atomic import read_json, write_json

WARM_UP = 0.05
LOOKS = 12  # evaluations along a run whose curve is kept


@dataclass(frozen=True)
class Trial:
    """One training run. `steps` counts, or `seconds` of CPU time where steps = 0."""

    task: str
    row: str
    phase: str  # tune | run
    seed: int
    lr: float
    knob: float
    steps: int
    seconds: float = 0.0
    rung: float = 1.0
    study: int = 0
    curve: bool = False
    data: str = ""  # hash of the data

    @cached_property
    def file(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.task}.{self.row}.{self.phase}.{digest}.json"

    def estimate_s(self) -> float:
        """CPU-seconds expected; only for the bar and the announcement."""
        step_s = TASKS[self.task].step_ms / 1000
        looks = (LOOKS if self.curve else 1) * 3 * step_s  # held-out data are a few batches
        return (self.seconds or self.steps * step_s * ROWS[self.row].cost) + looks + 0.05


def perform(trial: Trial, data: Path, folder: Path) -> dict[str, Any]:
    """Do `trial` unless its file is there; what is in the file."""
    path = folder / trial.file
    if path.exists() and (found := dict(read_json(path)))["outcome"] != "error":
        return found
    torch.set_num_threads(1)
    torch.manual_seed(trial.seed)  # peers that draw from the global generator
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        result = {**asdict(trial), **train(trial, TASKS[trial.task], data)}
    write_json(path, result)
    return result


def train(trial: Trial, task: Task, data: Path) -> dict[str, Any]:
    """metric, cpu_s, steps, outcome: done, diverged (the loss is no number), failed (a refusal) or error (a bug)."""
    row = ROWS[trial.row]
    result: dict[str, Any] = {"metric": None, "cpu_s": 0.0, "done": 0, "curve": [], "train": []}
    try:
        problem = task.build(data, trial.seed)
        optimizer = row.build(problem, trial.lr, trial.knob)
        outcome = trained(trial, task, problem, optimizer, result)
        if outcome == "done" and not math.isfinite(result["metric"]):
            outcome, result["metric"] = "diverged", None
    except ConstellationError as error:
        return {**result, "outcome": "failed", "reason": str(error)}
    except (torch.linalg.LinAlgError, FloatingPointError) as error:
        return {**result, "outcome": "diverged", "reason": str(error)[:300]}
    except Exception as error:  # one broken row must not end hours of the others; it is reported and tried again
        return {**result, "outcome": "error", "reason": f"{type(error).__name__}: {error}"[:500]}
    stats: dict[str, Any] = getattr(optimizer, "get_stats", dict)() if trial.curve else {}
    plain = {k: float(v) for k, v in stats.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    return {**result, "outcome": outcome, "stats": plain}


def trained(trial: Trial, task: Task, problem: TaskProblem, optimizer: Optimizer, result: dict[str, Any]) -> str:
    row = ROWS[trial.row]
    rates = [group["lr"] for group in optimizer.param_groups]
    switch = getattr(optimizer, "train", None), getattr(optimizer, "eval", None)  # schedule-free's two sets of weights
    step, spent, looked = 0, 0.0, 0

    def look() -> float:
        if switch[1]:
            switch[1]()
        value = problem.metric()
        if switch[0]:
            switch[0]()
        return value

    if switch[0]:
        switch[0]()
    while (progress := step / trial.steps if trial.steps else spent / trial.seconds) < 1:
        if trial.curve and progress * LOOKS >= looked:
            looked += 1
            result["curve"].append([step, round(spent, 4), look()])
        began = time.process_time()
        up = (step + 1) / (WARM_UP * trial.steps) if trial.steps else progress / WARM_UP + 1e-3
        factor = {"linear": min(1.0, up, 1 - progress), "flat": min(1.0, up), "none": 1.0}[row.rate]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        x, y = problem.batch(step)
        loss = problem.loss(problem.outputs(x), y)
        loss.backward()
        if row.sees:
            part = max(1, round(task.curvature * len(y)))
            known: dict[str, Any] = {"telemetry": {"loss": float(loss.detach())}} if row.gate else {}
            if problem.jacobian and row.rate == "none":
                known["jacobian"] = problem.jacobian
            optimizer.step(logits=lambda x=x, n=part: problem.rows(x[:n]), targets=problem.targets(y[:part]), **known)
        else:
            optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        spent, step = spent + time.process_time() - began, step + 1
        if trial.curve:
            result["train"].append(round(value, 6))
        if not math.isfinite(value):
            result.update(cpu_s=spent, done=step, train=[], curve=[])
            return "diverged"
    result.update(metric=look(), cpu_s=spent, done=step)
    if trial.curve:
        result["curve"].append([step, round(spent, 4), result["metric"]])
        chunk = max(1, len(result["train"]) // 60)
        parts = [result["train"][i : i + chunk] for i in range(0, len(result["train"]), chunk)]
        result["train"] = [[(i + 1) * chunk, round(sum(p) / len(p), 6)] for i, p in enumerate(parts)]
    return "done"
