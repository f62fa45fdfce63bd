"""What `bench optim` says: ratios to tuned AdamW, goals with pass or miss, claims beside measurements.

Everything is a function of the raw result, so README's table is made again from the committed JSON:
`constellation bench optim --table results/optim.json` rewrites what stands between <!-- optim --> and <!-- /optim -->.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from constellation.errors import ConfigError
from constellation.experiments.optim_analysis import Ratio, Reached, ratio, reach
from constellation.experiments.optim_goals import claims, goals, stored
from constellation.experiments.optim_peers import BASELINE, ROWS
from constellation.experiments.optim_tasks import TASKS, Task
from constellation.storage.atomic import write_bytes

MARKERS = ("<!-- optim -->", "<!-- /optim -->")
EDGE = 0.05  # a best rate in this outermost part of the space is marked
TASK_HEAD = (
    "optimizer", "lr", "final metric", "steps ratio", "CPU ratio", "ms a step", "best of each study", "trials lost",
)  # fmt: skip
Result = Mapping[str, Any]


def analyse(result: Result) -> dict[str, Any]:
    """summary, goals and claims of a raw result."""
    summary = {name: _summarise(TASKS[name], part) for name, part in result["tasks"].items()}
    whole = {**result, "summary": summary}
    return {"summary": summary, "goals": goals(whole), "claims": claims(whole)}


def _points(task: Task, runs: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float | None]]:
    """What `reach` reads: the ends of the runs of all lengths or, where seconds are limited, the run's own curve."""
    if task.steps:
        return [(r["done"], r["cpu_s"], r["metric"]) for r in sorted(runs, key=lambda r: r["steps"])]
    return [(s, c, m) for run in runs for s, c, m in run["curve"] if s]


def _summarise(task: Task, part: Mapping[str, Any]) -> dict[str, Any]:
    by: dict[str, dict[int, list[Any]]] = {}
    for run in part["runs"]:
        by.setdefault(run["row"], {}).setdefault(run["seed"], []).append(run)
    longest = {(n, s): max(r, key=lambda r: r["rung"]) for n, seeds in by.items() for s, r in seeds.items()}
    seeds = sorted(s for s in by.get(BASELINE, {}) if longest[BASELINE, s]["metric"] is not None)
    out: dict[str, Any] = {}
    for name, chosen in part["chosen"].items():
        tuned = [t for t in part["tuning"] if t["row"] == name]
        row: dict[str, Any] = {"trials": len(tuned), "failed": sum(t["metric"] is None for t in tuned)}
        out[name] = row
        if chosen is None:
            row["outcome"] = next((t.get("reason", "") for t in tuned), "") or "diverged in every trial"
            continue
        found: list[Reached | None] = []
        for s in seeds:
            base = longest[BASELINE, s]
            if name == BASELINE:
                found.append(Reached(base["done"], base["cpu_s"]))
            else:
                found.append(reach(_points(task, by.get(name, {}).get(s, [])), base["metric"], task.log_metric))
        bases = [longest[BASELINE, s] for s in seeds]
        bounds = sum(f is not None and f.bound for f in found)
        per_step = [[r["cpu_s"] / r["done"] for r in by[name][s] if r["done"]] for s in seeds]
        costs = [1000 * statistics.fmean(c) for c in per_step]
        base_costs = [1000 * statistics.fmean(r["cpu_s"] / r["done"] for r in by[BASELINE][s]) for s in seeds]
        final = [longest[name, s]["metric"] for s in seeds]
        # rates were drawn as default * low * (high / low) ** u; a best one at either end may not be the best there is
        low, high = ROWS[name].lr * task.span[0], ROWS[name].lr * task.span[1]
        margin = (high / low) ** EDGE
        row |= {
            "lr": chosen["lr"],
            "knob": chosen["knob"],
            "edge": ROWS[name].rate != "none" and not low * margin <= chosen["lr"] <= high / margin,
            "studies": [
                min((t["metric"] for t in tuned if t["study"] == k and t["metric"] is not None), default=None)
                for k in sorted({t["study"] for t in tuned})
            ],
            "final": final,
            "final_mean": statistics.fmean(final) if final and None not in final else None,
            "steps": ratio([f.steps / b["done"] if f else None for f, b in zip(found, bases)], bounds).to_json(),
            "cpu": ratio([f.cpu_s / b["cpu_s"] if f else None for f, b in zip(found, bases)], bounds).to_json(),
            "step_ms": statistics.fmean(costs),
            "step_cost": ratio([a / b for a, b in zip(costs, base_costs)]).to_json(),
            "gap": ratio([b["metric"] / f if f else None for f, b in zip(final, bases)]).to_json(),
            "stats": (longest[name, seeds[0]].get("stats") or {}) if seeds else {},
        }
    return {"title": task.title, "metric": task.metric, "seeds": seeds, "rows": out}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def readme_table(result: Result) -> str:
    """What README shows: ratios by task, the original design's claims, the goals."""
    summary = result["summary"]
    tasks = [n for n in summary if TASKS[n].steps and ("lm" in TASKS[n].tags or n in ("basin", "digits"))]
    names = [n for n in ROWS if any(n in summary[task]["rows"] for task in tasks)]

    def cell(name: str, task: str) -> str:
        row = summary[task]["rows"].get(name)
        if row is None:
            return ""
        if "steps" not in row:
            return "diverged or failed"
        steps, cpu = (stored(row[axis]) for axis in ("steps", "cpu"))
        return str(steps) if steps.mean is None else f"{_short(steps)} / {_short(cpu)}"

    table = _table(
        ["optimizer", "source", *(TASKS[t].title for t in tasks)],
        ([n, ROWS[n].source, *(cell(n, t) for t in tasks)] for n in names),
    )
    seeds = result["profile"]["seeds"]
    return "\n".join([
        f"Steps / CPU-seconds to tuned AdamW's held-out loss, ratios to AdamW's, geometric means over {seeds} paired "
        "seeds (less is better; intervals in `results/optim.md`):", "", *table,
        "The original design's claims on its own kind of model (the task with a basin block) beside what was measured. "
        'Its columns "Basin Distance" and "Phi Quality" are not measured here.', "", *_claims(result),
        *_goals(result),
    ])  # fmt: skip


