"""A recorded sweep under another scheduler, search or number of workers, without training anything. No Ray here.

The machine is the sweep's own (sweep.py), told recorded outcomes; an evaluation lasts as long as it did (`wall_s`).
The record is a table: a search may choose only among recorded trials. What it suggests is replaced by the nearest one
that was not chosen yet (random search draws among them), and told as if it had been the suggestion.

Where a run is wanted that the record does not have, it is imputed, and counted: a trial that was stopped at a lower
rung is taken to end as the worst that went on (it was behind them there; so the few that went on do not make every
search look good), any other as the nearest trial that has such a run. The race over further seeds is not replayed.

    regret       loss of the chosen trial - that of the recorded best, on the seeds both have (first seed if imputed)
    cost         FLOPs and CPU-seconds of everything that was started
    makespan     seconds from the first start to the last end,   utilisation  busy / (workers x makespan), in [0, 1]

Each is repeated with other seeds of the search; intervals are Student's over the repeats.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from constellation.errors import ConfigError
from tune.analysis import Floats, Standings, differences
from tune.history import Evaluation, History, Outcome, Trial, read_history
from tune.importance import searched, unit
from tune.race import paired_interval
from tune.request import SweepRequest
from tune.schedulers import make_scheduler
from tune.search import Search, make_search
from tune.sweep import Start, Sweep

FIELDS = ("regret", "flops", "cpu_s", "makespan_s", "utilisation", "imputed")


@dataclass(frozen=True)
class Played:
    """One replay from beginning to end."""

    chosen: int  # number of the recorded trial
    regret: float
    flops: float
    cpu_s: float
    makespan_s: float
    utilisation: float
    imputed: float  # share of the evaluations
    evaluations: int


@dataclass(frozen=True)
class ReplayRow:
    """Repeats of one way to sweep."""

    label: str
    workers: int
    trials: int
    repeats: tuple[Played, ...]

    def mean(self, field: str) -> tuple[float, float, float]:
        """Mean and 95 % interval over the repeats; of one repeat, or equal ones, the interval is the value."""
        middle, low, high = paired_interval([float(getattr(played, field)) for played in self.repeats])
        return (middle, low, high) if len(self.repeats) > 1 else (middle, middle, middle)


@dataclass(frozen=True)
class SweepReplay:
    """The rows of the table: as recorded, as asked, random search with the full budget at the cost of that."""

    rows: tuple[ReplayRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "notes": list(self.notes),
            "rows": [{**asdict(row), "mean": {field: list(row.mean(field)) for field in FIELDS}} for row in self.rows],
        }

    def __str__(self) -> str:
        head = f"{'':<28}{'workers':>8}{'trials':>7}{'regret [95 %]':>36}{'FLOPs':>11}{'CPU-s':>11}{'makespan, s':>13}"
        lines = [head + f"{'busy':>7}{'imputed':>9}"]
        for row in self.rows:
            regret = "{:+.4g} [{:+.4g}, {:+.4g}]".format(*row.mean("regret"))
            middle = {field: row.mean(field)[0] for field in FIELDS}
            lines.append(
                f"{row.label:<28}{row.workers:>8}{row.trials:>7}{regret:>36}{middle['flops']:>11.3g}"
                f"{middle['cpu_s']:>11.4g}{middle['makespan_s']:>13.4g}{middle['utilisation']:>7.0%}"
                f"{middle['imputed']:>9.0%}"
            )
        return "\n".join([*lines, "", *self.notes])


def replay(
    out: Path,
    *,
    scheduler: str | None = None,
    search: str | None = None,
    workers: int | None = None,
    seeds: int = 10,
    trials: int | None = None,
) -> SweepReplay:
    """The sweep in `out` under another scheduler, search, number of workers or of trials (default: as recorded, all).

    ConfigError when the record does not hold what the scheduler needs: its rungs, two whole trials.
    """
    history = read_history(out)
    request = SweepRequest.from_json(history.request)
    if "pbt" in (request.scheduler, scheduler):
        raise ConfigError("pbt cannot be replayed: its outcomes depend on the weights a trial goes on from; use asha")
    recording = Recording(history, request)
    have = len(recording.numbers)
    if trials is not None and not 1 <= trials <= have:
        raise ConfigError(f"trials={trials}: the record holds {have}; choose 1 to {have}")
    scheduler, search = scheduler or request.scheduler, search or request.search
    workers = workers or request.workers
    asked = replace(request, scheduler=scheduler, search=search, trials=trials or have, workers=workers, seeds=1)
    recording.check(asked)
    row = _row(f"{search}, {scheduler}", recording, asked, seeds)
    full = recording.whole()
    each = float(np.mean([recording.outcomes[t, recording.top, 0].cost.flops for t in full])) or 1.0
    afford = max(1, min(have, int(row.mean("flops")[0] / each)))
    plain = replace(asked, scheduler="none", search="random", trials=afford)
    notes = [
        f"Replayed from the outcomes of {have} recorded trials, {len(full)} of which ran to the full budget; a search "
        "chooses among recorded trials, by the nearest one to what it suggests.",
        f"Repeated {seeds} times with other seeds of the search.",
    ]
    if asked.trials == have:
        notes.append("Every recorded trial is visited: another search changes the order alone.")
    if not history.finished:
        notes.append("The sweep has not finished: what was recorded so far is replayed.")
    random = _row("random, none, at that cost", recording, plain, seeds)
    if max(row.mean("imputed")[0], random.mean("imputed")[0]) > 0:
        notes.append(
            "Imputed runs are not in the record: of a stopped trial, the worst result of those that went on; of "
            "another, the nearest trial's. Regret and cost are as good as that."
        )
    return SweepReplay((recording.as_recorded(), row, random), tuple(notes))


def main_text(
    out: Path,
    *,
    scheduler: str | None = None,
    search: str | None = None,
    workers: int | None = None,
    seeds: int = 10,
    as_json: bool = False,
) -> str:
    """What `constellation tune replay OUT` prints: a table, or JSON."""
    found = replay(out, scheduler=scheduler, search=search, workers=workers, seeds=seeds)
    return json.dumps(found.to_json(), allow_nan=False) if as_json else str(found)


class Recording:
    """Outcomes as a table: row t is a recorded trial that has any outcome, `numbers[t]` its number."""

    def __init__(self, history: History, request: SweepRequest):
        self.history, self.request = history, request
        self.numbers = sorted({e.trial for e in history.outcomes if e.seed == 0})
        row = {number: t for t, number in enumerate(self.numbers)}
        self.outcomes: dict[tuple[int, int, int], Outcome] = {
            (row[e.trial], e.rung, e.seed): o for e, o in history.outcomes.items() if e.trial in row
        }
        self.shares = tuple(history.rungs)
        self.top = len(self.shares) - 1
        self.entries = searched(history.request)
        self.point_TD = self.place([history.trials[number].settings for number in self.numbers])
        self.standings = Standings.of(history)
        self.best = self.standings.best()
        if len(self.whole()) < 2 or self.best is None or self.standings.rung != self.top:
            raise ConfigError("the record holds fewer than two trials that finished at the full budget: let it go on")

    def place(self, settings: Sequence[dict[str, Any]]) -> Floats:
        """Points (N, D) in the unit cube."""
        columns = [unit(e, [s.get(e["name"], e.get("default")) for s in settings]) for e in self.entries]
        return np.stack(columns, 1) if columns else np.zeros((len(settings), 0))

    def whole(self) -> list[int]:
        """Rows that finished at the full budget."""
        return [t for t, r, s in self.outcomes if (r, s) == (self.top, 0) and self.outcomes[t, r, s].metric is not None]

    def nearest(self, point_D: Floats, rows: Sequence[int]) -> int:
        """Of `rows` the one closest to the point: squared distance, where another choice is 1 away."""
        gap = np.abs(self.point_TD[list(rows)] - point_D)
        choice = np.array([e["prior"] == "choice" for e in self.entries], bool)
        gap[:, choice] = gap[:, choice] > 1e-9
        return rows[int(np.argmin((gap * gap).sum(1)))]

    def rung(self, share: float) -> int | None:
        """The recorded rung that trains this share of the budget."""
        return next((r for r, s in enumerate(self.shares) if math.isclose(s, share, rel_tol=1e-6)), None)

    def check(self, asked: SweepRequest) -> None:
        """ConfigError unless every rung of the asked scheduler was recorded."""
        scheduler = make_scheduler(asked.scheduler, asked.space, asked.trials, asked.seed, asked.levels)
        recorded = {self.shares[r] for (_, r, _), o in self.outcomes.items() if o.metric is not None}
        for share in scheduler.rungs:
            if not any(math.isclose(share, s, rel_tol=1e-6) for s in recorded):
                have = ", ".join(f"{s:.3g}" for s in sorted(recorded))
                raise ConfigError(
                    f"--scheduler {asked.scheduler}: needs runs of {share:.3g} of the budget, recorded are {have}; "
                    "choose the recorded scheduler, or sweep a few trials with this one first"
                )

    def outcome(self, row: int, rung: int) -> tuple[Outcome, bool]:
        """Of seed 0, and whether it is another trial's."""
        if (found := self.outcomes.get((row, rung, 0))) is not None:
            return found, False
        lower = [self.outcomes[row, r, 0] for r in range(rung) if (row, r, 0) in self.outcomes]
        if lower and lower[-1].metric is None:  # it failed already
            return lower[-1], False
        rows = [t for t, r, s in self.outcomes if (r, s) == (rung, 0)]
        nearest = self.outcomes[self.nearest(self.point_TD[row], rows), rung, 0]
        if not lower:
            return nearest, True
        worst = max(o.metric for t in rows if (o := self.outcomes[t, rung, 0]).metric is not None)
        return replace(nearest, status="done", metric=worst, reason=""), True

    def regret(self, row: int, metric: float) -> float:
        """Of choosing this row, which was told to have `metric`."""
        assert self.best is not None
        at = self.standings.numbers.index(self.numbers[row])
        if at == self.best:
            return 0.0
        gap = differences(self.standings, self.best).get(at)
        return gap.mean if gap is not None else metric - float(self.standings.loss_TS[self.best][0])

    def as_recorded(self) -> ReplayRow:
        """The sweep itself without its race: the recorded order of starts on its workers, as long as each lasted."""
        order = sorted((o.started, e) for e, o in self.history.outcomes.items() if e.seed == 0)
        free, busy, makespan = [0.0] * self.request.workers, 0.0, 0.0
        outcomes = [self.history.outcomes[e] for _, e in order]
        for outcome in outcomes:
            seconds = outcome.cost.wall_s
            end = heapq.heappop(free) + seconds
            heapq.heappush(free, end)
            busy, makespan = busy + seconds, max(makespan, end)
        tops = {
            t: o.metric for (t, r, s), o in self.outcomes.items() if (r, s) == (self.top, 0) and o.metric is not None
        }
        chosen = min(tops, key=lambda t: (tops[t], t))
        played = Played(
            self.numbers[chosen], self.regret(chosen, tops[chosen]), sum(o.cost.flops for o in outcomes),
            sum(o.cost.cpu_s for o in outcomes), makespan, _share(busy, self.request.workers * makespan), 0.0,
            len(outcomes),
        )  # fmt: skip
        return ReplayRow("as recorded, on one seed", self.request.workers, len(self.numbers), (played,))


