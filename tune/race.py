"""Racing over paired seeds: the best candidates get further seeds until they are beaten. No Ray here, no clock.

Every trial was evaluated with seed 0. The best `FINALISTS` of those and the default go on, seed by seed, all of them
with the same seeds. After a seed the one with the lowest mean leads; whoever's paired difference to it lies above 0
with its whole 95 % interval (t distribution over seeds) is beaten and gets no further seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from constellation.experiments.statistics import paired
from tune.history import Evaluation

FINALISTS = 4


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences; of fewer than two the interval is infinite."""
    found = paired(differences)
    return found.mean, found.low, found.high


class Race:
    """Rounds of one seed each; `start` says who runs, `told` hears of results, `judge` ends a round."""

    def __init__(self, rung: int, seeds: int):
        self.rung, self.seeds, self.seed = rung, seeds, 0
        self.metrics: dict[int, list[float]] = {}  # of those still in it, by trial, in order of seeds

    def begin(self, metrics: Mapping[int, float]) -> Iterator[tuple[int, str]]:
        """The candidates' metrics with seed 0; yields who gets no further seed, and why."""
        ranked = sorted(metrics, key=lambda trial: (metrics[trial], trial))
        chosen = [t for place, t in enumerate(ranked) if place < FINALISTS or t == 0] if self.seeds > 1 else ranked
        self.metrics = {trial: [metrics[trial]] for trial in chosen}
        for place, trial in enumerate(ranked, start=1):
            if trial not in self.metrics:
                yield trial, f"place {place} of {len(ranked)} with seed 0; the first {FINALISTS} get further seeds"

    def next_round(self) -> list[Evaluation]:
        """The evaluations of the next seed, none when the race is over."""
        self.seed += 1
        if self.seed >= self.seeds or len(self.metrics) < 2:
            return []
        return [Evaluation(trial, self.rung, self.seed) for trial in self.metrics]

    def told(self, evaluation: Evaluation, metric: float) -> None:
        self.metrics[evaluation.trial].append(metric)

    @property
    def leader(self) -> int | None:
        """Lowest mean over its seeds."""
        return min(self.metrics, key=lambda t: (sum(self.metrics[t]) / len(self.metrics[t]), t), default=None)

    def judge(self) -> Iterator[tuple[int, str, str]]:
        """After a round: (trial, decision, why) of everyone who leaves the race."""
        for trial in [t for t, values in self.metrics.items() if math.inf in values]:
            del self.metrics[trial]
            yield trial, "stop", f"failed with seed {self.seed}"
        leader = self.leader
        for trial in [t for t in self.metrics if t != leader]:
            pairs = zip(self.metrics[trial], self.metrics[leader], strict=True)  # type: ignore[index]
            mean, low, high = paired_interval([mine - best for mine, best in pairs])
            if low > 0:
                del self.metrics[trial]
                seeds = f"{self.seed + 1} paired seeds"
                yield trial, "beaten", f"{mean:+.4f} [{low:+.4f}, {high:+.4f}] against trial {leader} over {seeds}"