def _short(r: Ratio) -> str:
    return f"{'≤ ' if r.bounds else ''}{r.mean:.2f}"


def _claims(result: Result) -> list[str]:
    head = ["optimizer", "speed claimed", "measured", "convergence claimed", "measured"]
    keys = ("row", "claimed_speed", "speed", "claimed_convergence", "convergence")
    return _table(head, ([c[k] for k in keys] for c in result["claims"]))


def _goals(result: Result) -> list[str]:
    keys = ("goal", "threshold", "measured", "verdict")
    table = _table(keys, ([g[k] if k != "verdict" else f"**{g[k]}**" for k in keys] for g in result["goals"]))
    return [*table, "What was tried for those that are missed: [optim_tried.md](optim_tried.md).", ""]


def markdown(result: Result) -> str:
    """Everything: goals, claims, a table a task, step costs, the protocol."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        "# Optimizers against tuned AdamW", "",
        f"`constellation bench optim`, profile {result['profile']['name']}; {machine['processor']}, {machine['cores']} "
        f"cores, {machine['workers']} workers of one thread; " + ", ".join(f"{k} {v}" for k, v in versions.items())
        + f"; corpus {result['corpus']}, digits {result['digits']}; {result['cpu_s'] / 60:.0f} CPU-minutes.",
        "", "## Goals", "", *_goals(result), "## The original design's claims", "",
        'On the task with a basin block. "Basin Distance" and "Phi Quality" are not measured here.', "",
        *_claims(result),
    ]  # fmt: skip
    for name, part in result["summary"].items():
        task = TASKS[name]
        unit = f"{task.steps * result['profile']['scale']:.0f} steps" if task.steps else (
            f"{task.seconds * result['profile']['scale']:.0f} CPU-seconds")  # fmt: skip
        lines += [f"## {part['title']}", "", f"Metric: {part['metric']}; AdamW's full run has {unit}; "
                  f"{len(part['seeds'])} seeds. \\* best rate at the edge of the space.", ""]  # fmt: skip
        lines += _table(
            TASK_HEAD,
            (_task_row(n, r) for n, r in part["rows"].items()),
        )  # fmt: skip
    for device, sizes in result["steps"]["step_costs"].items():
        rows = [n for n in ROWS if any(n in s["rows"] for s in sizes.values())]
        lines += [f"## step() alone against AdamW(fused), {device.upper()}", ""]
        lines += _table(
            ["optimizer", *(f"{size} ({s['parameters']:,})" for size, s in sizes.items())],
            ([n, *(_cost(s["rows"].get(n)) for s in sizes.values())] for n in rows),
        )
    lines += ["`_bare`: without the check that gradients are finite, as AdamW; the diagonal one compiled.", ""]
    lines += ["## Products of the four kinds against float64 oracles, relative error", ""]
    lines += _table(["kind", "error"], ([k, f"{e:.1e}"] for k, e in result["steps"]["products"].items()))
    return "\n".join([*lines, *PROTOCOL])


def _task_row(name: str, row: Mapping[str, Any]) -> list[str]:
    if "steps" not in row:
        return [name, "-", "-", "-", "-", "-", row["outcome"][:80], f"{row['failed']} of {row['trials']}"]
    final = "diverged" if row["final_mean"] is None else f"{row['final_mean']:.4g}"
    studies = ", ".join("-" if s is None else f"{s:.4g}" for s in row["studies"])
    return [
        name, f"{row['lr']:.2g}{'*' if row['edge'] else ''}", final, str(stored(row["steps"])), str(stored(row["cpu"])),
        f"{row['step_ms']:.1f}", studies, f"{row['failed']} of {row['trials']}",
    ]  # fmt: skip


def _cost(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    return (
        "failed"
        if "failed" in entry
        else f"{entry['ratio']:.2f}{' *' if 'note' in entry else ''} ({entry['ms']:.2f} ms)"
    )


PROTOCOL = """## How

