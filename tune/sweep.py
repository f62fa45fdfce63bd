"""A sweep as a deterministic simulation whose results happen to be computed. No Ray here, no clock of the wall.

`workers` virtual workers train evaluations of known virtual durations. Whenever one is free, scheduler and search are
asked what it does next; results are told in virtual order of their ends, whatever the real one. So what is suggested
and decided is a function of the request and the results alone:

    sweep = Sweep(search, scheduler, trials=24, workers=2, duration=..., emit=journal.emit)
    while action := sweep.next():
        match action:
            case Start(trial, evaluation): begin it, really, or look its outcome up
            case Wait(evaluation):         sweep.tell(evaluation, its outcome); others are told later

The same machine, fed with recorded outcomes, goes on with a killed sweep and replays a finished one under another
scheduler, search or number of workers. `next` may be asked again at any time: Start is said once, Wait until told.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tune.history import Evaluation, Outcome, Trial
from tune.race import Race
from tune.schedulers import Scheduler
from tune.search import Search

Duration = Callable[[Trial, Evaluation, float], float]
"""Virtual seconds of an evaluation that trains the given share of the budget; known before it starts, above 0."""


class Emit(Protocol):
    """Hears every event (events.py)."""

    def __call__(self, event: str, **values: Any) -> None: ...


@dataclass(frozen=True)
class Start:
    """Begin `evaluation` of `trial`: train `share` of the budget, from scratch or from its parent's weights."""

    trial: Trial
    evaluation: Evaluation
    share: float


@dataclass(frozen=True)
class Wait:
    """Nothing can be decided before this evaluation's outcome is told."""

    evaluation: Evaluation


def silent(event: str, **values: Any) -> None:
    """Emits nothing."""


