"""What is asked of a sweep, as plain data: the first line of its log; and the machine that it makes. No Ray here."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from constellation.config import Config, from_json
from constellation.errors import ArtifactError, ConfigError
from tune.cost import flops_per_token
from tune.history import Evaluation, Trial
from tune.schedulers import Scheduler, make_scheduler
from tune.search import Search, make_search
from tune.space import Dimension, Space
from tune.sweep import Emit, Sweep, silent


@dataclass(frozen=True)
class SweepRequest:
    """Everything that decides what a sweep does, but for the results."""

    space: Space
    base: Config
    corpus: str | None
    budget: float  # tokens of an evaluation at the top rung
    trials: int = 16
    workers: int = 1  # virtual ones, as many as run at once
    seeds: int = 1
    seed: int = 0  # of search and scheduler
    search: str = "tpe"
    scheduler: str = "none"
    rungs: tuple[float, ...] = (1.0,)
    levels: int = 3  # rungs of asha and hyperband, generations of pbt
    metric: str = "dev_bits_per_byte"

    def to_json(self) -> dict[str, Any]:
        """Plain data, with `rungs` as history.py reads it."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "space": asdict(self.space), "base": self.base.to_json(), "rungs": list(self.rungs)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SweepRequest:
        try:
            space = dict(data["space"])
            dimensions = tuple(Dimension(**{**d, "values": tuple(d["values"])}) for d in space.pop("dimensions"))
            plain = {**data, "base": from_json(data["base"]), "rungs": tuple(data["rungs"])}
            return cls(**{**plain, "space": Space(dimensions=dimensions, **space)})
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the sweep's request is damaged ({error!r})") from None

    def config(self, trial: Trial, evaluation: Evaluation) -> Config:
        """The configuration of an evaluation; ConfigError when the trial's settings do not go together."""
        config = self.space.configure(self.base, trial.settings)
        train = dataclasses.replace(config.train, seed=config.train.seed + evaluation.seed)
        return dataclasses.replace(config, train=train)

    def duration(self, trial: Trial, evaluation: Evaluation, share: float) -> float:
        """Virtual seconds: FLOPs over 10^9, 1 for a router; next to nothing for settings that do not go together."""
        if self.space.evaluates == "router":
            return 1.0
        try:
            return share * self.budget * flops_per_token(self.config(trial, evaluation).kernel) / 1e9
        except ConfigError:
            return 1e-9

    def sweep(
        self,
        emit: Emit = silent,
        *,
        search: Search | None = None,
        scheduler: Scheduler | None = None,
        workers: int | None = None,
    ) -> Sweep:
        """The machine; another search, scheduler or number of workers than asked for, for a replay."""
        return Sweep(
            search or make_search(self.search, self.space, self.seed),
            scheduler or make_scheduler(self.scheduler, self.space, self.trials, self.seed, self.levels),
            trials=self.trials, workers=workers or self.workers, duration=self.duration, seeds=self.seeds, emit=emit,
        )  # fmt: skip
