"""Does the adaptive gate beat never and always taking a natural step, and do phases of a run matter?

On a language model with a basin block, a deep autoencoder of digits and a physics-informed network (optim_tasks.py),
the last two with every parameter in the block. Every arm is AdaptiveMixedQIG over AdamW with another gate; an arm has
the same CPU-seconds of one thread, everything included that the gate measures. The cheap rate is tuned with the gate
shut, the natural rate for each arm, both on a seed of their own; then all arms run on the same seeds, and an arm's
effect is the paired difference of log metric to `never`, with the 95 % interval of Student's t over seeds.

    never, always           the controls; no budget
    early ... fine_tune     one row of the phase table for the whole run, max_overhead 1.3 as by default
    scheduled               the four rows in turn, by default's boundaries
    front, back             always in the first, the last third of the run, never in the rest; no budget
    pays                    whenever kappa is known, unless a nat costs more natural than cheap seconds, and every 50th
                            step whatever it costs, so that its price is known; no budget

Regime, curiosity and basin distance are not told here: the gate has what it measures itself, kappa and prices.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from constellation.errors import ConfigError
from constellation.experiments.harness import described, finish, machine_line
from constellation.experiments.optim_tasks import TASKS, TaskProblem, prepare

CONTROL, TUNING_SEED = "never", 100
CHEAP = (1e-3, 3e-3, 1e-2)  # learning rates of AdamW that are tried
NATURAL = (0.03, 0.3, 1.0)  # of the natural step
WARM_UP = 0.05  # of the CPU-seconds; then down to zero
ARMS = ("never", "always", "early", "middle", "late", "fine_tune", "scheduled", "front", "back", "pays")
PROBLEMS = {"basin": "language model, basin block", "digits": "deep autoencoder", "poisson": "PINN"}


@dataclass(frozen=True)
class GatedRun:
    """One training run; plain data, for another process."""

    task: str
    arm: str
    seed: int
    lr: float
    lr_ng: float
    seconds: float


def optimizer_of(run: GatedRun, problem: TaskProblem) -> Any:
    """AdaptiveMixedQIG with the gate of the arm."""
    from constellation.optim import AdaptiveMixedQIG
    from constellation.optim.gate import get_recommended_config_for_phase as row
    from constellation.optim.registry import AdaptiveConfig, Phase, PhaseSchedule

    free, schedule = AdaptiveConfig(max_overhead=0.0), None
    if run.arm in ("never", "always"):
        gate = replace(row(run.arm), max_overhead=0.0)
    elif run.arm == "pays":
        gate = replace(row("never"), max_overhead=0.0, force_ng_every_n_steps=50, min_kappa_for_ng=0.0, must_pay=True)
    elif run.arm == "scheduled":
        gate, schedule = AdaptiveConfig(), PhaseSchedule()
    elif run.arm in ("front", "back"):
        early: Phase = "always" if run.arm == "front" else "never"
        late: Phase = "never" if run.arm == "front" else "always"
        begins = 1 / 3 if run.arm == "front" else 2 / 3
        gate = free
        schedule = PhaseSchedule(
            middle=begins, late=1.0, fine_tune=1.0, early_gate=early, middle_gate=late, late_gate=late,
            fine_tune_gate=late,
        )  # fmt: skip
    else:
        gate = row(run.arm)
    whole: dict[str, Any] = {} if run.task == "basin" else {"basin": ["*"]}
    exact: dict[str, Any] = {"likelihood": problem.likelihood}
    if run.task == "poisson":
        exact |= {"max_kl": None, "levenberg_marquardt": True, "reduction": "sum"}
    return AdaptiveMixedQIG(
        problem.model, lr_ng=run.lr_ng, lr_rest=run.lr, use_exact_ng=True, weight_decay=0.0, adaptive_config=gate,
        schedule=schedule, clock=time.process_time, basin_options=exact, **whole,
    )  # fmt: skip


@cache
def warm(task: str, data: Path) -> None:
    """Two natural steps that nobody counts: what a process imports and compiles once."""
    _train(GatedRun(task, "always", 0, 1e-3, NATURAL[0], math.inf), data, most=2)


def train(run: GatedRun, data: Path) -> dict[str, Any]:
    """The metric after `seconds` of CPU time, None when the loss was no number; steps and natural steps taken."""
    warm(run.task, data)
    return _train(run, data)


def _train(run: GatedRun, data: Path, most: float = math.inf) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    task = TASKS[run.task]
    problem = task.build(data, run.seed)
    optimizer = optimizer_of(run, problem)
    rates = [group["lr"] for group in optimizer.param_groups]
    step, spent = 0, 0.0
    found: dict[str, Any] = {**vars(run), "metric": None, "steps": 0, "natural": 0.0}
    while (progress := spent / run.seconds) < 1 and step < most:
        began = time.process_time()
        factor = min(1.0, progress / WARM_UP + 1e-3, 1 - progress)
        for number, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
            group["lr"] = rate if number == 0 and run.task == "poisson" else rate * factor  # an exact problem: Newton's
        x, y = problem.batch(step)
        loss = problem.loss(problem.outputs(x), y)
        loss.backward()
        part = max(1, round(task.curvature * len(y)))
        optimizer.step(
            logits=lambda x=x, n=part: problem.rows(x[:n]), targets=problem.targets(y[:part]),
            telemetry={"loss": float(loss.detach()), "progress": progress}, jacobian=problem.jacobian,
        )  # fmt: skip
        optimizer.zero_grad()
        if not math.isfinite(float(loss.detach())):
            return found
        step, spent = step + 1, spent + time.process_time() - began
    metric = problem.metric()
    stats = optimizer.get_stats()
    found |= {"steps": step, "natural": stats["natural_steps"], "natural_s": stats["natural_seconds"]}
    return {**found, "metric": metric if math.isfinite(metric) else None}


def effect(arm: list[float], control: list[float]) -> dict[str, float]:
    """Mean paired difference of log metric, with its 95 % interval; below 0 the arm is better."""
    import scipy.stats

    gaps = [math.log(a) - math.log(c) for a, c in zip(arm, control, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    if len(gaps) < 2 or max(gaps) == min(gaps):
        return {"mean": mean, "low": mean, "high": mean} if gaps and max(gaps) == min(gaps) == 0 else {"mean": mean}
    low, high = scipy.stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    return {"mean": mean, "low": float(low), "high": float(high)}


def verdict(found: dict[str, float]) -> str:
    """In words, with the change of the metric itself."""
    change = f"{100 * (math.exp(found['mean']) - 1):+.1f} %"
    if "low" not in found:
        return f"{change}, one seed: no interval"
    low, high = (100 * (math.exp(found[end]) - 1) for end in ("low", "high"))
    word = "better" if found["high"] < 0 else "worse" if found["low"] > 0 else "no difference shown"
    return f"{change} [{low:+.1f}, {high:+.1f}]: {word}"


def run(
    *,
    seconds: float,
    seeds: int = 3,
    arms: tuple[str, ...] = ARMS,
    corpus: Path | None = None,
    digits: Path | None = None,
    work: Path,
    workers: int | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Tune, run and compare every arm on every problem; the table is printed, the raw result written to `out`."""
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"--arms {unknown[0]}: choose from {', '.join(ARMS)}")
    arms = (CONTROL, *(arm for arm in arms if arm != CONTROL))
    data = work / "data"
    digest = prepare(corpus, digits, data)
    result: dict[str, Any] = {
        **described(__doc__), "seconds": seconds, "seeds": seeds, "data": digest,
        "corpus": corpus.name if corpus else "embedded", "digits": digits.name if digits else "load_digits",
        "problems": {},
    }  # fmt: skip
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:

        def do(runs: list[GatedRun]) -> list[dict[str, Any]]:
            return list(pool.map(train, runs, [data] * len(runs)))

        for task, title in PROBLEMS.items():
            tuning = do([GatedRun(task, CONTROL, TUNING_SEED, lr, NATURAL[0], seconds) for lr in CHEAP])
            lr = _best(tuning)["lr"]
            others = [
                GatedRun(task, arm, TUNING_SEED, lr, lr_ng, seconds) for arm in arms[1:] for lr_ng in NATURAL
            ]  # fmt: skip
            tuned = do(others)
            chosen = {CONTROL: NATURAL[0]}
            for arm in arms[1:]:
                found = [one for one in tuned if one["arm"] == arm]
                chosen[arm] = _best(found)["lr_ng"] if any(one["metric"] for one in found) else NATURAL[0]
            runs = do([
                GatedRun(task, arm, seed, lr, chosen[arm], seconds) for seed in range(1, seeds + 1) for arm in arms
            ])  # fmt: skip
            result["problems"][task] = {
                "title": title, "metric": TASKS[task].metric, "lr": lr, "lr_ng": chosen,
                "arms": {arm: _summary(runs, arm) for arm in arms}, "tuning": [*tuning, *tuned], "runs": runs,
            }  # fmt: skip
            say(f"{title}: done, AdamW's rate {lr:g}")
    return finish(result, lines(result), out)


