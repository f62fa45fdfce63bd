"""A sweep from its request to its winner: what it needs, Ray, progress, best.toml.

conduct(out, request) -> what won, as plain data
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.connect import connected, inside, machine, where
from actors.placement import check, needs, nodes, total
from constellation.config import Config, difference
from constellation.errors import ArtifactError, ConfigError
from constellation.processor import cores
from tune.best import write_best
from tune.engine import compute, fits, room
from tune.events import LOG
from tune.history import Evaluation, read_history
from tune.progress import Progress
from tune.request import SweepRequest
from tune.run import SweepRun, recorded_request
from tune.schedulers import rank_correlations
from tune.sharing import prepared

PROBE_S = 2.0


def conduct(
    out: Path,
    request: SweepRequest | None,
    *,
    jobs: int | None = None,
    address: str | None = None,
    keep: int = 3,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run the sweep in `out` to its end; a log that is there is gone on with, and must be of `request` if one is given.

    Returns trial, settings, metric and the files that were written.
    """
    recorded = recorded_request(out) if (out / LOG).exists() else None
    progress = Progress(as_json)
    asked = recorded or request
    assert asked is not None
    address = where(address)
    bundles = room(asked.space.evaluates, asked.base)
    size = None
    if address is None and not inside():
        size = machine(jobs, asked.base.constellation.kernels)
        check(bundles, [size], "this machine")
    with connected(address, num_cpus=None if size is None else int(size["CPU"])):
        at_once = fits(bundles)
        if size is not None and not size["GPU"]:
            at_once = min(at_once, max(1, cores() // asked.base.train.ocean_threads))
        at_once = min(jobs or at_once, asked.trials)
        progress.say(f"an evaluation needs {needs(bundles)}; there is {total(nodes())}; {at_once} run at once")
        if recorded is None:
            asked = settle(asked, out, at_once, progress)
        elif request is not None:
            check_same(recorded, request)
        progress.expect(asked)
        with progress:
            run = SweepRun.resume(out, progress.watch, keep) if recorded else SweepRun(out, asked, progress.watch, keep)
            try:
                compute(run, at_once)
            except KeyboardInterrupt:
                progress.say(f"stopped; go on: constellation tune --out {out} --resume")
                raise
            finally:
                run.close()
    return conclude(out, run, progress)


def settle(request: SweepRequest, out: Path, workers: int, progress: Progress) -> SweepRequest:
    """The request with what depends on the machine: precision, workers, tokens for a budget in seconds."""
    from constellation.train.job import resolve_precision

    base = resolve_precision(request.base)
    fixed = request.space.configure(base, request.space.default)
    corpus = None if request.corpus is None else Path(request.corpus)
    prepared(corpus, fixed, out / "shared")  # a corpus that cannot be used is told here
    budget = request.budget
    if budget < 0:
        rate = probe(fixed, corpus, out / "shared")
        progress.say(f"{-budget:g} s at {rate:,.0f} tokens a second, measured: {-budget * rate:,.0f} tokens")
        budget = float(f"{-budget * rate:.3g}")
    return dataclasses.replace(request, base=base, workers=workers, budget=budget)


def probe(config: Config, corpus: Path | None, shared: Path) -> float:
    """Tokens a second of OCEAN in this process, steps after the first, measured for PROBE_S."""
    from constellation.roster import OCEAN
    from constellation.train.job import Job
    from constellation.train.loop import fit

    plan = prepared(corpus, config, shared)
    with tempfile.TemporaryDirectory(prefix="constellation-probe-") as folder:
        seconds, tokens, first = 0.0, 0, True
        for step in fit(Job(OCEAN, Path(folder), config, 1_000_000, plan.train)):
            if not first:
                seconds, tokens = seconds + step.wall_s, tokens + config.train.batch * config.kernel.context
            first = False
            if seconds > PROBE_S:
                break
    return tokens / seconds


def check_same(recorded: SweepRequest, given: SweepRequest) -> None:
    """ConfigError naming what of `given` is not as the sweep was begun; settings that the machine settled aside."""
    for name, (then, now) in difference(recorded.base, given.base).items():
        if now != "auto":  # left to the machine, which had chosen when the sweep was begun
            raise ConfigError(f"{name}={now}: the sweep was begun with {then}; leave it out, or another --out")
    old, new = recorded.to_json(), given.to_json()
    for key in old:
        if key in ("base", "workers") or (key == "budget" and given.budget < 0):
            continue
        if json.dumps(old[key], sort_keys=True) != json.dumps(new[key], sort_keys=True):
            shown = "" if isinstance(old[key], Mapping) else f" ({old[key]} then, {new[key]} now)"
            raise ConfigError(f"{key} is not what the sweep was begun with{shown}; leave it out, or another --out")


def conclude(out: Path, run: SweepRun, progress: Progress) -> dict[str, Any]:
    """Say who won and write best.toml."""
    history, trial = read_history(out), run.sweep.winner
    for line in rank_correlations(history):
        progress.say(line)
    if trial is None:
        reasons = {outcome.reason for outcome in history.outcomes.values() if outcome.reason}
        raise ArtifactError(
            f"no evaluation in {out} reached the full budget; the first reason: {min(reasons, default='?')}"
        )
    metrics = [o.metric for e, o in sorted(history.outcomes.items()) if (e.trial, e.rung) == (trial, run.sweep.top)]
    mean = sum(m for m in metrics if m is not None) / len(metrics)
    settings = history.trials[trial].settings
    config = run.request.config(history.trials[trial], Evaluation(trial, run.sweep.top))
    words = f"trial {trial} of the sweep {out.name}: {run.request.metric} {mean:.4f} over {len(metrics)} seeds"
    best = write_best(out, config, words)
    progress.say(f"{words}; {'the preset itself' if trial == 0 else f'better settings are in {best}'}")
    default = history.outcomes.get(Evaluation(0, run.sweep.top))
    if default is not None and default.metric is not None and trial:
        assert metrics[0] is not None
        progress.say(f"against the preset's {default.metric:.4f} with seed 0: {metrics[0] - default.metric:+.4f}")
    return {
        "event": "winner",
        "trial": trial,
        "settings": settings,
        "metric": mean,
        "seeds": len(metrics),
        "best": str(best),
    }
