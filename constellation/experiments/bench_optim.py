"""Which optimizer reaches tuned AdamW's loss first, in steps and in CPU-seconds?

    tune    AdamW gets 20 quasi-random trials, every other row 5 in each of 3 studies, of two numbers: the learning
            rate, log-uniform around the documented default, and one knob (optim_peers.py). Rows are tuned on half
            of the steps, since the question is who needs fewer; AdamW on all of them
    target  held-out metric of AdamW at its best setting, all steps, fully decayed: one target for each seed
    run     every row at its best setting, same seeds, at several lengths ("rungs"), each with a whole schedule of
            its own; where between two rungs the target is crossed is interpolated

Everything is a file in the work folder, written whole when done: a second call goes on where the first was stopped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from constellation.errors import ConfigError
from constellation.experiments import optim_report, optim_steps
from constellation.experiments.optim_peers import BASELINE, ROWS
from constellation.experiments.optim_tasks import TASKS, Task, prepare
from constellation.experiments.optim_trial import Trial, perform
from constellation.storage.atomic import read_json, write_json

TUNING_SEED = 100  # of initialisation and data while tuning
FIRST_SEED = 1  # of the runs; 0 was looked at while the space of the search was drawn up
QUIET_S = 10.0  # between two lines in a log


@dataclass(frozen=True)
class Profile:
    """How much of the benchmark is done."""

    name: str
    tasks: tuple[str, ...]
    rows: tuple[str, ...] | None = None  # None: every row of the task
    scale: float = 1.0  # of every task's steps or seconds
    studies: int = 3  # at most
    trials: int = 5  # a study
    baseline_trials: int = 20
    seeds: int = 5
    rungs: int = 9  # at most, the longest ones
    sizes: tuple[str, ...] = tuple(optim_steps.SIZES)  # of the step-cost table


FULL = Profile("full", tuple(TASKS))
QUICK = Profile(
    "quick", ("char", "digits", "poisson"),
    ("adamw", "qig_diagonal", "diagonal", "kron_muon", "kron_soap", "kron_soap_muon", "exact_ng",
     "muon", "pytorch_optimizer_soap"),
    scale=0.4, studies=1, trials=4, baseline_trials=6, seeds=3, rungs=3, sizes=("0.1 M", "1 M"),
)  # fmt: skip
Say = Callable[[str], None]


def run(
    profile: Profile,
    work: Path,
    *,
    corpus: Path | None = None,
    digits: Path | None = None,
    workers: int | None = None,
    say: Say = print,
    live: bool = False,
) -> dict[str, Any]:
    """All of `profile`, from what `work` holds already; the result that the report is made of."""
    check(profile)
    began, workers = time.time(), workers or os.cpu_count() or 1
    trials = work / "trials"
    data = prepare(corpus, digits, work / "data")
    expected = estimate(profile)
    say(
        f"{profile.name}: {expected / 60:.0f} CPU-minutes expected, {expected / 60 / workers:.0f} minutes of "
        f"{workers} workers on idle cores like the one the estimate was made on; finished trials in {trials} are kept"
    )
    found: dict[str, Any] = {}
    with _progress(expected, say, live) as advance, _pool(workers) as pool:

        def do(batch: Sequence[Trial]) -> list[dict[str, Any]]:
            futures = {pool.submit(perform, t, work / "data", trials): i for i, t in enumerate(batch)}
            results: list[dict[str, Any]] = [{}] * len(batch)
            try:
                for future in as_completed(futures):
                    trial = batch[futures[future]]
                    results[futures[future]] = result = future.result()
                    if result["outcome"] in ("error", "failed"):
                        say(f"{trial.task} {trial.row}: {result['outcome']}: {result['reason']}")
                    advance(trial.task, trial.row, trial.estimate_s())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return results

        for name in profile.tasks:
            task = TASKS[name]
            tuned = do([t for row in rows_of(task, profile) for t in tuning(task, row, profile, data)])
            chosen = {row: best([t for t in tuned if t["row"] == row]) for row in rows_of(task, profile)}
            runs = do(confirmation(task, chosen, profile, data))
            found[name] = {"tuning": tuned, "chosen": chosen, "runs": runs}
        key = hashlib.sha256(repr((profile.sizes, profile.rows)).encode()).hexdigest()[:12]
        if not (costs := work / f"steps.{key}.json").exists():
            write_json(costs, pool.submit(optim_steps.measure, profile.sizes, profile.rows).result())
        steps = read_json(costs)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "profile": asdict(profile),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "workers": workers},
        "versions": {p: importlib.metadata.version(p) for p in
                     ("torch", "heavyball", "pytorch_optimizer", "schedulefree", "numpy", "scipy")},
        "corpus": "embedded" if corpus is None else corpus.name,
        "digits": "load_digits" if digits is None else digits.name,
        "data": data,
        "wall_s": round(time.time() - began),
        "cpu_s": round(sum(t["cpu_s"] for part in found.values() for t in [*part["tuning"], *part["runs"]])),
        "tasks": found,
        "steps": steps,
    }  # fmt: skip
    return {**result, **optim_report.analyse(result)}


def check(profile: Profile) -> None:
    for name in profile.tasks:
        if name not in TASKS:
            raise ConfigError(f"--tasks {name}: choose from {', '.join(TASKS)}")
    for name in profile.rows or ():
        if name not in ROWS:
            raise ConfigError(f"--optimizers {name}: choose from {', '.join(ROWS)}")


def rows_of(task: Task, profile: Profile) -> list[str]:
    """The rows of `task` that are run, the baseline always."""
    return [r for r in task.rows if profile.rows is None or r in profile.rows or r == BASELINE]


def points(number: int, study: int) -> list[tuple[float, float]]:
    """The first `number` points of a scrambled Halton sequence in the unit square, the same for every row."""
    import scipy.stats.qmc

    return [(float(a), float(b)) for a, b in scipy.stats.qmc.Halton(2, scramble=True, rng=study).random(number)]


def _length(task: Task, profile: Profile, part: float) -> dict[str, Any]:
    scale = profile.scale * part
    return {"steps": max(4, round(task.steps * scale)) if task.steps else 0, "seconds": task.seconds * scale}


def tuning(task: Task, row: str, profile: Profile, data: str) -> Iterator[Trial]:
    """The trials that choose `row`'s learning rate and knob."""
    studies = min(task.studies, profile.studies)
    baseline = row == BASELINE
    low, high = task.span
    whole = baseline and task.steps > 0
    length = _length(task, profile, 1.0 if whole else task.tune)
    number = profile.baseline_trials if baseline else profile.trials
    if (own := ROWS[row].trials) is not None:
        number, studies = min(number, own), 1
    for study in range(1 if baseline else studies):
        for u, knob in points(number, study):
            lr = ROWS[row].lr * (1.0 if ROWS[row].rate == "none" else low * (high / low) ** u)
            yield Trial(task.name, row, "tune", TUNING_SEED, lr, knob, **length, study=study, data=data)