def _best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda one: math.inf if one["metric"] is None else one["metric"])


def _summary(runs: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    mine = [one for one in runs if one["arm"] == arm]
    values = [one["metric"] for one in mine]
    control = [one["metric"] for one in runs if one["arm"] == CONTROL]
    known = [(m, c) for m, c in zip(values, control, strict=True) if m is not None and c is not None]
    found: dict[str, Any] = {
        "metric": math.fsum(m for m, _ in known) / len(known) if known else None,
        "diverged": values.count(None),
        "natural_rate": sum(one["natural"] for one in mine) / max(1, sum(one["steps"] for one in mine)),
        "steps": sum(one["steps"] for one in mine) / len(mine),
    }
    if known and arm != CONTROL:
        found["effect"] = effect([m for m, _ in known], [c for _, c in known])
        found["verdict"] = verdict(found["effect"])
    return found


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The table."""
    yield f"{result['question']}  {machine_line(result)}"
    for part in result["problems"].values():
        yield ""
        yield f"{part['title']}, {part['metric']}, {result['seconds']:g} CPU-seconds, {result['seeds']} paired seeds"
        for arm, row in part["arms"].items():
            metric = "diverged" if row["metric"] is None else f"{row['metric']:.4g}"
            lost = f", {row['diverged']} diverged" if row["diverged"] else ""
            yield (
                f"  {arm:10} {metric:>9}  {row['steps']:7.0f} steps, {100 * row['natural_rate']:5.1f} % natural  "
                f"{row.get('verdict', 'the control')}{lost}"
            )
