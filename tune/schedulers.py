"""Schedulers: how long each trial is trained, and which trials are trained longer. No Ray here, no clock.

A *rung* is a share of the budget; an evaluation at a rung is a complete run of that length with a schedule of its
own, for a loss in the middle of a falling learning rate tells little about the end.

    none       every trial has the whole budget
    asha       asynchronous successive halving (Li et al. 2020): whoever is among the best 1/eta of the results of a
               rung goes on to the next
    hyperband  several asha at once which begin at different rungs (Li et al. 2018)
    pbt        population based training (Jaderberg et al. 2017): after each part of the budget the worst quarter
               goes on from the best quarter's weights with perturbed settings

Metrics are lower-is-better here; a failed evaluation has the metric infinity. Everything is a function of the order
in which results are told.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from constellation.errors import ConfigError
from tune.history import Evaluation, History, Trial
from tune.search import Search
from tune.space import Space

SCHEDULERS = ("none", "asha", "hyperband", "pbt")
ETA = 3
POPULATION = 4  # the least that pbt has
MIN_PAIRS = 8  # trials at two rungs from which their rank correlation is judged


@dataclass(frozen=True)
class Suggestion:
    """A trial to be, and the rung that it begins at."""

    settings: dict[str, Any]
    origin: str
    parent: int | None = None
    rung: int = 0


class Scheduler(Protocol):
    """What the sweep asks. `rungs` are shares of the budget, rising to 1."""

    rungs: tuple[float, ...]

    def suggest(self, number: int, search: Search) -> Suggestion | None:
        """Trial `number`, None when there is none now."""
        ...

    def told(self, trial: Trial, evaluation: Evaluation, metric: float) -> None:
        """A result of seed 0."""
        ...

    def promote(self) -> tuple[Evaluation, str] | None:
        """A trial to be trained longer, and why; each is said once."""
        ...

    def left(self) -> Iterator[tuple[int, str]]:
        """At the end: trials that were not trained longer, and why."""
        ...


class FullBudget:
    """Every trial has the whole budget."""

    rungs: tuple[float, ...] = (1.0,)

    def suggest(self, number: int, search: Search) -> Suggestion | None:
        found = search.suggest(number)
        return None if found is None else Suggestion(*found)

    def told(self, trial: Trial, evaluation: Evaluation, metric: float) -> None:
        pass

    def promote(self) -> tuple[Evaluation, str] | None:
        return None

    def left(self) -> Iterator[tuple[int, str]]:
        return iter(())


class Asha:
    """Asynchronous successive halving over `rungs` from the rung `first` on."""

    def __init__(self, rungs: tuple[float, ...], eta: int = ETA, first: int = 0):
        self.rungs, self.eta, self.first = rungs, eta, first
        self._told: list[list[tuple[float, int]]] = [[] for _ in rungs]  # by metric, then by trial
        self._waiting: list[list[tuple[float, int]]] = [[] for _ in rungs]  # heaps of those not promoted

    def suggest(self, number: int, search: Search) -> Suggestion | None:
        found = search.suggest(number)
        return None if found is None else Suggestion(*found, rung=self.first)

    def told(self, trial: Trial, evaluation: Evaluation, metric: float) -> None:
        insort(self._told[evaluation.rung], (metric, evaluation.trial))
        heapq.heappush(self._waiting[evaluation.rung], (metric, evaluation.trial))

    def promote(self) -> tuple[Evaluation, str] | None:
        for rung in range(len(self.rungs) - 2, self.first - 1, -1):
            told, waiting = self._told[rung], self._waiting[rung]
            if not waiting or waiting[0][0] == math.inf:
                continue
            place = bisect_left(told, waiting[0]) + 1
            if place <= len(told) // self.eta:
                _, trial = heapq.heappop(waiting)
                return Evaluation(trial, rung + 1), f"place {place} of {len(told)} at rung {rung}"
        return None

    def left(self) -> Iterator[tuple[int, str]]:
        for rung in range(self.first, len(self.rungs) - 1):
            for metric, trial in sorted(self._waiting[rung]):
                if metric < math.inf:
                    place = bisect_left(self._told[rung], (metric, trial)) + 1
                    yield trial, f"place {place} of {len(self._told[rung])} at rung {rung}"


class Hyperband:
    """Asha from every rung; bracket s, which begins at rung s, has eta^(top - s) / (top - s + 1) of the trials."""

    def __init__(self, rungs: tuple[float, ...], eta: int = ETA):
        self.rungs = rungs
        top = len(rungs) - 1
        self.brackets = [Asha(rungs, eta, first) for first in range(len(rungs))]
        weights = [eta ** (top - first) / (top - first + 1) for first in range(len(rungs))]
        self._share = [weight / sum(weights) for weight in weights]
        self._size = [0] * len(rungs)
        self._bracket: dict[int, Asha] = {}

    def suggest(self, number: int, search: Search) -> Suggestion | None:
        wanted = [share * (number + 1) - size for share, size in zip(self._share, self._size, strict=True)]
        chosen = max(range(len(wanted)), key=lambda bracket: (wanted[bracket], -bracket))
        found = self.brackets[chosen].suggest(number, search)
        if found is not None:
            self._size[chosen] += 1
            self._bracket[number] = self.brackets[chosen]
        return found

    def told(self, trial: Trial, evaluation: Evaluation, metric: float) -> None:
        self._bracket[evaluation.trial].told(trial, evaluation, metric)

    def promote(self) -> tuple[Evaluation, str] | None:
        return next((found for bracket in self.brackets if (found := bracket.promote())), None)

    def left(self) -> Iterator[tuple[int, str]]:
        for bracket in self.brackets:
            yield from bracket.left()


class Pbt:
    """A population, generation by generation: generation g is rung g, each member a trial with its parent.

    When a generation is complete its members go on as they are, but for the worst quarter (failed ones first), which
    take weights and settings of a member of the best quarter, every setting perturbed: a range's by x 0.8 or 1.25 (log)
    or by a tenth of the range, a choice is drawn anew with probability 1/4.
    """

    def __init__(self, space: Space, population: int, generations: int, seed: int):
        self.rungs = tuple((g + 1) / generations for g in range(generations))
        self._space, self._population, self._seed = space, population, seed
        self._told: dict[int, list[tuple[float, int]]] = {}
        self._trials: dict[int, Trial] = {}

    def suggest(self, number: int, search: Search) -> Suggestion | None:
        generation, member = divmod(number, self._population)
        if generation == 0:
            found = search.suggest(number)
            return None if found is None else Suggestion(*found)
        before = sorted(self._told.get(generation - 1, []))
        if len(before) < self._population or generation >= len(self.rungs):
            return None
        metric, trial = before[member]
        quarter = max(1, self._population // 4)
        if member < self._population - quarter and metric < math.inf:
            return Suggestion(dict(self._trials[trial].settings), "pbt", trial, generation)
        alive = sum(1 for value, _ in before if value < math.inf)
        if not alive:  # all failed: draw anew
            found = search.suggest(number)
            return None if found is None else Suggestion(*found, rung=generation)
        draw = np.random.default_rng([self._seed, number])
        parent = before[int(draw.integers(min(quarter, alive)))][1]
        return Suggestion(self._perturbed(self._trials[parent].settings, draw), "pbt", parent, generation)

    def told(self, trial: Trial, evaluation: Evaluation, metric: float) -> None:
        self._trials[trial.number] = trial
        self._told.setdefault(evaluation.rung, []).append((metric, evaluation.trial))

    def promote(self) -> tuple[Evaluation, str] | None:
        return None

    def left(self) -> Iterator[tuple[int, str]]:
        return iter(())

    def _perturbed(self, settings: dict[str, Any], draw: np.random.Generator) -> dict[str, Any]:
        new = {}
        for dimension in self._space.dimensions:
            value, up, anew = settings[dimension.name], bool(draw.integers(2)), float(draw.random())
            if dimension.prior == "choice":
                new[dimension.name] = dimension.at(float(draw.random())) if anew < 0.25 else value
            else:
                step = (dimension.high - dimension.low) / 10
                moved = value * (1.25 if up else 0.8) if dimension.prior == "log" else value + (step if up else -step)
                moved = min(dimension.high, max(dimension.low, moved))
                new[dimension.name] = round(moved) if dimension.prior == "int" else float(moved)
        return new


def make_scheduler(name: str, space: Space, trials: int, seed: int = 0, rungs: int = 3, eta: int = ETA) -> Scheduler:
    """The scheduler called `name`; `rungs` are the rungs of asha and hyperband, the generations of pbt."""
    if name == "none":
        return FullBudget()
    if name == "pbt":
        population = trials // rungs
        if population < POPULATION or trials % rungs:
            least = POPULATION * rungs
            raise ConfigError(f"--trials {trials}: pbt has {rungs} generations of {POPULATION} or more: {least}, ...")
        return Pbt(space, population, rungs, seed)
    shares = tuple(float(eta) ** (rung - rungs + 1) for rung in range(rungs))
    if name in ("asha", "hyperband"):
        if trials < eta ** (rungs - 1):
            least = eta ** (rungs - 1)
            raise ConfigError(f"--trials {trials}: {name} of {rungs} rungs needs {least} at least; or --scheduler none")
        return Asha(shares, eta) if name == "asha" else Hyperband(shares, eta)
    raise ConfigError(f"--scheduler {name}: choose one of {', '.join(SCHEDULERS)}")


def rank_correlations(history: History) -> list[str]:
    """Of each pair of neighbouring rungs a line: Spearman's rank correlation of the trials seen at both, with its 95 %.

    The interval is Fisher's: tanh(atanh(r) +- 1.96 sqrt(1.06 / (n - 3))); of fewer than 4 pairs there is none. One that
    includes 0 at MIN_PAIRS pairs or more says that the lower rung does not tell who is better.
    """
    lines = []
    for rung in range(len(history.rungs) - 1):
        pairs = [
            (outcome.metric, above.metric)
            for evaluation, outcome in history.outcomes.items()
            if (evaluation.rung, evaluation.seed) == (rung, 0)
            and outcome.metric is not None
            and (above := history.outcomes.get(Evaluation(evaluation.trial, rung + 1))) is not None
            and above.metric is not None
        ]
        if len(pairs) < 4:
            lines.append(f"rungs {rung} and {rung + 1}: {len(pairs)} trials at both, too few for a rank correlation")
            continue
        r, low, high = spearman(pairs)
        doubt = "; the lower rung does not tell who is better" if low <= 0 and len(pairs) >= MIN_PAIRS else ""
        lines.append(
            f"rungs {rung} and {rung + 1}: rank correlation {r:+.2f} [{low:+.2f}, {high:+.2f}], n={len(pairs)}{doubt}"
        )
    return lines


def spearman(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(r, low, high): Spearman's rank correlation in [-1, 1] with Fisher's 95 % interval; 0 of equal values."""
    from scipy.stats import rankdata

    x, y = (rankdata(column) for column in zip(*pairs, strict=True))
    if np.ptp(x) == 0 or np.ptp(y) == 0 or len(pairs) < 4:
        return 0.0, -1.0, 1.0
    r = float(np.corrcoef(x, y)[0, 1])
    middle, half = math.atanh(max(-0.999999, min(0.999999, r))), 1.96 * math.sqrt(1.06 / (len(pairs) - 3))
    return r, math.tanh(middle - half), math.tanh(middle + half)
