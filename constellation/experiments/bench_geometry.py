"""The optimizer table's columns "Basin Distance" and "Phi Quality": measured on the model with a basin block.

Every row of that task is trained at the setting that `bench optim` chose for it (the raw result says which), the whole
length, paired seeds. At the end, on the held-out windows:

    D     functional Fisher-Rao distance to the model at its beginning, radians: the reference of a kernel is where it
          branches
    phi   integration of the hidden states, beside its shuffled null and the phi of the model at its beginning

and the paired change against AdamW, in per cent of AdamW's, with Student's 95 % interval over seeds. The original
design claims less distance and more phi; neither is a quality by itself, so the held-out loss stands beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from constellation.errors import ConfigError
from constellation.experiments.harness import described, finish, machine_line
from constellation.experiments.optim_peers import BASELINE, ROWS
from constellation.experiments.optim_tasks import TASKS, prepare
from constellation.experiments.optim_trial import Trial, trained
from constellation.experiments.statistics import paired
from constellation.storage.atomic import read_object
from constellation.telemetry.integration import integration
from constellation.telemetry.monitor import basin_distance

TASK, FIRST_SEED, CONTEXT = "basin", 1, 64
CLAIMED = {
    "qig_diagonal": ("QIGDiagonalNG", "-20 %", "+10 %"), "hybrid_diagonal": ("MixedQIG (diagonal)", "-35 %", "+15 %"),
    "hybrid_exact": ("MixedQIG (exact)", "-50 %", "+25 %"), "adaptive": ("AdaptiveMixedQIG", "-45 %", "+20 %"),
}  # fmt: skip


def run(
    *, source: Path, seeds: int, steps: int | None, corpus: Path | None, work: Path, out: Path | None,
    names: Sequence[str] = (BASELINE, *CLAIMED, "kron_muon"),
) -> dict[str, Any]:  # fmt: skip
    """Train and measure; `source` is the raw result of `bench optim`."""
    part = read_object(source)["tasks"].get(TASK)
    if part is None:
        raise ConfigError(f"{source} has no task {TASK!r}; run constellation bench optim --tasks {TASK}")
    prepare(corpus, None, work / "data")
    length = steps or TASKS[TASK].steps
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for name in names:
            chosen = part["chosen"].get(name)
            if chosen is not None:
                trial = Trial(TASK, name, "run", seed, chosen["lr"], chosen["knob"], length)
                runs.append(measured(trial, work / "data"))
    result = {**described(__doc__), "seeds": seeds, "steps": length, "table": table(runs), "raw": runs}
    return finish(result, lines(result), out)


def measured(trial: Trial, data: Path) -> dict[str, Any]:
    """Train as `bench optim` does, then measure."""
    torch.set_num_threads(1)
    torch.manual_seed(trial.seed)
    task = TASKS[trial.task]
    problem = task.build(data, trial.seed)
    model: Any = problem.model
    tokens = np.load(data / "bpe.dev.npy")[: 32 * CONTEXT].astype(np.int64)
    held = torch.from_numpy(tokens).reshape(-1, CONTEXT)
    before = copy.deepcopy(model)
    optimizer = ROWS[trial.row].build(problem, trial.lr, trial.knob)
    found: dict[str, Any] = {"metric": None, "cpu_s": 0.0, "done": 0, "curve": [], "train": []}
    outcome = trained(trial, task, problem, optimizer, found)
    if switch := getattr(optimizer, "eval", None):
        switch()
    with torch.no_grad():
        states = [m.hidden(held) for m in (before, model)]
        roots = [m.logits(h[:, ::4]).float().softmax(-1).sqrt().flatten(0, 1)
                 for m, h in zip((before, model), states, strict=True)]  # fmt: skip
    first, last = (integration(h.flatten(0, 1)) for h in states)
    return {
        **asdict(trial), "outcome": outcome, "held_out_nats": found["metric"], "phi": last.phi,
        "phi_null_nats": last.null, "phi_before": first.phi, "differentiation": last.differentiation,
        "basin_distance": basin_distance(*roots),
    }  # fmt: skip


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each optimizer; changes in per cent of AdamW's of the same seed."""
    by: dict[str, dict[int, Mapping[str, Any]]] = {}
    for r in runs:
        by.setdefault(r["row"], {})[r["seed"]] = r
    rows = []
    for name, own in by.items():
        row: dict[str, Any] = {"row": name, "claimed": CLAIMED.get(name)}
        for key in ("basin_distance", "phi", "held_out_nats"):
            values = [r[key] for r in own.values()]
            row[key] = sum(values) / len(values)
            if name != BASELINE and len(own) > 1:
                row[f"{key}_change"] = asdict(
                    paired([100 * (r[key] / by[BASELINE][seed][key] - 1) for seed, r in own.items()])
                )
        row["phi_null_nats"] = sum(r["phi_null_nats"] for r in own.values()) / len(own)
        rows.append(row)
    return rows


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    def change(row: Mapping[str, Any], key: str) -> str:
        c = row.get(f"{key}_change")
        return "" if c is None else f"{c['mean']:+.1f} % [{c['low']:+.1f}, {c['high']:+.1f}]"

    yield f"{result['question']}  {result['seeds']} seeds, {result['steps']} steps; {machine_line(result)}"
    yield "| optimizer | D, rad | against AdamW | claimed | phi (null, nats) | against AdamW | claimed | nats/token |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in result["table"]:
        who, far, phi = row["claimed"] or (row["row"], "", "")
        yield (
            f"| {who} | {row['basin_distance']:.3f} | {change(row, 'basin_distance')} | {far} | {row['phi']:.3f} "
            f"({row['phi_null_nats']:.3f}) | {change(row, 'phi')} | {phi} | {row['held_out_nats']:.3f} |"
        )
