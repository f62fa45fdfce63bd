"""Search: which settings a trial has. No Ray here, no clock.

    random  each setting drawn from its prior
    grid    every combination, in order
    tpe     multivariate tree-structured Parzen estimator with constant liar (Optuna)
    cmaes   covariance matrix adaptation (Optuna, cmaes)

Trial 0 is the preset itself. Suggestion n is a function of the seed, n, and what was suggested and told before.
Metrics are lower-is-better.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import numpy as np

from constellation.errors import ConfigError
from tune.space import Dimension, Space

SEARCHES = ("random", "grid", "tpe", "cmaes")


class Search(Protocol):
    """What a scheduler asks."""

    def suggest(self, number: int) -> tuple[dict[str, Any], str] | None:
        """Settings of trial `number` and who suggests them; None: there are no more."""
        ...

    def tell(self, trial: int, metric: float, share: float) -> None:
        """A result of seed 0 after `share` of the budget; infinity: it failed."""
        ...


class RandomSearch:
    """Each setting drawn from its prior by a generator of (seed, n)."""

    def __init__(self, space: Space, seed: int):
        self._space, self._seed = space, seed

    def suggest(self, number: int) -> tuple[dict[str, Any], str] | None:
        if number == 0:
            return self._space.default, "default"
        draw = np.random.default_rng([self._seed, number])
        return {d.name: d.at(float(draw.random())) for d in self._space.dimensions}, "random"

    def tell(self, trial: int, metric: float, share: float) -> None:
        pass


class GridSearch:
    """Every combination after the default, in order."""

    def __init__(self, space: Space):
        self._default = space.default
        self._rest = space.grid()

    def suggest(self, number: int) -> tuple[dict[str, Any], str] | None:
        if number == 0:
            return self._default, "default"
        settings = next(self._rest, None)
        return None if settings is None else (settings, "grid")

    def tell(self, trial: int, metric: float, share: float) -> None:
        pass


class OptunaSearch:
    """Optuna's samplers by ask and tell.

    A result of the whole budget is a complete trial; one of a lower rung is a pruned one, which Optuna ranks behind
    all complete ones and by how far it came. A failed trial is the worst there is, so that its neighbourhood is
    avoided: for tpe pruned before its first value, for cmaes the worst value told so far.
    """

    def __init__(self, space: Space, seed: int, sampler: str):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._optuna, self._space, self._seed, self._name = optuna, space, seed, sampler
        self._study = optuna.create_study(sampler=self._sampler(0))
        self._distributions = {d.name: self._distribution(d) for d in space.dimensions}
        self._asked: dict[int, Any] = {}  # trial -> Optuna's, until its first result
        self._settings: dict[int, dict[str, Any]] = {}
        self._worst = -math.inf

    def suggest(self, number: int) -> tuple[dict[str, Any], str] | None:
        default = self._space.default
        if number == 0:
            if all(d.admits(default[d.name]) for d in self._space.dimensions):
                self._study.enqueue_trial(default)
                self._ask(number)
            return default, "default"
        return self._ask(number), self._name

    def tell(self, trial: int, metric: float, share: float) -> None:
        if trial not in self._settings:  # a default outside of the space
            return
        state, failed = self._optuna.trial.TrialState, metric == math.inf
        value = metric if not failed else self._worst if self._name == "cmaes" else None
        self._worst = self._worst if failed else max(self._worst, metric)
        complete = value is not None and math.isfinite(value) and (share == 1.0 or self._name == "cmaes")
        asked = self._asked.pop(trial, None)
        if asked is not None:
            if complete:
                self._study.tell(asked, value)
            else:
                if not failed:
                    asked.report(metric, _step(share))
                self._study.tell(asked, state=state.PRUNED)
        elif complete or not failed:
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=self._settings[trial], distributions=self._distributions,
                    intermediate_values={} if complete else {_step(share): metric},
                    state=state.COMPLETE if complete else state.PRUNED, value=value if complete else None,
                )
            )  # fmt: skip

    def _ask(self, number: int) -> dict[str, Any]:
        self._study.sampler = self._sampler(number)
        asked = self._study.ask(self._distributions)
        self._asked[number], self._settings[number] = asked, dict(asked.params)
        return dict(asked.params)

    def _sampler(self, number: int) -> Any:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        samplers = self._optuna.samplers
        if self._name == "cmaes":
            return samplers.CmaEsSampler(seed=seed)
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self._optuna.distributions
        if dimension.prior == "choice":
            return kinds.CategoricalDistribution(dimension.values)
        if dimension.prior == "int":
            return kinds.IntDistribution(int(dimension.low), int(dimension.high))
        return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.prior == "log")


def make_search(name: str, space: Space, seed: int = 0) -> Search:
    """The search called `name`."""
    if name == "random":
        return RandomSearch(space, seed)
    if name == "grid":
        return GridSearch(space)
    if name not in SEARCHES:
        raise ConfigError(f"--search {name}: choose one of {', '.join(SEARCHES)}")
    needs = ("optuna", "cmaes") if name == "cmaes" else ("optuna",)
    for module in needs:
        try:
            __import__(module)
        except ImportError:
            raise ConfigError(
                f"--search {name} needs {module}: pip install 'constellation[tune]', or --search random"
            ) from None
    return OptunaSearch(space, seed, name)


def _step(share: float) -> int:
    """Optuna's steps are whole numbers."""
    return round(share * 1_000_000)