- Rows are tuned by quasi-random trials of two numbers: the learning rate, log-uniform over the same range in units of each default, and one knob (memory of the squared gradient, or damping). AdamW gets 20 trials on all steps, the others 5 in each study (3 studies on the smaller tasks) on half of the steps; the same points for all. Tuning has a seed of its own.
- The space was not fixed blindly: after about 25 single runs with seed 0, which no result uses, the rates of the language models were moved up for all (AdamW was best at the upper end of the first range), and again by a factor of two after a whole run on the other corpus (Muon and ours were), and rows with a polar factor, torch's Muon among them, got their momentum as the knob; momentum .9 had done better than the default .95. First moments of AdamW and SOAP stay at their defaults. Held-out text is the same for tuning, those looks and the runs.
- The target of a seed is the held-out metric of AdamW at its best setting with that seed. Every row is run at its best setting with the same seeds at several lengths, each with a whole schedule; the crossing is interpolated. `<=`: the shortest run was already below the target.
- Time is process CPU time with one thread; evaluations are not counted. Ratios are geometric means over seeds with a 95 % interval; p-values are one-sided, Student's t with n - 1 degrees, Holm over our rows.
- Same schedule shape for all (5 % up, then linearly to zero; schedule-free keeps its rate), no weight decay, no clipping. Muon, SOAP and PSGD get the weights of linear maps, AdamW(fused) the rest at the same rate; ours pair the same weights with DiagonalNG. heavyball runs uncompiled: compiling costs minutes a process on a CPU.
- Optimizers that need the likelihood get it from an eighth of the batch on noisy tasks, from all of it on deterministic ones.
""".splitlines()  # noqa: E501


def save(result: Result, path: Path) -> list[Path]:
    """Raw JSON, tables as Markdown and plots as PNG beside it; the files written."""
    write_bytes(path, (json.dumps(result, allow_nan=False, default=str) + "\n").encode())
    tables = path.with_suffix(".md")
    write_bytes(tables, (markdown(result) + "\n").encode())
    from constellation.experiments.optim_plots import plot

    return [path, tables, *plot(result, path)]


def rewrite(readme: Path, result: Result) -> None:
    """Replace what stands between the markers of `readme` by the table."""
    text = readme.read_text(encoding="utf-8")
    start, end = (text.find(m) for m in MARKERS)
    if start < 0 or end < start:
        raise ConfigError(
            f"{readme}: no {MARKERS[0]} ... {MARKERS[1]} in it; put the two lines where the table belongs"
        )
    body = f"{text[: start + len(MARKERS[0])]}\n\n{readme_table(result).strip()}\n\n{text[end:]}"
    write_bytes(readme, body.encode())