def best(trials: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The trial with the lowest metric, None when none has one."""
    return min((t for t in trials if t["metric"] is not None), key=lambda t: float(t["metric"]), default=None)


def confirmation(task: Task, chosen: dict[str, Any], profile: Profile, data: str) -> list[Trial]:
    """Every row's runs at its best setting; rows of one seed and length follow each other, for equal conditions."""
    out = []
    for seed in range(FIRST_SEED, FIRST_SEED + profile.seeds):
        for rung in task.rungs[-profile.rungs :]:
            for row, setting in chosen.items():
                if setting is not None:
                    length = _length(task, profile, rung)
                    lr, knob, curve = setting["lr"], setting["knob"], rung == 1.0
                    out.append(
                        Trial(task.name, row, "run", seed, lr, knob, **length, rung=rung, curve=curve, data=data)
                    )
    return out


def estimate(profile: Profile) -> float:
    """CPU-seconds of the whole profile, by the tables' step times."""
    total = 10.0 * len(profile.sizes) ** 2  # step costs
    for name in profile.tasks:
        task, some = TASKS[name], {"lr": 1.0, "knob": 0.5}
        rows = rows_of(task, profile)
        trials = [t for row in rows for t in tuning(task, row, profile, "")]
        trials += confirmation(task, dict.fromkeys(rows, some), profile, "")
        total += sum(t.estimate_s() for t in trials)
    return total


def _pool(workers: int) -> ProcessPoolExecutor:
    """Ctrl-C is the driver's: trials in hand are finished and kept."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))


@contextmanager
def _progress(expected: float, say: Say, live: bool) -> Iterator[Callable[[str, str, float], None]]:
    """A bar on a terminal, lines in a log; counted in expected CPU-seconds."""
    done, quiet_until = 0.0, 0.0
    if not live:

        def line(task: str, row: str, cost: float) -> None:
            nonlocal done, quiet_until
            done += cost
            if time.monotonic() >= quiet_until:
                quiet_until = time.monotonic() + QUIET_S
                say(f"{min(99, 100 * done / expected):3.0f} %  {task} {row}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:<40}"), BarColumn(bar_width=None), TextColumn("{task.percentage:3.0f} %")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        whole = bar.add_task("", total=expected)
        yield lambda task, row, cost: bar.update(whole, advance=cost, description=f"{task} {row}")
