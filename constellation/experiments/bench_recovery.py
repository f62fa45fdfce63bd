"""Which recovery helps against which fault, and does any beat doing nothing?

A small kernel is trained as OCEAN is; at 40 % of its steps a fault is injected. Arms are paired by seed: the same
initial weights, batches and fault.

    faults      nan_gradient      one gradient is no number
                rate_spike        30 times the rate for 5 steps
                corrupted_layer   one matrix replaced by noise of 30 times its deviation
                collapsed         the last norm's scale is divided by 30: nearly uniform outputs
                dead_units        nine tenths of every hidden unit's outputs set to 0
                poisoned          the batches of 20 steps are one token over and over
    arms        nothing           plain clipping; a gradient that is none ends the run
                adagc, zclip      clipping alone
                rollback, cooldown (the rate cut), light_sleep, deep_sleep, dream, mushroom (FIRE), shrink_perturb
                ladder            the default

    recovery    steps from the fault until the trailing mean of 5 training losses is back at 1.02 times that before it;
                counted as the rest of the run where it never is
    final       held-out bits per byte at the end; a run that ended early counts with its last held-out loss and is
                marked as failed

An effect is the paired difference of final bits per byte to `nothing`, with Student's 95 % interval over seeds; for the
fault that ends `nothing` the control is rollback.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.config import Config, override
from constellation.errors import RunError
from constellation.experiments.harness import described, finish, machine_line, prepared, save
from constellation.experiments.statistics import paired
from constellation.pipeline.prepare import Plan, open_plan
from constellation.presets import tiny
from constellation.telemetry.training import Training
from constellation.train.job import Job, Source, resolve_precision
from constellation.train.loop import fit
from constellation.train.state import batches_of

FAULTS = ("nan_gradient", "rate_spike", "corrupted_layer", "collapsed", "dead_units", "poisoned")
PROTOCOLS = ("rollback", "cooldown", "light_sleep", "deep_sleep", "dream", "mushroom", "shrink_perturb", "ladder")
ARMS = ("nothing", "adagc", "zclip", *PROTOCOLS)
AT = 0.4  # of the run
SPIKE, SPIKE_STEPS, POISON_STEPS = 30.0, 5, 20
BACK = 1.02  # of the loss before


@dataclass(frozen=True)
class Trial:
    """One run; plain data, for another process."""

    fault: str
    arm: str
    seed: int
    steps: int


def settings_of(trial: Trial) -> dict[str, Any]:
    """What the arm changes of the configuration."""
    own: dict[str, Any] = {"train.seed": trial.seed}
    if trial.arm in ("adagc", "zclip"):
        return {**own, "train.clip_kind": trial.arm}
    if trial.arm in PROTOCOLS:
        watched = {"telemetry.enabled": True, "telemetry.every": 20, "telemetry.emotions": False}
        return {**own, **watched, "regime.enabled": True, "regime.recovery": trial.arm, "regime.breakdown_from": 1.0,
                "regime.linear_below": 0.0}  # fmt: skip
    return own


class Injector:
    """A probe that does harm once, after step `at`, with random numbers of its own."""

    name, every, budget = "injector", 1, None

    def __init__(self, fault: str, at: int, seed: int):
        self.fault, self.at, self.generator = fault, at, torch.Generator().manual_seed(seed)
        self.left = 0

    def measure(self, training: Training) -> Mapping[str, float]:
        if training.step == self.at:
            with torch.no_grad():
                self._harm(training.model)
            self.left = SPIKE_STEPS if self.fault == "rate_spike" else 0
        if self.left:  # the step's own movement, as many times more as the rate is
            self._spike(training)
        return {}

    def _harm(self, model: Any) -> None:
        if self.fault == "nan_gradient":
            handles: list[Any] = []

            def once(gradient: torch.Tensor) -> torch.Tensor:
                handles[0].remove()
                return gradient * math.nan

            handles.append(next(model.parameters()).register_hook(once))
        elif self.fault == "corrupted_layer":
            w = model.blocks[-1].mlp.out.weight
            w.copy_(30 * w.std() * torch.randn(w.shape, generator=self.generator))
        elif self.fault == "collapsed":
            model.norm.weight.div_(30)
        elif self.fault == "dead_units":
            for block in model.blocks:
                w = block.mlp.out.weight
                w[:, torch.randperm(w.shape[1], generator=self.generator)[: w.shape[1] * 9 // 10]] = 0

    def _spike(self, training: Training) -> None:
        before = getattr(self, "_before", None)
        with torch.no_grad():
            if before is not None:
                for p, old in zip(training.model.parameters(), before, strict=True):
                    p.add_((p - old) * (SPIKE - 1))
                self.left -= 1
            self._before = [p.clone() for p in training.model.parameters()]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Poisoned:
    """The batches of `source`, but for some steps in which there is one token alone."""

    source: Source
    first: int
    until: int

    def at(self, step: int) -> tuple[Any, Any]:
        x, y = self.source.at(step)
        return (np.full_like(x, 17), np.full_like(y, 17)) if self.first <= step < self.until else (x, y)


def job_of(plan: Plan, trial: Trial, folder: Path) -> Job:
    config = override(plan.config, settings_of(trial))
    return Job("ocean", folder, config, trial.steps, plan.train, plan.dev, plan.tokenizer)


def train(plan: Plan, trial: Trial) -> dict[str, Any]:
    """Train, harm, and say how it went on."""
    torch.set_num_threads(1)
    at = round(AT * trial.steps)
    losses: list[float] = []
    failed, bits = False, None
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(plan, trial, Path(scratch) / "ocean")
        source: Source = batches_of(job)
        if trial.fault == "poisoned":
            source = Poisoned(source, at, at + POISON_STEPS)
        injector = Injector(trial.fault, at, trial.seed)
        try:
            for step in fit(job, source, probes=[injector]):
                losses.append(step.loss_nats)
                bits = bits if step.dev_bits_per_byte is None else step.dev_bits_per_byte
        except RunError:
            failed = True
        outcomes = _outcomes(job.folder)
    return {
        **asdict(trial), "losses": [round(x, 4) if math.isfinite(x) else None for x in losses], "failed": failed,
        "final": bits, "recovery_steps": back_after(losses, at, trial.steps), "outcomes": outcomes,
    }  # fmt: skip


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    from constellation.train.checkpoint import newest

    found = newest(folder)
    return [] if found is None else list(found.parts.get("recovery", {}).get("outcomes", []))


def back_after(losses: Sequence[float], at: int, steps: int) -> int:
    """Steps after `at` until the trailing mean of 5 losses is at most 1.02 times that of the 20 before it.

    Only once it has been above; 0 for a fault that never lifted it, `steps - at` where it does not come back.
    """
    if len(losses) < steps and len(losses) <= at + 5:
        return steps - at
    bound = BACK * float(np.mean(losses[max(0, at - 20) : at]))
    means = np.convolve(np.array(losses[at:], float), np.ones(5) / 5, "valid")
    above = np.flatnonzero(~(means <= bound))
    if not len(above):
        return 0
    after = np.flatnonzero(means[above[0] :] <= bound)
    return int(above[0] + after[0] + 5) if len(after) else steps - at


def _work(task: tuple[Path, Trial]) -> dict[str, Any]:
    return train(open_plan(task[0]), task[1])


def base() -> Config:
    """The kernel that is harmed: one block of `tiny`, half its context, by AdamW."""
    changes = {
        "kernel.context": 32, "kernel.layers": 1, "train.sample_bytes": 0, "train.checkpoint_every": 20,
        "train.eval_bytes": 2048, "optim.name": "adamw", "optim.lr": 3e-3,
    }  # fmt: skip
    return resolve_precision(override(tiny(), changes))


def run(
    *, steps: int, seeds: int, faults: Sequence[str], arms: Sequence[str], corpus: Path | None, work: Path,
    workers: int, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Every fault, arm and seed; prints the table."""
    place = work / "recovery"
    prepared(place, corpus, base())
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for seed in range(seeds):  # a killed bench leaves the result of the seeds that are whole
        runs += _all([(place, Trial(fault, arm, seed, steps)) for fault in faults for arm in arms], workers)
        result = {**described(__doc__), "steps": steps, "seeds": seed + 1, "table": table(runs), "raw": runs}
        if out and seed:
            save(result, out)
    return finish(result, lines(result), out)