class Sweep:
    """The state machine; `clock` is virtual, `winner` the best trial once it has finished."""

    def __init__(
        self,
        search: Search,
        scheduler: Scheduler,
        *,
        trials: int,
        workers: int,
        duration: Duration,
        seeds: int = 1,
        emit: Emit = silent,
    ):
        self.search, self.scheduler, self.workers = search, scheduler, workers
        self.clock, self.finished = 0.0, False
        self.trials: dict[int, Trial] = {}
        self.top = len(scheduler.rungs) - 1
        self._most, self._duration, self._emit = trials, duration, emit
        self._running: list[tuple[float, int, Evaluation]] = []  # heap by virtual end, then order of starts
        self._started = 0
        self._searching = True  # until search and scheduler have nothing more
        self._at_top: dict[int, float] = {}
        self._reached: dict[int, int] = {}  # highest rung that a trial was started at
        self._failed: set[int] = set()
        self._queue: deque[Evaluation] = deque()
        self._race: Race | None = None
        self._seeds = seeds

    def next(self) -> Start | Wait | None:
        """What to do; None when the sweep has finished."""
        if self.finished:
            return None
        if len(self._running) < self.workers:
            evaluation = self._choose()
            if evaluation is not None:
                return self._start(evaluation)
        if self._running:
            return Wait(self._running[0][2])
        self.finished = True
        self._emit("finished")
        return None

    def tell(self, evaluation: Evaluation, outcome: Outcome) -> None:
        """The outcome of the evaluation that `next` waits for."""
        if not self._running or self._running[0][2] != evaluation:
            raise ValueError(f"{evaluation}: the sweep does not wait for it")
        self.clock = heapq.heappop(self._running)[0]
        self._emit(
            "ended", evaluation=str(evaluation), clock=self.clock, status=outcome.status, metric=outcome.metric,
            reason=outcome.reason, cost=asdict(outcome.cost), attempts=outcome.attempts,
        )  # fmt: skip
        metric = math.inf if outcome.metric is None or not math.isfinite(outcome.metric) else outcome.metric
        if self._race is not None and evaluation.seed:
            self._race.told(evaluation, metric)
            return
        if evaluation.rung == self.top:
            self._at_top[evaluation.trial] = metric
        if metric == math.inf:
            self._failed.add(evaluation.trial)
        if self._searching:
            self.search.tell(evaluation.trial, metric, self.scheduler.rungs[evaluation.rung])
            self.scheduler.told(self.trials[evaluation.trial], evaluation, metric)

    @property
    def winner(self) -> int | None:
        """The trial with the lowest mean over the seeds that it was given, of those that no other has beaten."""
        return self._race.leader if self._race is not None else None

    def _choose(self) -> Evaluation | None:
        """What a free worker does next, None when there is nothing before another result."""
        if self._searching:
            if promotion := self.scheduler.promote():
                evaluation, why = promotion
                self._decide(evaluation.trial, "promote", evaluation, why)
                return evaluation
            if (number := len(self.trials)) < self._most:
                suggestion = self.scheduler.suggest(number, self.search)
                if suggestion is not None:
                    trial = Trial(number, suggestion.settings, suggestion.origin, suggestion.parent)
                    self.trials[number] = trial
                    self._emit(
                        "suggested", trial=number, settings=trial.settings, origin=trial.origin, parent=trial.parent
                    )
                    if trial.parent is not None and trial.origin == "pbt":
                        self._decide_explore(trial, Evaluation(number, suggestion.rung))
                    return Evaluation(number, suggestion.rung)
            if self._running:
                return None
            self._end_search()
        if not self._queue and not self._running:
            self._next_round()
        return self._queue.popleft() if self._queue else None

    def _start(self, evaluation: Evaluation) -> Start:
        trial = self.trials[evaluation.trial]
        self._reached[trial.number] = max(evaluation.rung, self._reached.get(trial.number, 0))
        start = Start(trial, evaluation, self.share(trial, evaluation))
        self._emit("started", evaluation=str(evaluation), clock=self.clock)
        end = self.clock + self._duration(trial, evaluation, start.share)
        heapq.heappush(self._running, (end, self._started, evaluation))
        self._started += 1
        return start

    def share(self, trial: Trial, evaluation: Evaluation) -> float:
        """The part of the budget that an evaluation trains: what its parent has done is not done again."""
        rungs = self.scheduler.rungs
        done = rungs[evaluation.rung - 1] if trial.parent is not None and evaluation.rung else 0.0
        return rungs[evaluation.rung] - done

    def _end_search(self) -> None:
        """No more trials, no more promotions: say who stays behind, and see the default at the full budget."""
        self._searching = False
        for trial, why in self.scheduler.left():
            if trial != 0:
                self._decide(trial, "stop", None, why)
        if 0 in self.trials and 0 not in self._at_top and 0 not in self._failed:
            default = Evaluation(0, self.top)
            self._decide(0, "promote", default, "the default, to be compared at the full budget")
            self._queue.append(default)

    def _next_round(self) -> None:
        """One more seed for whoever is still in the race."""
        if self._race is None:
            self._race = Race(self.top, self._seeds)
            whole = {trial: metric for trial, metric in self._at_top.items() if metric < math.inf}
            for trial, why in self._race.begin(whole):
                self._decide(trial, "stop", None, why)
        elif self._race.seed < self._seeds:
            for trial, decision, why in self._race.judge():
                self._decide(trial, decision, None, why)
        for evaluation in self._race.next_round():
            why = f"seed {evaluation.seed} of {self._seeds}: not beaten so far"
            self._decide(evaluation.trial, "more_seeds", evaluation, why)
            self._queue.append(evaluation)

    def _decide_explore(self, trial: Trial, to: Evaluation) -> None:
        assert trial.parent is not None
        same = trial.settings == self.trials[trial.parent].settings
        why = f"goes on from trial {trial.parent}, {'as it is' if same else 'perturbed'}"
        self._decide(trial.number, "promote" if same else "explore", to, why)

    def _decide(self, trial: int, decision: str, to: Evaluation | None, why: str) -> None:
        self._emit("decided", trial=trial, decision=decision, to=None if to is None else str(to), why=why)