class RecordedSearch:
    """A search restricted to recorded trials, each once; `row` says which recorded trial a trial is."""

    def __init__(self, inner: Search | None, recording: Recording, seed: int):
        self._inner, self._recording = inner, recording
        rows = range(len(recording.numbers))
        default = [t for t in rows if recording.history.trials[recording.numbers[t]].origin == "default"]
        rest = [t for t in rows if t not in default]
        self._left = [*default, *np.random.default_rng(seed).permutation(np.array(rest, int)).tolist()]
        self.row: dict[int, int] = {}

    def suggest(self, number: int) -> tuple[dict[str, Any], str] | None:
        if not self._left:
            return None
        asked = self._inner.suggest(number) if self._inner is not None else None
        if self._inner is not None and asked is None:
            return None
        row = self._left[0]
        if asked is not None:
            row = self._recording.nearest(self._recording.place([asked[0]])[0], self._left)
        self._left.remove(row)
        self.row[number] = row
        return self._recording.history.trials[self._recording.numbers[row]].settings, asked[1] if asked else "random"

    def tell(self, trial: int, metric: float, share: float) -> None:
        if self._inner is not None:
            self._inner.tell(trial, metric, share)


def _row(label: str, recording: Recording, asked: SweepRequest, seeds: int) -> ReplayRow:
    repeats = tuple(_play(recording, asked, seed) for seed in range(seeds))
    return ReplayRow(label, asked.workers, asked.trials, repeats)


