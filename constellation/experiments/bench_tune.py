"""What does a sweep on Ray cost over the plain loop? Seconds of the same evaluations, one after another, both ways.

    plain   each evaluation in this process, torch imported and caches made before the clock starts
    ray     `constellation tune` with one evaluation at a time, on a Ray that is up; its processes are started within

Turns alternate; the ratio is of the medians. What is computed is the same to the bit, and checked.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from actors.connect import connected
from constellation.config import Config
from constellation.errors import RunError
from constellation.experiments.harness import described, finish, machine_line
from constellation.train.job import resolve_precision
from tune.engine import compute
from tune.history import read_history
from tune.request import SweepRequest
from tune.run import SweepRun, alone
from tune.sharing import prepared
from tune.space import read_space


def run(
    config: Config, *, corpus: Path | None, tokens: float, trials: int = 4, turns: int = 1, out: Path | None = None
) -> dict[str, Any]:
    """Measure, print the ratio, write the raw result to `out`. `tokens` are those of one evaluation."""
    base = resolve_precision(config)
    where = None if corpus is None else str(corpus.resolve())
    request = SweepRequest(read_space("optim", base), base, where, tokens, trials=trials, search="random")
    seconds: dict[str, list[float]] = {"plain": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="constellation-bench-") as scratch, connected(None, num_cpus=1):
        for turn in range(turns):
            metrics = []
            for way, evaluate in (("plain", alone), ("ray", lambda sweep: compute(sweep, 1))):
                folder = Path(scratch) / f"{way}-{turn}"
                seconds[way].append(_seconds(folder, request, corpus, evaluate))
                metrics.append({str(e): o.metric for e, o in read_history(folder).outcomes.items()})
            if metrics[0] != metrics[1]:
                raise RunError(f"the sweep did not compute what the plain loop did: {metrics}")
    plain, ray = (statistics.median(seconds[way]) for way in ("plain", "ray"))
    result = {
        **described(__doc__),
        "config": base.to_json(),
        "trials": trials,
        "tokens": tokens,
        "seconds": seconds,
        "overhead_s_per_trial": (ray - plain) / trials,
        "ratio": ray / plain,
    }
    return finish(result, report(result), out)


def report(result: dict[str, Any]) -> list[str]:
    """The table's lines."""
    plain, ray = (statistics.median(result["seconds"][way]) / result["trials"] for way in ("plain", "ray"))
    return [
        machine_line(result),
        f"{result['trials']} evaluations of {result['tokens']:,.0f} tokens, medians of {len(result['seconds']['ray'])}",
        f"plain loop   {plain:8.2f} s an evaluation",
        f"sweep on Ray {ray:8.2f} s an evaluation   {result['overhead_s_per_trial']:+.2f} s",
        f"ratio        {result['ratio']:8.3f}",
    ]


def _seconds(folder: Path, request: SweepRequest, corpus: Path | None, evaluate: Any) -> float:
    prepared(corpus, request.base, folder / "shared")
    with contextlib.closing(SweepRun(folder, request)) as sweep:
        began = time.perf_counter()
        evaluate(sweep)
        return time.perf_counter() - began