def _all(tasks: Sequence[tuple[Path, Trial]], workers: int) -> list[dict[str, Any]]:
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            return list(pool.map(_work, tasks))
    runs = []
    for task in tasks:
        runs.append(_work(task))
        print(f"{len(runs)}/{len(tasks)} {task[1]}", file=sys.stderr, flush=True)
    return runs


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each fault and arm: medians, and the effect against the control with its interval."""
    rows = []
    for fault in dict.fromkeys(r["fault"] for r in runs):
        of_fault = [r for r in runs if r["fault"] == fault]
        arms = list(dict.fromkeys(r["arm"] for r in of_fault))
        by = {arm: [r for r in of_fault if r["arm"] == arm] for arm in arms}
        control = "nothing" if not any(r["failed"] for r in by.get("nothing", [])) else "rollback"
        for arm in arms:
            finals = [r["final"] for r in by[arm] if r["final"] is not None]
            row = {
                "fault": fault, "arm": arm, "failed": sum(r["failed"] for r in by[arm]),
                "recovery_steps": float(np.median([r["recovery_steps"] for r in by[arm]])),
                "final": float(np.mean(finals)) if finals else None, "control": control,
                "actions": [o["action"] for r in by[arm] for o in r["outcomes"] if o["result"] == "kept"],
            }  # fmt: skip
            if arm != control and control in by and not row["failed"] and len(by[arm]) > 1:
                gaps = [a["final"] - b["final"] for a, b in zip(by[arm], by[control], strict=True)]
                row["effect"] = asdict(paired(gaps))
            rows.append(row)
    return rows


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{result['question']}  {result['seeds']} seeds, {result['steps']} steps; {machine_line(result)}"
    yield f"{'fault':<16}{'arm':<16}{'failed':>7}{'back after':>12}{'final bits/byte':>17}  against the control"
    for row in result["table"]:
        effect = row.get("effect")
        final = "-" if row["final"] is None else f"{row['final']:.4f}"
        told = f"{effect['mean']:+.4f} [{effect['low']:+.4f}, {effect['high']:+.4f}]" if effect else ""
        yield (
            f"{row['fault']:<16}{row['arm']:<16}{row['failed']:>7}{row['recovery_steps']:>12.0f}{final:>17}  "
            f"{told}{'' if row['control'] == 'nothing' or not told else ' (to rollback)'}"
        )