def _play(recording: Recording, asked: SweepRequest, seed: int) -> Played:
    inner = None if asked.search == "random" else make_search(asked.search, asked.space, seed)
    search = RecordedSearch(inner, recording, seed)
    scheduler = make_scheduler(asked.scheduler, asked.space, asked.trials, seed, asked.levels)
    rungs = [recording.rung(share) for share in scheduler.rungs]

    def looked_up(evaluation: Evaluation) -> tuple[Outcome, bool]:
        rung = rungs[evaluation.rung]
        assert rung is not None
        return recording.outcome(search.row[evaluation.trial], rung)

    def duration(trial: Trial, evaluation: Evaluation, share: float) -> float:
        return max(looked_up(evaluation)[0].cost.wall_s, 1e-9)

    sweep = Sweep(search, scheduler, trials=asked.trials, workers=asked.workers, duration=duration)
    outcomes: list[tuple[Outcome, bool]] = []
    tops: dict[int, float] = {}
    for evaluation in _told(sweep, looked_up):
        outcome = looked_up(evaluation)
        outcomes.append(outcome)
        if evaluation.rung == sweep.top and outcome[0].metric is not None:
            tops[search.row[evaluation.trial]] = outcome[0].metric
    if not tops:
        raise ConfigError("nothing finished at the full budget in this replay: take more trials")
    chosen = min(tops, key=lambda t: (tops[t], t))
    busy = sum(o.cost.wall_s for o, _ in outcomes)
    return Played(
        recording.numbers[chosen], recording.regret(chosen, tops[chosen]), sum(o.cost.flops for o, _ in outcomes),
        sum(o.cost.cpu_s for o, _ in outcomes), sweep.clock, _share(busy, asked.workers * sweep.clock),
        sum(imputed for _, imputed in outcomes) / len(outcomes), len(outcomes),
    )  # fmt: skip


def _told(sweep: Sweep, looked_up: Any) -> Iterator[Evaluation]:
    """Runs the machine to its end; every evaluation as it is told."""
    while action := sweep.next():
        if not isinstance(action, Start):
            sweep.tell(action.evaluation, looked_up(action.evaluation)[0])
            yield action.evaluation


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0
