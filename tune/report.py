"""What came out of a sweep, in words, tables and numbers, from its log alone. No Ray here.

    OUT/report.md     what won, by how much, whether that is beyond noise, what it cost; then the tables
    OUT/report.json   the same as data: trials, best, importance, rungs, transfer, spent, and the words
    OUT/plots/*.png   and .svg, when they are asked for (plots.py)

A sweep that is still going on, or in which everything failed, has a report too: it says so.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from constellation.storage.atomic import write_bytes, write_json
from tune.analysis import COSTS, FEWEST_PAIRS, RungCorrelation
from tune.findings import SweepReport, analyse, ranked
from tune.history import Evaluation, History, Outcome, read_history
from tune.importance import FEWEST, Importance, searched
from tune.transfer import TransferRule

SHOWN = 20  # rows of a table


def report(out: Path, plots: bool = False) -> SweepReport:
    """Read the sweep in folder `out` and write its report there; ArtifactError when there is no readable log.

    With `plots`, the figures too: a ConfigError, after report.md and report.json are written, without matplotlib.
    """
    found = analyse(read_history(out))
    write_json(out / "report.json", to_json(found))
    write_bytes(out / "report.md", markdown(found).encode())
    if plots:
        from tune.plots import plot

        names = [path.name for path in plot(found, out / "plots") if path.suffix == ".png"]
        write_bytes(out / "report.md", markdown(found, names).encode())
    return found


def main_text(out: Path, as_json: bool = False) -> str:
    """What `constellation tune report OUT` prints; plots are drawn where matplotlib is, and the text says so if not."""
    import importlib.util

    drawn = importlib.util.find_spec("matplotlib") is not None
    found = report(out, plots=drawn)
    if as_json:
        return json.dumps(to_json(found), allow_nan=False)
    where = f"{out / 'report.md'}, {out / 'report.json'}"
    last = f"{where}, {out / 'plots'}" if drawn else f"{where}; no plots: pip install 'constellation[plots]'"
    return markdown(found) + "\n" + last


def words(found: SweepReport) -> list[str]:
    """What a reader should know first: a sentence each."""
    history, metric = found.history, found.metric
    count, total = Counter(_statuses(found).values()), found.spent["all"]
    state = "has finished" if history.finished else f"has not finished: {len(history.running)} evaluations under way"
    told = [f"The sweep {state}; {_plural(len(history.trials), 'trial')} ({_counted(count)})."]
    if found.best is None:
        why = Counter(o.reason or "no reason given" for o in history.outcomes.values() if o.metric is None)
        told.append("No evaluation has succeeded, so there is nothing to compare.")
        told += [f"Failed {n} times: {reason}." for reason, n in why.most_common(3)]
        return [*told, _costs(total, found.spent)]
    best, rung = found.best, found.standings.rung
    seeds = int(np.isfinite(found.standings.loss_TS[best]).sum())
    number = found.standings.numbers[best]
    origin = history.trials[number].origin
    told.append(f"Trial {number} ({origin}) has the lowest {metric}: {found.mean(best):.5g}, {_plural(seeds, 'seed')}.")
    if rung is not None and rung < found.standings.loss_TRS.shape[1] - 1:
        told.append(f"No trial has finished at the full budget; trials are compared at rung {rung}.")
    told += [_against_default(found), *_against_others(found, seeds), _costs(total, found.spent)]
    told += [f"Rungs {r.lower} and {r.higher}: {r.verdict} ({_rho(r)})." for r in found.rungs]
    mattered = [i.name for i in found.importance if i.verdict == "matters"]
    if found.importance:
        told.append(f"Settings that mattered: {', '.join(mattered) or 'none distinguishable from noise'}.")
    else:
        told.append(f"Importance of settings: fewer than {FEWEST} finished trials, unknown.")
    return told


def _against_default(found: SweepReport) -> str:
    if found.default is None:
        return "There is no finished default configuration at this budget to compare with."
    if found.default == found.best:
        return "That is the default configuration: the sweep found nothing better."
    gap = found.beats_default
    if gap is None:
        return "It shares no seed with the default configuration: no comparison."
    if gap.low is None:
        return (
            f"Against the default: {gap.mean:+.4g} on one seed. No interval can be given, for the noise between seeds "
            "is unknown; more seeds (--seeds 3) would tell."
        )
    family = sum(d.low is not None for d in found.to_default.values())
    told = f"Against the default: {gap} over {gap.seeds} paired seeds: "
    if not gap.shown:
        return told + "no difference at this budget."
    if gap.p_holm is not None and gap.p_holm < 0.05:
        return told + f"beyond the noise of seeds (Holm p = {gap.p_holm:.2g} over {family} compared)."
    return told + (
        f"the interval excludes zero, but not after Holm's correction for the {family} compared "
        f"(p = {gap.p_holm:.2g}); fresh seeds would decide."
    )


def _against_others(found: SweepReport, seeds: int) -> list[str]:
    compared = [d for d in found.to_best.values() if d.low is not None]
    alone = sum(d.low is None for d in found.to_best.values())
    told = []
    if seeds == 1 and found.to_best:
        told.append("Trials have one seed in common: their order may be noise, and no interval can be given.")
    if compared:
        same, beaten = (sum(d.shown is shown for d in compared) for shown in (False, True))
        sure = sum(d.verdict == "different" for d in compared)
        told.append(
            f"Of {len(compared)} trials with two or more seeds in common with it, {beaten} differ from it, {sure} of "
            f"them after Holm's correction; {same} show no difference at this budget."
        )
    if seeds > 1 and alone:
        told.append(f"{_plural(alone, 'trial')} shared one seed with it: not compared beyond the order.")
    if found.to_best:
        told.append("The best was chosen on these seeds, which flatters it: a run on fresh seeds is the proof.")
    return told


def markdown(found: SweepReport, plots: Sequence[str] = ()) -> str:
    """The whole report."""
    name = Path(str(found.history.request.get("name") or "sweep")).name
    parts = [f"# {name}: {found.metric}, less is better", *(f"- {sentence}" for sentence in words(found))]
    parts += ["", "## Ranking", "", *_ranking(found)]
    parts += ["", "## Importance", "", *_importance(found.importance)]
    if found.rungs:
        parts += ["", "## Rungs", "", *_rungs(found)]
    for rule in found.transfer:
        parts += ["", "## Learning rate across sizes", "", *_transfer(rule)]
    parts += ["", "## Cost", "", *_spent(found.spent)]
    if plots:
        parts += ["", "## Plots", "", *(f"![{Path(p).stem.replace('_', ' ')}](plots/{p})\n" for p in plots)]
    return "\n".join(parts) + "\n"


def _ranking(found: SweepReport) -> list[str]:
    names = [e["name"] for e in searched(found.history.request)]
    head = ["trial", "seeds", found.metric, "minus the best [95 %]", "Holm p", "verdict", *names]
    rows = []
    order = ranked(found)
    shown = order[:SHOWN]
    if found.default is not None and found.default not in shown:
        shown = [*shown, found.default]
    for t in shown:
        trial, gap = found.history.trials[found.standings.numbers[t]], found.to_best.get(t)
        seeds = int(np.isfinite(found.standings.loss_TS[t]).sum())
        label = f"{trial.number}, default" if trial.origin == "default" else str(trial.number)
        compared = ["", "", "best"] if t == found.best else ["-", "-", "no seed in common"]
        if gap is not None:
            compared = [str(gap), "-" if gap.p_holm is None else f"{gap.p_holm:.2g}", gap.verdict]
        rows.append(
            [label, str(seeds), f"{found.mean(t):.5g}", *compared, *(_value(trial.settings.get(n)) for n in names)]
        )
    left = [f"\n{len(order) - len(shown)} more in report.json."] if len(order) > len(shown) else []
    return [*_table(head, rows), *left] if rows else ["No trial has finished."]


def _importance(found: Sequence[Importance]) -> list[str]:
    if not found:
        return [f"Unknown: fewer than {FEWEST} finished trials."]
    rows = [
        [i.name, f"{i.value:.3g} [{i.low:.3g}, {i.high:.3g}]", f"{i.null:.2g}, {i.null_high:.2g}", i.verdict]
        for i in found
    ]
    note = (
        "\nPED-ANOVA of the best quarter against all finished trials, bootstrap over trials; the null is the same with "
        "the metric shuffled."
    )
    return [*_table(["setting", "importance [95 %]", "null: median, 97.5 %", "verdict"], rows), note]


def _rungs(found: SweepReport) -> list[str]:
    shares = found.history.rungs
    label = [f"{r} ({shares[r]:.3g})" if r < len(shares) else str(r) for r in range(found.standings.loss_TRS.shape[1])]
    rows = [[label[r.lower], label[r.higher], str(r.pairs), _rho(r), r.verdict] for r in found.rungs]
    note = (
        f"\nSpearman's rho over trials finished at both, bootstrap; {FEWEST_PAIRS} pairs at least. Where only the best "
        "of the lower rung went on, their narrow range makes rho smaller than it is over all trials."
    )
    return [*_table(["rung (share)", "rung (share)", "pairs", "rho [95 %]", "verdict"], rows), note]


def _transfer(rule: TransferRule) -> list[str]:
    group = ", ".join(f"{n} = {_value(v)}" for n, v in rule.group.items())
    exponents = [
        f"lr* ~ {n}^p, p = {p:.3f} [{rule.intervals[n][0]:.3f}, {rule.intervals[n][1]:.3f}]"
        for n, p in rule.exponents.items()
    ]
    told = "; ".join(exponents) or "No rule: too few sizes have a lowest point inside the rates tried."
    rows = [
        [
            f"{o.width:g}", f"{o.depth:g}", str(o.evaluations),
            o.note if o.rate is None else f"{o.rate:.3g}{_ends(o.interval)}",
            "-" if o.regret is None else f"{o.regret:.3g}{_ends(o.regret_interval)}",
        ]
        for o in rule.optima
    ]  # fmt: skip
    head = ["width", "depth", "evaluations", "lr* [95 %]", "regret of the first lr* [95 %]"]
    return [*([f"{group}.\n"] if group else []), f"{told}\n", *_table(head, rows)]


def _spent(total: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = {"full": "at the highest rung", "lower": "below it", "failed": "failed", "all": "all"}
    rows = [
        [names[fate], f"{row['evaluations']:.0f}", *(f"{row[c]:.4g}" for c in COSTS)] for fate, row in total.items()
    ]
    return _table(["evaluations", "number", "tokens", "FLOPs", "CPU-seconds", "seconds"], rows)


def to_json(found: SweepReport) -> dict[str, Any]:
    """Plain data; what is unknown is null."""
    history, standings = found.history, found.standings
    statuses, by_trial = _statuses(found), _by_trial(history)
    trials = []
    for t, number in enumerate(standings.numbers):
        trial, mine = history.trials[number], by_trial.get(number, {})
        top = [(e.rung, e.seed, o.metric) for e, o in mine.items() if o.metric is not None]
        rung = max((r for r, _, _ in top), default=None)
        per_seed = {str(s): m for r, s, m in sorted(top) if r == rung}
        trials.append({
            "id": number, "origin": trial.origin, "parent": trial.parent, "settings": trial.settings,
            "seeds": [int(s) for s in per_seed], "status": statuses[number], "rung": rung,
            "metric": math.fsum(per_seed.values()) / len(per_seed) if per_seed else None, "per_seed": per_seed,
            "cost": {c: math.fsum(getattr(o.cost, c) for o in mine.values()) for c in COSTS},
            "reasons": sorted({o.reason for o in mine.values() if o.metric is None}),
            "to_best": found.to_best[t].to_json() if t in found.to_best else None,
            "to_default": found.to_default[t].to_json() if t in found.to_default else None,
        })  # fmt: skip
    best = None
    if found.best is not None:
        best = {**trials[found.best], "to_best": None}
    return _finite({
        "schema": 1, "metric": found.metric, "finished": history.finished, "words": words(found), "best": best,
        "default": None if found.default is None else trials[found.default], "trials": trials,
        "importance": [i.to_json() for i in found.importance], "rungs": [r.to_json() for r in found.rungs],
        "transfer": [r.to_json() for r in found.transfer], "spent": found.spent,
    })  # fmt: skip


def _by_trial(history: History) -> dict[int, dict[Evaluation, Outcome]]:
    found: dict[int, dict[Evaluation, Outcome]] = {}
    for evaluation, outcome in history.outcomes.items():
        found.setdefault(evaluation.trial, {})[evaluation] = outcome
    return found


def _statuses(found: SweepReport) -> dict[int, str]:
    """By trial: running | done (at the highest rung) | stopped (below it) | failed | suggested."""
    history, rung = found.history, found.standings.rung
    running, by_trial = {e.trial for e in history.running}, _by_trial(history)
    statuses = {}
    for number in history.trials:
        mine = by_trial.get(number, {})
        reached = [e.rung for e, o in mine.items() if o.metric is not None]
        if number in running:
            statuses[number] = "running"
        elif reached and max(reached) == rung:
            statuses[number] = "done"
        elif any(o.metric is None for o in mine.values()):
            statuses[number] = "failed"
        else:
            statuses[number] = "stopped" if reached else "suggested"
    return statuses


def _costs(total: Mapping[str, float], parts: Mapping[str, Mapping[str, float]]) -> str:
    failed, lower = parts["failed"], parts["lower"]
    return (
        f"It cost {total['flops']:.3g} FLOPs and {total['cpu_s']:.4g} CPU-seconds in "
        f"{_plural(int(total['evaluations']), 'evaluation')}, of which {failed['cpu_s']:.4g} CPU-seconds in failed "
        f"ones ({failed['evaluations']:.0f}) and {lower['cpu_s']:.4g} below the highest rung "
        f"({lower['evaluations']:.0f})."
    )


def _counted(count: Mapping[str, int]) -> str:
    kinds = ("done", "stopped", "failed", "running", "suggested")
    return ", ".join(f"{count[k]} {k}" for k in kinds if count.get(k)) or "none yet"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rho(found: RungCorrelation) -> str:
    return "-" if found.rho is None else f"{found.rho:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
